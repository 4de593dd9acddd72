"""Our models against the programs whose files we read and write, if those are installed.

Theirs are drawn at random and then changed everywhere, so that nothing is what it starts as: a bias
that goes missing, or a running variance, shows in the features.
"""

import argparse
import io
import json
import os
import pickle
import re
import sys
import zipfile

import cv2
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import
torch = pytest.importorskip("torch")
library = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402  (imports torch)

from configs import clip_vit_b32_yfcc15m, common  # noqa: E402
from declip_jax import export, exporting, trained  # noqa: E402
from declip_jax.data.image import resize_center_crop  # noqa: E402
from declip_jax.data.tokenizer import CLIP_TOKENIZER  # noqa: E402
from declip_jax.interop import declip, openai, pretrained, reading, tables, verify  # noqa: E402
from declip_jax.interop.transfer import resized  # noqa: E402
from declip_jax.models.vit import sincos2d  # noqa: E402
from declip_jax.train import train  # noqa: E402
from tests.drawn import method_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # old, as OpenAI's archives are
    pytest.mark.filterwarnings("ignore:Converting a tensor"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor"),
]

LIMIT = 1e-5  # of a feature's difference, as a share of its length

# Preprocessing that is nobody's default.
MEAN, STD = (0.4, 0.45, 0.5), (0.2, 0.25, 0.3)
TEXTS = [
    "",
    "a photo of a dog.",
    "Don't  SHOUT: it's 3.5 &amp; naïve café…\n",
    "日本語 and 👍🏽 emoji",
    "many words " * 60,
]


def perturbed(network):
    """A network with no array as it was initialized, and whose features depend on its input."""
    noise = torch.Generator().manual_seed(1)
    statistics = {}
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of one batch
    with torch.no_grad():
        for name, array in network.state_dict().items():
            change = torch.randn(array.shape, generator=noise)
            if re.search(r"running_(mean|var)", name):
                statistics[name] = array, change
            elif name.endswith("num_batches_tracked"):
                array += 3
            elif array.is_floating_point():
                # Matrices by a fifth of what they are; biases, scales and the like by a fifth.
                array += 0.2 * change * (array.std() if array.ndim > 1 else 1)
        if statistics:  # near those of images, or a ResNet of random weights forgets the image
            network.train().encode_image(torch.from_numpy(images(2, network.visual.image_size)))
        for name, (array, change) in statistics.items():
            if name.endswith("var"):
                array *= torch.exp(0.2 * change)
            else:
                array += 0.2 * change * array.std()
    return network.eval()


def images(count, size):
    """Like normalized ones, with colors, shapes and noise: float32 [N, 3, H, W]."""
    rng = np.random.default_rng(count)
    pixels = rng.normal(scale=0.3, size=(count, size, size, 3)).astype(np.float32)
    for image in pixels:
        for cells in (1, 3, 8):
            coarse = rng.normal(scale=0.7, size=(cells, cells, 3)).astype(np.float32)
            image += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return pixels.transpose(0, 3, 1, 2).copy()  # NHWC -> NCHW


def inputs(model, count=3):
    """Images like normalized ones, and texts of all lengths: float32 [N, H, W, 3], int32 [N, L]."""
    rng, text = np.random.default_rng(0), model["text"]
    pixels = images(count, model["image"]["resolution"]).transpose(0, 2, 3, 1)  # NCHW -> NHWC
    tokens = np.zeros((count, text["context"]), np.int32)
    for row, length in zip(tokens, np.linspace(2, text["context"], count, dtype=int), strict=True):
        row[:length] = rng.integers(1, text["eot_id"] - 1, length)
        row[0], row[length - 1] = text["eot_id"] - 1, text["eot_id"]
        if length > 2 and text["eot_id"] + 1 < text["vocab_size"]:
            row[1] = text["vocab_size"] - 1  # beyond the end token: its place is not the largest id
    return pixels, tokens


def their_embeddings(network, pixels, tokens):
    """By the library's network, as they come."""
    pictures = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())  # NHWC -> NCHW
    texts = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        if isinstance(network, transformers.CLIPModel):
            image = network.visual_projection(network.vision_model(pictures).pooler_output)
            text = network.text_projection(network.text_model(texts).pooler_output)
        else:
            image, text = network.encode_image(pictures), network.encode_text(texts)
    return image.numpy(), text.numpy()


