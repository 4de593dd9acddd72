"""Encoding host batches of any size with a trained model, over all devices."""

import copy
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from declip_jax import augment
from declip_jax.data.tokenizer import CLIP_TOKENIZER, Tokenizer
from declip_jax.evals.preprocess import Preprocess
from declip_jax.methods import Method
from declip_jax.methods.base import Encoders
from declip_jax.parallel.mesh import check_batch_size, replicated, shard_batch


class Encoder:
    """Image and text features of a method's model as host arrays.

    Args:
      method: whose model encodes, or encoders alone.
      seen: how images are normalized.
      batch_size: of what is encoded at once: `config.eval.batch_size`.
      context: most tokens of a text, as an attribute for those who make them.
      mesh: the batch is divided over its devices.
      tokenizer: whose ids the text tower reads; an attribute, as `context` is.
    """

    def __init__(
        self,
        method: Method | Encoders,
        seen: Preprocess,
        batch_size: int,
        context: int,
        mesh: Mesh,
        tokenizer: Tokenizer = CLIP_TOKENIZER,
    ):
        check_batch_size("config.eval.batch_size", batch_size, mesh)
        self._batch_size, self.context = batch_size, context
        self.mesh, self.tokenizer = mesh, tokenizer

        def image(params, model_state, batch):
            pixels = batch["image"].astype("float32") / 255
            pixels = augment.normalize(pixels, seen.mean, seen.std)
            return method.encode_image(params, model_state, pixels)

        def text(params, model_state, batch):
            return method.encode_text(params, model_state, batch["tokens"])

        self._image = jax.jit(image, out_shardings=replicated(mesh))
        self._text = jax.jit(text, out_shardings=replicated(mesh))

    def use(self, params, model_state) -> "Encoder":
        """One of these variables, by the same compiled programs."""
        other = copy.copy(self)
        other._params, other._model_state = params, model_state
        return other

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> float32 [N, D], unit rows."""
        return self._batched(self._image, "image", images)

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        """int32 [N, L] -> float32 [N, D], unit rows."""
        return self._batched(self._text, "tokens", tokens)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """N texts -> float32 [N, D], unit rows."""
        return self.encode_text(self.tokenizer.encode(texts, self.context))

    def _batched(self, encode, name: str, rows: np.ndarray) -> np.ndarray:
        features = []
        for start in range(0, len(rows), self._batch_size):
            block = rows[start : start + self._batch_size]
            # Always the same shape, so one compiled program; the padding's features are cut off.
            padded = np.zeros((self._batch_size, *rows.shape[1:]), rows.dtype)
            padded[: len(block)] = block
            out = encode(self._params, self._model_state, shard_batch({name: padded}, self.mesh))
            features.append(np.asarray(out)[: len(block)])
        return np.concatenate(features)
