"""Captions of images by a model of the Transformers library.

This needs the extra `captions`: Transformers, and PyTorch, which runs the model.
"""

import functools
from collections.abc import Sequence

import numpy as np


class Captioner:
    """An image-to-text model: BLIP, GIT, an encoder with a decoder, one to chat with as LLaVA.

    A caption is the one that the model finds best, by the search that its generation config names,
    without drawing. Weights are read from safetensors only, and no code that comes with them runs.

    Args:
      model: name on the Hugging Face hub, or a folder.
      device: as PyTorch calls it, "cpu" or "cuda:1".
      prompt: what the caption goes on from, as BLIP and GIT do, or answers, as LLaVA does.

    Raises:
      ValueError: Transformers or what the model needs besides is not installed; there is no such
        model, it is of another kind, or has no safetensors; or there is no such device.
    """

    def __init__(self, model: str, device: str = "cpu", max_new_tokens: int = 30, prompt: str = ""):
        try:
            from PIL import Image
            from transformers import (
                AutoImageProcessor,
                AutoModelForImageTextToText,
                AutoProcessor,
                AutoTokenizer,
                ProcessorMixin,
            )
        except ImportError as error:
            raise ValueError(f"{error}: pip install 'declip-jax[captions]'") from error
        self._to_pil = Image.fromarray
        source = {"pretrained_model_name_or_path": model, "trust_remote_code": False}
        try:
            self._model = AutoModelForImageTextToText.from_pretrained(
                **source, use_safetensors=True
            ).to(device)
            self._processor = AutoProcessor.from_pretrained(**source)
            if isinstance(self._processor, ProcessorMixin):
                tokenizer = self._processor.tokenizer
            else:  # an encoder with a decoder, VisionEncoderDecoder: one of each, side by side
                self._processor = AutoImageProcessor.from_pretrained(**source)
                tokenizer = AutoTokenizer.from_pretrained(**source)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # in one line
            raise ValueError(f"{model!r} cannot be loaded to caption images: {reason}") from error
        tokenizer.padding_side = "left"  # an image may be as many tokens as its size asks for
        self._decode = functools.partial(tokenizer.batch_decode, skip_special_tokens=True)
        self._options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self._prompt = prompt
        if getattr(self._processor, "chat_template", None):
            if not prompt:
                raise ValueError(
                    f"{model!r} must be asked for a caption: give a prompt, such as 'Describe this "
                    "image in one sentence.'"
                )
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            self._prompt = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )

    def __call__(self, images: Sequence[np.ndarray]) -> list[str]:
        """One caption for each image, uint8 [H, W, 3]; without the prompt, and may be empty."""
        images = [self._to_pil(pixels) for pixels in images]
        text = {"text": [self._prompt] * len(images), "padding": True} if self._prompt else {}
        inputs = self._processor(images=images, return_tensors="pt", **text)
        if text and self._model.config.model_type == "git":
            # It must go on after the words, not after the [SEP] that follows them.
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
        inputs = inputs.to(self._model.device, self._model.dtype)
        captions = self._decode(self._model.generate(**inputs, **self._options))
        # Models that write on from a prompt repeat it.
        prompts = self._decode(inputs["input_ids"]) if text else [""] * len(images)
        return [c.removeprefix(p).strip() for c, p in zip(captions, prompts, strict=True)]