def difference(ours, theirs):
    """Of the row that differs most, as a share of its length."""
    return (np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def assert_same_features(model, *networks):
    """Of images and texts, as they come and as unit rows; and the same logit scale."""
    pixels, tokens = inputs(model.model)
    ours = verify.embeddings(model, pixels, tokens)
    for network in networks:
        for one, other in zip(ours, their_embeddings(network, pixels, tokens), strict=True):
            assert difference(one, other) < LIMIT
            assert difference(unit(one), unit(other)) < LIMIT
            # Rows that all are alike would be close to anything that is.
            assert difference(np.roll(other, 1, axis=0), other) > 0.05
        scale = np.float32(network.logit_scale.item())
        assert model.variables["params"]["logit_scale"] == scale


def assert_same_state(one, other):
    """The same names, types and bits."""
    assert list(sorted(one)) == list(sorted(other))
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.shape == other[name].shape, name
        assert array.numpy().tobytes() == other[name].numpy().tobytes(), name


def assert_same_variables(one, other):
    one, other = (flatten_dict(tree, sep="/") for tree in (one, other))
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype == np.float32
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def in_float32(network, arrays):
    """The network with the arrays of a file, computing in float32."""
    state = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network.eval()


# --- Transformers ---------------------------------------------------------------------------------

HF_SMALL = dict(
    text_config=dict(
        hidden_size=36,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=99,
        max_position_embeddings=9,
        bos_token_id=96,
        eos_token_id=97,
    ),
    vision_config=dict(
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    ),
    projection_dim=16,
)


def hf_config(activation="quick_gelu", end=97):
    text, image = HF_SMALL["text_config"], HF_SMALL["vision_config"]
    return HF_SMALL | dict(
        text_config=text | dict(hidden_act=activation, eos_token_id=end),
        vision_config=image | dict(hidden_act=activation),
    )


HF_CONFIGS = {
    "ViT-B/32": {},
    "quick_gelu": hf_config(),
    "gelu": hf_config("gelu"),
    "largest id ends": hf_config(end=2),  # as in files of before 2023
}


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_transformers_both_ways(name, tmp_path):
    torch.manual_seed(0)
    network = perturbed(transformers.CLIPModel(transformers.CLIPConfig(**HF_CONFIGS[name])))
    network.save_pretrained(tmp_path / "theirs")

    model = pretrained.read(tmp_path / "theirs")
    assert (model.format, model.method, model.unknown) == ("huggingface", "clip", ())
    assert model.model["activation"] == network.config.vision_config.hidden_act
    assert model.model["text"]["eot_id"] == {
        "ViT-B/32": CLIP_TOKENIZER.end,
        "largest id ends": 98,
    }.get(name, 97)

    exporting.export(trained.complete(model), "huggingface", tmp_path / "ours", {})
    again = transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval()
    assert_same_state(again.state_dict(), network.state_dict())
    assert_same_features(model, network, again)


def test_the_features_that_verification_compares(tmp_path):
    """Unit rows and logits, by either side, are what the networks give."""
    torch.manual_seed(0)
    network = perturbed(transformers.CLIPModel(transformers.CLIPConfig(**hf_config())))
    network.save_pretrained(tmp_path)
    model = pretrained.read(tmp_path)
    pixels, tokens = inputs(model.model)
    image, text = map(unit, their_embeddings(network, pixels, tokens))
    logits = np.exp(network.logit_scale.item()) * image @ text.T
    ours = verify.ours(model, pixels, tokens)
    theirs = verify.theirs(tmp_path, "huggingface", pixels, tokens)
    for features in (ours, theirs):
        assert difference(features.image, image) < LIMIT
        assert difference(features.text, text) < LIMIT
        assert np.abs(features.logits - logits).max() < LIMIT * np.abs(logits).max()
    assert 0 < max(verify.differences(ours, theirs).values()) < LIMIT
    other = theirs._replace(text=theirs.text[::-1])
    assert verify.differences(ours, other)["text"] > 0.05


@pytest.mark.parametrize("whole", [False, True])
def test_transformers_preprocessing_is_read(whole, tmp_path):
    network = transformers.CLIPModel(transformers.CLIPConfig(**hf_config()))
    network.save_pretrained(tmp_path / "theirs")
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size=24, image_mean=list(MEAN), image_std=list(STD)
    )
    if whole:  # a processor of images and texts, which may be one file
        exporting.writing.write_tokenizer(tmp_path, 9)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        images = transformers.CLIPProcessor(images, tokenizer)
    images.save_pretrained(tmp_path / "theirs")
    model = pretrained.read(tmp_path / "theirs")
    assert (model.mean, model.std, model.short_side) == (MEAN, STD, 28)


# --- open_clip ------------------------------------------------------------------------------------

