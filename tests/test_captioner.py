from pathlib import Path

import cv2
import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from declip_jax import prepare  # noqa: E402
from declip_jax.data.sources import open_source  # noqa: E402
from declip_jax.prepare.captioner import Captioner  # noqa: E402

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] a photo of the dog cat man on in red".split()
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SIZE = {"height": 32, "width": 32}


def images():
    """Of different sizes and colors."""
    rng = np.random.default_rng(0)
    shapes = [(20, 40, 3), (40, 20, 3), (9, 5, 3), (64, 64, 3)]
    flat = [np.full(shape, rng.integers(256, size=3), np.uint8) for shape in shapes]
    return [*flat, rng.integers(0, 256, (30, 30, 3), np.uint8)[::-1]]


def save(model, processors, folder):
    """A model with random weights, so large that its captions depend on the image."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1 and "position" not in name:
                weights.normal_(std=0.4)
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return str(folder)


def tokenizer(folder):
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(WORDS))
    return transformers.BertTokenizer(
        str(vocabulary),
        additional_special_tokens=["[DEC]"],
        model_input_names=["input_ids", "attention_mask"],
    )


def blip(folder):
    folder.mkdir(exist_ok=True)
    config = transformers.BlipConfig(
        text_config=TEXT | {"encoder_hidden_size": 32, "bos_token_id": 5}, vision_config=VISION
    )
    processor = transformers.BlipProcessor(
        transformers.BlipImageProcessor(size=SIZE), tokenizer(folder)
    )
    return save(transformers.BlipForConditionalGeneration(config), [processor], folder)


def git(folder):
    config = transformers.GitConfig(vision_config=VISION, **TEXT)
    crop = {"size": {"shortest_edge": 32}, "crop_size": SIZE}
    processor = transformers.GitProcessor(
        transformers.CLIPImageProcessor(**crop), tokenizer(folder)
    )
    return save(transformers.GitForCausalLM(config), [processor], folder)


def encoder_decoder(folder):
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), decoder
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    processors = [transformers.ViTImageProcessor(size=SIZE), tokenizer(folder)]
    return save(transformers.VisionEncoderDecoderModel(config), processors, folder)


@pytest.mark.parametrize("kind", [blip, git, encoder_decoder])
def test_captions_are_those_of_each_image_alone(kind, tmp_path):
    captioner = Captioner(kind(tmp_path), max_new_tokens=5)
    captions = captioner(images())
    assert len(set(captions)) > 1
    assert captions == [caption for image in images() for caption in captioner([image])]
    assert captions == Captioner(str(tmp_path), max_new_tokens=5)(images())
    for caption in captions:
        assert len(caption.split()) <= 5 and caption == caption.strip()
        assert set(caption.split()) <= set(WORDS[6:])  # none of the special ones


@pytest.mark.parametrize("kind", [blip, git])
def test_captions_go_on_from_the_prompt_and_leave_it_out(kind, tmp_path):
    folder = kind(tmp_path)
    plain, prompted = (Captioner(folder, max_new_tokens=5, prompt=p) for p in ("", "A photo of"))
    generate = prompted._model.generate
    raw = []
    prompted._model.generate = lambda **inputs: raw.append(generate(**inputs)) or raw[-1]
    captions = prompted(images())
    assert captions != plain(images())
    begin = [WORDS.index(word) for word in "a photo of".split()]
    for caption, ids in zip(captions, raw[0].tolist(), strict=True):
        assert ids[1:4] == begin and ids[4] != WORDS.index("[SEP]")
        words = [WORDS[i] for i in ids[4:] if i > 5]
        assert caption.split() == words


def test_prepare_writes_them_beside_the_others(tmp_path):
    pictures = tmp_path / "in" / "cat"
    pictures.mkdir(parents=True)
    for number, pixels in enumerate(images()):
        cv2.imwrite(str(pictures / f"{number}.png"), np.ascontiguousarray(pixels[..., ::-1]))
    one, two, model = (str(tmp_path / name) for name in ("one", "two", "model"))
    arguments = ["imagefolder", "--images", str(tmp_path / "in"), "--output", one]
    assert prepare.main(arguments) == 0
    flags = ["--model", blip(Path(model)), "--max-new-tokens", "5", "--batch-size", "2"]
    assert prepare.main(["captions", "--source", one, *flags, "--output", two]) == 0
    captioner = Captioner(model, max_new_tokens=5)
    # An image for which the model finds no word is refused.
    expected = [[caption] for pixels in images() for caption in captioner([pixels]) if caption]
    source = open_source(two, "train")
    assert [source[index]["synthetic"] for index in range(len(source))] == expected
    assert len(source) >= 3 and source[0]["captions"] == ["a photo of a cat."]


def test_what_cannot_be_loaded_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="nothing-here"):
        Captioner(str(tmp_path / "nothing-here"))
    folder = encoder_decoder(tmp_path)
    with pytest.raises(ValueError, match="no-such-device"):
        Captioner(folder, device="no-such-device")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        Captioner(folder)


def test_a_model_of_another_kind_is_an_error(tmp_path):
    config = transformers.BertConfig(**TEXT)
    folder = save(transformers.BertModel(config), [tokenizer(tmp_path)], tmp_path)
    with pytest.raises(ValueError, match="caption images"):
        Captioner(folder)