SMALL_IMAGE = dict(image_size=32, layers=3, width=48, patch_size=8, head_width=24)
SMALL_RESNET = dict(image_size=64, layers=[1, 2, 1, 1], width=8, patch_size=None, head_width=32)
SMALL_TEXT = dict(context_length=9, vocab_size=99, width=36, heads=3, layers=2)
SMALL = dict(embed_dim=16, vision_cfg=SMALL_IMAGE, text_cfg=SMALL_TEXT)
BIASED = dict(SMALL, text_cfg=dict(SMALL_TEXT, proj_bias=True))
OPEN_CLIP = {
    "RN50": "RN50",
    "ViT-B-32": "ViT-B-32",
    "ViT-B-32-quickgelu": "ViT-B-32-quickgelu",
    "small": SMALL,
    "small resnet": dict(SMALL, vision_cfg=SMALL_RESNET, quick_gelu=True),
    "bias of the projection": BIASED,
    "bias of the logits": dict(SMALL, init_logit_bias=-10.0),
    "custom text": dict(SMALL, custom_text=True, quick_gelu=True),
    "custom text, bias": dict(BIASED, custom_text=True),
}


def build(model_cfg):
    kind = library.CustomTextCLIP if model_cfg.get("custom_text") else library.CLIP
    return kind(**{name: value for name, value in model_cfg.items() if name != "custom_text"})


@pytest.fixture(scope="module")
def vit_b_32():
    torch.manual_seed(0)
    return perturbed(library.create_model("ViT-B-32")).state_dict()


@pytest.fixture(params=OPEN_CLIP)
def open_clip_model(request):
    """A network, its configuration's `model_cfg`."""
    which = OPEN_CLIP[request.param]
    torch.manual_seed(0)
    if isinstance(which, dict):
        return perturbed(build(which)), which
    network = library.create_model(which)
    if which.startswith("ViT-B-32"):  # both with the same weights
        network.load_state_dict(request.getfixturevalue("vit_b_32"))
        return network.eval(), library.get_model_config(which)
    return perturbed(network), library.get_model_config(which)


def as_exported(state):
    """A state dict of open_clip's without what depends on how the network was built or trained."""
    state = {name.removeprefix("text."): array for name, array in state.items()}
    return {n: a for n, a in state.items() if not n.endswith("num_batches_tracked")}


def save(network, model_cfg, folder):
    """As open_clip does it for others."""
    folder.mkdir()
    safetensors.torch.save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    preprocess_cfg = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def save_checkpoint(network, file):
    """As its distributed training does."""
    state = {f"module.{name}": array for name, array in network.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "scaler": {"scale": 1.0}}, file)


def test_open_clip_both_ways(open_clip_model, tmp_path):
    network, model_cfg = open_clip_model
    save(network, model_cfg, tmp_path / "theirs")
    model = pretrained.read(tmp_path / "theirs")
    assert (model.format, model.method, model.unknown) == ("open_clip", "clip", ())
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    assert model.model["activation"] == activation
    assert model.model["text"]["proj_bias"] == model_cfg["text_cfg"].get("proj_bias", False)
    size = model_cfg["vision_cfg"]["image_size"]
    assert (model.mean, model.std, model.short_side) == (MEAN, STD, size)

    folder = tmp_path / "ours"
    exporting.export(model, "open_clip", folder, {})
    again, _, preprocess = library.create_model_and_transforms(f"local-dir:{folder}")
    assert_same_state(as_exported(again.state_dict()), as_exported(network.state_dict()))
    assert_same_features(model, network, again.eval())
    resize, crop, *_, normalize = preprocess.transforms
    assert (resize.size, resize.interpolation.value) == (size, "bicubic")
    assert crop.size == (size, size)
    assert (tuple(normalize.mean), tuple(normalize.std)) == (MEAN, STD)
    context = model.model["text"]["context"]
    ids = library.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    np.testing.assert_array_equal(ids.numpy(), CLIP_TOKENIZER.encode(TEXTS, context))


@pytest.mark.parametrize("open_clip_model", list(OPEN_CLIP)[3:], indirect=True)
def test_checkpoints_of_open_clip(open_clip_model, tmp_path):
    network, model_cfg = open_clip_model
    save_checkpoint(network, tmp_path / "epoch_3.pt")
    alone = pretrained.read(tmp_path / "epoch_3.pt")
    assert {*alone.unknown} == {"image.heads", "text.heads", "activation"}
    # A bare matrix for the projection of texts may be OpenAI's, too; a bias of the logits not.
    biased = alone.model["text"]["proj_bias"] or network.logit_bias is not None
    assert alone.format == ("open_clip" if biased else "")

    # With the configuration beside it, it is the same as any file of open_clip.
    save(network, model_cfg, tmp_path / "theirs")
    known = (tmp_path / "epoch_3.pt").rename(tmp_path / "theirs" / "epoch_3.pt")
    model = pretrained.read(known)
    assert (model.format, model.unknown) == ("open_clip", ())
    assert model.digest() == pretrained.read(tmp_path / "theirs").digest()
    assert_same_variables(alone.variables, model.variables)


def test_a_bias_of_the_logits_is_compared(tmp_path):
    model_cfg = OPEN_CLIP["bias of the logits"]
    network = perturbed(build(model_cfg))
    save(network, model_cfg, tmp_path / "theirs")
    model = pretrained.read(tmp_path / "theirs")
    assert model.variables["params"]["logit_bias"] == network.logit_bias.item() != 0
    exporting.export(model, "open_clip", tmp_path / "ours", {})
    pixels, tokens = inputs(model.model)
    other = verify.theirs(tmp_path / "ours", "open_clip", pixels, tokens)
    assert verify.differences(verify.ours(model, pixels, tokens), other)["logits"] < 1e-5


def test_fixed_positions_are_open_clip_s():
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    np.testing.assert_allclose(sincos2d(5, 24), get_2d_sincos_pos_embed(24, 5), atol=1e-6)


def test_both_activations_are_told_apart():
    """The same weights compute something else with either: the tests above would see it."""
    torch.manual_seed(0)
    state = perturbed(build(SMALL)).state_dict()
    model = pretrained.of_arrays({name: array.numpy() for name, array in state.items()})
    pixels, tokens = inputs(model.model)
    gelu, quick = (
        verify.ours(model._replace(model={**model.model, "activation": name}), pixels, tokens)
        for name in ("gelu", "quick_gelu")
    )
    assert difference(gelu.image, quick.image) > 100 * LIMIT
    assert difference(gelu.text, quick.text) > 100 * LIMIT


def test_a_checkpoint_of_open_clip_has_its_usual_activation(tmp_path):
    torch.manual_seed(0)
    network = perturbed(build(dict(SMALL, vision_cfg=dict(SMALL_IMAGE, width=128, head_width=64))))
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match="activation"):
        trained.complete(pretrained.read(tmp_path / "epoch_1.pt"))
    model = trained.complete(pretrained.read(tmp_path / "epoch_1.pt", "open_clip"))
    assert model.model["activation"] == "gelu"


def test_every_configuration_of_open_clip_is_understood_or_refused():
    """Heads and activation as the library builds them, or an error that names a field."""
    understood = 0
    for name in library.list_models():
        model_cfg = library.get_model_config(name)
        try:
            known = pretrained.open_clip.from_config({"model_cfg": model_cfg})
        except ValueError as error:
            assert re.search(r"_cfg\.\w+=|\w+=", str(error)), name
            continue
        vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
        assert "timm_model_name" not in vision and "hf_model_name" not in text, name
        assert known["activation"] == ("quick_gelu" if "quickgelu" in name else "gelu"), name
        assert known["text"]["heads"] == text["heads"], name
        width = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
        assert known["image"]["heads"] * vision.get("head_width", 64) == width, name
        understood += 1
    assert understood > 20


# --- OpenAI ---------------------------------------------------------------------------------------


class Archive(library.CLIP):
    """A network with the arrays that OpenAI's archives have besides."""

    def __init__(self, model_cfg):
        super().__init__(**model_cfg)
        del self.context_length, self.vocab_size
        text = model_cfg["text_cfg"]
        sizes = model_cfg["vision_cfg"]["image_size"], text["context_length"], text["vocab_size"]
        for name, value in zip(openai.SIZES, sizes, strict=True):
            self.register_buffer(name, torch.tensor(value))


WIDE = dict(  # a head for each 64 channels
    embed_dim=16,
    quick_gelu=True,
    vision_cfg=dict(image_size=32, layers=2, width=128, patch_size=8),
    text_cfg=dict(context_length=9, vocab_size=99, width=64, heads=1, layers=2),
)
ARCHIVES = {
    "vit": WIDE,
    "resnet": dict(WIDE, vision_cfg=dict(SMALL_RESNET, head_width=64)),
}


def archive(file, model_cfg, how):
    """Writes a TorchScript archive of a network with matrices in float16, as OpenAI's have them."""
    torch.manual_seed(0)
    network = perturbed(Archive(model_cfg))
    size, context = network.input_resolution.item(), network.context_length.item()
    for parameter in network.parameters():  # which half precision holds as they are
        parameter.data = parameter.data.half().float()
    if how == "script":
        program = torch.jit.script(network)
    else:
        example = torch.zeros(1, 3, size, size), torch.zeros(1, context, dtype=torch.long)
        program = torch.jit.trace(network, example, check_trace=False)
    for parameter in program.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()
    torch.jit.save(program, file)


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_openai_is_read_without_running_it(kind, how, tmp_path, monkeypatch):
    file = tmp_path / "model.pt"
    archive(file, ARCHIVES[kind], how)
    expected = {name: x.numpy() for name, x in torch.jit.load(file).state_dict().items()}

    def never(*_, **__):
        raise AssertionError("the archive was loaded as a program")

    monkeypatch.setattr(torch.jit, "load", never)
    monkeypatch.setattr(torch._C, "import_ir_module", never)
    arrays = reading.read(file).arrays
    assert arrays.keys() == expected.keys() and {*openai.SIZES} < {*arrays}
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert {array.dtype.name for array in arrays.values()} == {"float16", "float32", "int64"}

    model = pretrained.read(file)
    assert (model.format, model.method) == ("openai", "clip")
    assert model.model["activation"] == "quick_gelu"
    assert_same_features(model, in_float32(library.CLIP(**ARCHIVES[kind]), expected))


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("size, context", [(96, 20), (32, 14)])
def test_positions_are_resized_as_open_clip_does(kind, size, context):
    """Cells of a ResNet it leaves alone."""
    model_cfg = dict(ARCHIVES[kind], text_cfg=dict(WIDE["text_cfg"], context_length=9))
    model_cfg["vision_cfg"] = dict(model_cfg["vision_cfg"], image_size=64)
    torch.manual_seed(0)
    state = perturbed(library.CLIP(**model_cfg)).state_dict()
    model = pretrained.of_arrays(
        {n: x.numpy() for n, x in as_exported(state).items()}, format="openai"
    )
    ours, _ = resized(model, size, context)
    vision_cfg = dict(model_cfg["vision_cfg"], image_size=size)
    text_cfg = dict(model_cfg["text_cfg"], context_length=context)
    network = library.CLIP(**dict(model_cfg, vision_cfg=vision_cfg, text_cfg=text_cfg))
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    state = dict(state)
    if kind == "vit":
        resize_pos_embed(state, network, interpolation="bicubic", antialias=True)
        image = ours.variables["params"]["image"]["positional_embedding"]
        theirs = state["visual.positional_embedding"].numpy()
        np.testing.assert_allclose(image, theirs, atol=1e-5)
    resize_text_pos_embed(state, network, interpolation="linear", antialias=False)
    text = ours.variables["params"]["text"]["positional_embedding"]
    np.testing.assert_allclose(text, state["positional_embedding"].numpy(), atol=1e-5)


# --- Files that are no weights --------------------------------------------------------------------


class Trap:
    """Unpickled by a program that trusts its files, it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch '{self.trace}'",)


SYSTEM = f"{os.system.__module__}.system"
FINE = {"visual.proj": torch.ones(2, 3)}


def _zip(data, **others):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in {"data.pkl": data, "version": b"3\n", **others}.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def _saved(value, **how):
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    return stream.getvalue()


TRAPS = {
    "saved": lambda trap: _saved(trap),
    "saved in the old way": lambda trap: _saved(trap, _use_new_zipfile_serialization=False),
    "among arrays": lambda trap: _saved({"state_dict": {**FINE, "visual.conv1.weight": trap}}),
    "beside them": lambda trap: _saved({"state_dict": FINE, "args": [{"deep": (trap,)}]}),
    "pickle": lambda trap: pickle.dumps({"state_dict": trap}, protocol=2),
    "zip": lambda trap: _zip(pickle.dumps(trap, protocol=2)),
    "archive": lambda trap: _zip(pickle.dumps(trap, protocol=2), **{"constants.pkl": b""}),
}


@pytest.mark.parametrize("kind", TRAPS)
def test_nothing_of_a_file_is_run(kind, tmp_path):
    file, trace = tmp_path / "model.pt", tmp_path / "trace"
    file.write_bytes(TRAPS[kind](Trap(trace)))
    with pytest.raises(ValueError, match=rf"model\.pt.*\({SYSTEM}\)"):
        pretrained.read(file)
    assert not trace.exists()
    if kind == "pickle":  # it would have worked
        pickle.loads(file.read_bytes())
        assert trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_of_any_protocol_is_run(protocol, tmp_path):
    data, trace = pickle.dumps(Trap(tmp_path / "trace"), protocol), tmp_path / "trace"
    for number, content in enumerate([data, _zip(data), _zip(data, **{"constants.pkl": b""})]):
        file = tmp_path / f"{number}.pt"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=file.name):
            pretrained.read(file)
        assert not trace.exists()


def test_archives_cannot_grow(tmp_path):
    """Neither by compression nor by modules that hold one another again and again."""
    file, packed = tmp_path / "model.pt", tmp_path / "packed.pt"
    archive(file, WIDE, "script")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="packed.pt.*is compressed, which torch never does"):
        pretrained.read(packed)

    class Leaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.weight

    torch.jit.save(torch.jit.script(Leaf()), tmp_path / "leaf.pt")

    def twice(inner, place):
        """The pickle of a module that holds another as `a`, and the same once more as `b`."""
        a, b = (b"X\x01\x00\x00\x00" + name for name in (b"a", b"b"))
        kept = bytes([place])
        return b"c__torch__\nTwice\n)\x81}(" + a + inner + b"q" + kept + b + b"h" + kept + b"ub"

    with (
        zipfile.ZipFile(tmp_path / "leaf.pt") as old,
        zipfile.ZipFile(tmp_path / "twice.pt", "w") as new,
    ):
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("/data.pkl"):
                inner = data[2:-1]  # without the protocol and the end
                for place in (201, 202, 203):
                    inner = twice(inner, place)
                data = data[:2] + inner + data[-1:]
            new.writestr(name, data)
    assert reading.read(tmp_path / "twice.pt").arrays.keys() == {"a.a.a.weight"}  # and not eight


def test_torch_that_would_run_code_all_the_same_is_not_used(tmp_path, monkeypatch):
    torch.save(FINE, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ValueError, match=r"PyTorch 2.5.1\+cpu: before 2.6 a file could run code"):
        pretrained.read(tmp_path / "weights.pt")


def test_an_archive_with_another_program_s_objects_is_refused(tmp_path):
    file, changed, trace = (tmp_path / name for name in ("model.pt", "changed.pt", "trace"))
    archive(file, WIDE, "script")
    data = pickle.dumps(Trap(trace), protocol=2)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("/data.pkl") else old.read(name))
    with pytest.raises(ValueError, match=rf"changed\.pt.*\({SYSTEM}\)"):
        pretrained.read(changed)
    assert not trace.exists()


@pytest.mark.parametrize(
    "beside, name",
    [
        ({"args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        ({"best": np.float64(0.5)}, r"numpy\.\w+\.multiarray\.scalar"),
        ({"network": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
    ],
)
def test_objects_beside_the_weights_are_named(beside, name, tmp_path):
    torch.save({"state_dict": FINE, **beside}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt holds objects .*\({name}"):
        reading.read(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "value, expected",
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({**FINE, "step": 3}, "step are not tensors"),
        ({}, "holds no arrays"),
        ({0: torch.ones(2)}, "no CLIP model .* called 0"),
        ({"a": torch.eye(2).to_sparse()}, "numpy"),
        ({"a": torch.ones(2, dtype=torch.float8_e4m3fn)}, "numpy"),
    ],
)
def test_what_is_no_state_dict_is_an_error(value, expected, tmp_path):
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt.* {expected}"):
        pretrained.read(tmp_path / "model.pt")


def _whole(kind):
    """A good file's bytes."""
    if kind == "safetensors":
        return safetensors.torch.save(FINE)
    return _saved(FINE, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_a_damaged_file_is_named(kind, tmp_path):
    file, data = tmp_path / "model.pt", _whole(kind)
    file.write_bytes(data)
    np.testing.assert_array_equal(reading.read(file).arrays["visual.proj"], np.ones((2, 3)))
    for length in np.linspace(0, len(data) - 1, 60, dtype=int):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(str(file))):
            pretrained.read(file)


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", b"\x08" + b"\0" * 7 + b"{"])
def test_random_bytes_are_an_error_that_names_the_file(start, tmp_path):
    file, rng = tmp_path / "model.pt", np.random.default_rng(0)
    for _ in range(20):
        file.write_bytes(start + rng.bytes(500))
        with pytest.raises(ValueError, match=re.escape(str(file))):
            pretrained.read(file)


# --- Types and wrappings --------------------------------------------------------------------------

IMAGES = {
    "vit": dict(kind="vit", resolution=16, patch=8, width=32, layers=3, heads=2),
    "resnet": dict(
        kind="resnet", resolution=32, width=8, layers=(1, 1, 2, 1), heads=4, bn_group_size=0
    ),
}


def variables_of(method, kind):
    """Of a small model with the method's heads, every value distinct."""
    config = common.get_config("tiny").unlock()
    config.method = method
    weights = {
        "slip": ("simclr",),
        "filip": ("filip",),
        "declip": ("simsiam", "mlm", "nn_text"),
        "defilip": ("simsiam", "mlm", "nn_text", "filip"),
    }
    config.loss.weights = dict.fromkeys(("clip", *weights.get(method, ())), 1.0)
    config.model.embed_dim = 16
    config.model.image = IMAGES[kind]
    config.model.text.update(vocab_size=20, eot_id=18, context=8, width=24, heads=3)
    init = method_of(config).init
    params, model_state = jax.eval_shape(init, jax.random.key(0))
    like = {
        "params": params,
        **{name: model_state[name] for name in model_state if name == "batch_stats"},
    }
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("method", declip.METHODS)
def test_checkpoints_of_declip_s_program(method, kind, tmp_path):
    variables = variables_of(method, kind)
    arrays = tables.dump(declip.layout(kind, method), variables)
    assert arrays["logit_scale"].shape == (1,)
    state = {f"module.{name}": torch.from_numpy(array) for name, array in arrays.items()}
    if kind == "resnet":
        state["module.visual.bn1.num_batches_tracked"] = torch.tensor(3)
        state["module.visual.fc.weight"] = torch.ones(5, 4)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    checkpoint = {"model": state, "optimizer": optimizer, "last_iter": 128000, "loss": 1.5}
    torch.save(checkpoint, tmp_path / "checkpoint.pth.tar")
    model = pretrained.read(tmp_path / "checkpoint.pth.tar")
    assert (model.format, model.method) == ("declip", method)
    assert_same_variables(model.variables, variables)
    assert model.model["activation"] == "quick_gelu" and model.model["text"]["eot_id"] == 18


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_and_both_ways_of_torch_save(dtype, old, tmp_path):
    torch.manual_seed(0)
    state = perturbed(build(BIASED)).state_dict()
    state = {name: array.to(getattr(torch, dtype)) for name, array in state.items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    file = tmp_path / "model.pt"
    torch.save(state, file, _use_new_zipfile_serialization=not old)
    assert zipfile.is_zipfile(file) != old
    arrays = reading.read(file).arrays
    expected = np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert {array.dtype for array in arrays.values()} == {expected}
    for name, array in state.items():
        np.testing.assert_array_equal(arrays[name].astype(np.float64), array.double().numpy())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    same = pretrained.read(tmp_path / "model.safetensors")
    assert_same_variables(pretrained.read(file).variables, same.variables)


def test_a_logit_scale_that_is_a_vector_of_one(tmp_path):
    """Some of open_clip's networks have it."""
    torch.manual_seed(0)
    network = perturbed(library.CLIP(**SMALL, nonscalar_logit_scale=True))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    model = pretrained.read(tmp_path / "model.pt")
    assert model.variables["params"]["logit_scale"].shape == ()
    assert model.variables["params"]["logit_scale"] == network.logit_scale.item()


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of one step, of a model that every format but OpenAI's can hold."""
    config = clip_vit_b32_yfcc15m.get_config("tiny").unlock()
    config.model.activation = "gelu"
    config.model.image.update(width=64, heads=1)  # a head for each 64 channels
    config.model.text.update(width=64, heads=1)
    config.image_mean, config.image_std = MEAN, STD
    config.eval.update(every=0, preprocess="train")
    config.optim.update(schedule="constant", warmup_steps=0)  # so that the step changes something
    config.total_steps = 1
    workdir = tmp_path_factory.mktemp("run")
    train(config.lock(), workdir)
    return workdir


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export.main()


def assert_verified(printed, format):
    """The command said that nothing differs by more than rounding."""
    assert "the same arrays, bit for bit" in printed
    assert verify.version(format) in printed
    rows = re.findall(r"^  (image|text|logits) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["image", "text", "logits"]
    for _, *values in rows:
        assert all(0 < float(value) < LIMIT for value in values)


@pytest.mark.parametrize("format", ["open_clip", "huggingface", "alip"])
def test_a_run_is_exported_and_verified(format, run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    command(monkeypatch, "--workdir", run, "--format", format, "--output", folder, "--verify")
    printed = capsys.readouterr().out
    assert_verified(printed, format)

    # Read again it is the run's model, of which only the projection's bias may be elsewhere.
    model, again = trained.read_run(run).model, trained.read(folder)
    assert again.format == format and again.model["activation"] == "gelu"
    moved = format != "open_clip"
    assert ("the bias of the text projection" in printed) == moved
    assert again.model["text"]["proj_bias"] != moved
    pixels, tokens = inputs(model.model)
    ours, theirs = (verify.embeddings(one, pixels, tokens) for one in (model, again))
    for one, other in zip(ours, theirs, strict=True):
        assert difference(other, one) < LIMIT


def test_another_program_s_model_is_exported_and_verified(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    texts = dict(WIDE["text_cfg"], vocab_size=CLIP_TOKENIZER.end + 1, context_length=16)
    model_cfg = dict(WIDE, text_cfg=texts)
    save(perturbed(build(model_cfg)), model_cfg, tmp_path / "theirs")
    folder = tmp_path / "out"
    arguments = ["--init", tmp_path / "theirs", "--format", "openai", "--output", folder]
    command(monkeypatch, *arguments, "--verify")
    assert_verified(capsys.readouterr().out, "openai")
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    assert [arrays[name].item() for name in openai.SIZES] == [32, 16, CLIP_TOKENIZER.end + 1]
    # The sizes tell the format, whatever else is in the folder.
    (folder / "declip_jax.json").unlink()
    assert pretrained.read(folder).format == "openai"


def _change_weights(folder):
    file = next(folder.glob("*.safetensors"))
    arrays = safetensors.numpy.load_file(file)
    name = min(name for name in arrays if name.endswith("bias"))
    arrays[name][0] = np.nextafter(arrays[name][0], np.float32(1))
    safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"})


def _change_activation(folder):
    for file in folder.glob("*config.json"):
        text = file.read_text()
        text = text.replace('"quick_gelu": false', '"quick_gelu": true')
        file.write_text(text.replace('"hidden_act": "gelu"', '"hidden_act": "quick_gelu"'))


@pytest.mark.parametrize("format", ["open_clip", "huggingface"])
@pytest.mark.parametrize(
    "change, message",
    [(_change_weights, "the same arrays"), (_change_activation, "does not compute what")],
)
def test_verification_finds_what_was_changed(format, change, message, run, tmp_path, monkeypatch):
    write = exporting.export

    def write_and_change(model, format, folder, notes):
        written = write(model, format, folder, notes)
        change(folder)
        return written

    monkeypatch.setattr(exporting, "export", write_and_change)
    arguments = ["--workdir", run, "--format", format, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(monkeypatch, *arguments, "--verify")


def photograph(height, width):
    """Detail at several scales, as photographs have."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 127.0)
    for cells, contrast in ((4, 50), (16, 25), (64, 12)):
        coarse = rng.normal(0, contrast, (cells, cells, 3))
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return pixels.clip(0, 255).astype(np.uint8)


def test_the_processor_of_transformers(run, tmp_path):
    model = trained.read_run(run).model._replace(short_side=37)
    size, context = model.model["image"]["resolution"], model.model["text"]["context"]
    exporting.export(model, "huggingface", tmp_path / "out", {})
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out")
    settings = processor.image_processor
    assert dict(settings.size)["shortest_edge"] == 37
    assert {side: settings.crop_size[side] for side in ("height", "width")} == {
        "height": size,
        "width": size,
    }
    assert settings.do_resize and settings.do_center_crop and settings.do_rescale
    assert settings.do_normalize and int(settings.resample) == 3  # bicubic
    assert (tuple(settings.image_mean), tuple(settings.image_std)) == (MEAN, STD)

    # Its resampler is another one: a pixel differs by one of 255 levels on average and by five at
    # most. The last image has the size already, and is the same but for rounding.
    pictures = [photograph(*shape) for shape in ((240, 320), (200, 150), (37, 90))]
    found = processor(
        images=pictures, text=TEXTS, return_tensors="pt", padding=True, truncation=True
    )
    theirs = found["pixel_values"].numpy().transpose(0, 2, 3, 1)  # NCHW -> NHWC
    levels = 255 * (theirs * np.float32(STD) + np.float32(MEAN))
    ours = np.stack([resize_center_crop(picture, 37, size) for picture in pictures])
    off = np.abs(levels - ours)
    assert off.max() < 7 and off[:2].mean() < 1.5 and off[2].max() < 1e-3
    assert np.abs(levels - np.roll(ours, 1, axis=2))[:2].mean() > 4  # none is a pixel aside

    # Texts end to end: their padding is another, the features are the same.
    network = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        out = network(**found)
    pixels = theirs.astype(np.float32)
    features = verify.ours(model, pixels, CLIP_TOKENIZER.encode(TEXTS, context))
    assert difference(features.text, out.text_embeds.numpy()) < LIMIT
    assert difference(features.image, out.image_embeds.numpy()) < LIMIT
