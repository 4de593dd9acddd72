"""Other programs' models as ours and back, without those programs; test_peers.py has them."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from configs import common
from declip_jax import exporting, trained
from declip_jax.interop import (
    declip,
    huggingface,
    open_clip,
    pretrained,
    reading,
    tables,
    verify,
    writing,
)
from declip_jax.interop.architecture import infer, sections
from declip_jax.interop.transfer import fit, resized
from declip_jax.methods import METHODS
from tests.drawn import method_of

IMAGES = {
    "vit": dict(kind="vit", resolution=16, patch=8, width=32, layers=3, heads=2),
    "resnet": dict(
        kind="resnet", resolution=64, width=8, layers=(1, 1, 2, 1), heads=4, bn_group_size=0
    ),
}
# What the file does not tell of a model of this kind.
UNKNOWN = ("image.heads", "text.heads", "activation")


def config_of(method, kind="vit", proj_bias=True):
    config = common.get_config("tiny").unlock()
    config.method = method
    config.loss.weights = dict.fromkeys(METHODS[method].terms, 1.0)
    config.model.embed_dim = 16
    config.model.image = IMAGES[kind]
    config.model.text.update(vocab_size=20, eot_id=18, context=8, width=24, heads=3)
    config.model.text.proj_bias = proj_bias
    return config


def variables_of(config, seed=0):
    """Every value distinct, batch statistics too."""
    like, rng = shapes_of(config.to_json_best_effort()), np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)


@functools.cache
def shapes_of(config):
    config = ConfigDict(json.loads(config))
    init = method_of(config).init
    params, model_state = jax.eval_shape(init, jax.random.key(0))
    return {
        "params": params,
        **{name: model_state[name] for name in model_state if name == "batch_stats"},
    }


def model_of(config, variables=None) -> pretrained.Pretrained:
    """As `trained.read_run` gives it."""
    sizes = config.model.to_dict()
    sizes = {name: sizes[name] for name in ("embed_dim", "activation", "image", "text")}
    sizes["image"] = sections(sizes)[0].as_dict()
    variables = variables or variables_of(config)
    mean, std, side = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), config.model.image.resolution + 2
    return pretrained.Pretrained(
        "a run", "declip_jax", config.method, None, variables, sizes, (), mean, std, short_side=side
    )


# Every layout, with a model that it can hold.
LAYOUTS = {
    **{
        f"declip-{method}-{kind}": ("declip", method, kind, True)
        for method in declip.METHODS
        for kind in IMAGES
    },
    **{
        f"{format}-{kind}": (format, "alip", kind, False)
        for format in ("openai", "alip", "open_clip")
        for kind in IMAGES
    },
    "open_clip-bias": ("open_clip", "clip", "vit", True),
    "huggingface": ("huggingface", "clip", "vit", False),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    """(format, method, variables, layout)"""
    format, method, kind, proj_bias = request.param
    variables = variables_of(config_of(method, kind, proj_bias))
    return format, method, variables, pretrained.layout_of(format, kind, method, proj_bias)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda x: x.dtype, one) == jax.tree.map(lambda x: x.dtype, other)


def state_dict_of(method="declip", kind="vit", format="declip"):
    variables = variables_of(config_of(method, kind, proj_bias=format == "declip"))
    return tables.dump(pretrained.layout_of(format, kind, method), variables)


# --- tables ---------------------------------------------------------------------------------------


def test_round_trips_are_exact(layout):
    _, _, variables, table = layout
    state_dict = tables.dump(table, variables)
    assert sum(x.size for x in state_dict.values()) == sum(
        x.size for x in jax.tree.leaves(variables)
    )
    loaded = tables.load(table, state_dict)
    assert_same(loaded, variables)
    tables.check(table, loaded, variables)
    assert_same(tables.dump(table, loaded), state_dict)
    assert all(x.flags.c_contiguous for x in state_dict.values())


def test_what_is_printed_is_what_is_done(layout):
    _, _, variables, table = layout
    printed = {theirs: ours for ours, theirs, _ in tables.table(table, variables)}
    names = [name for theirs in printed for name in theirs.split(" + ")]
    assert sorted(names) == sorted(tables.dump(table, variables))
    assert "logit_scale" in printed and printed["logit_scale"] == "params/logit_scale"


@pytest.mark.parametrize("kind", IMAGES)
def test_names_and_transforms_of_declip(kind):
    variables = variables_of(config_of("clip", kind))
    state_dict = tables.dump(declip.layout(kind, "clip"), variables)
    image, text = variables["params"]["image"], variables["params"]["text"]
    assert state_dict["logit_scale"].shape == (1,)
    np.testing.assert_array_equal(
        state_dict["encode_text.transformer.resblocks.1.mlp.c_fc.weight"],
        text["blocks"]["mlp"]["c_fc"]["kernel"][1].T,
    )
    if kind == "vit":
        np.testing.assert_array_equal(
            state_dict["visual.conv1.weight"][5, 2], image["patch_embed"]["kernel"][:, :, 2, 5]
        )
    else:
        np.testing.assert_array_equal(
            state_dict["visual.layer3.0.downsample.1.running_var"],
            variables["batch_stats"]["image"]["layer3_0"]["downsample_bn"]["var"],
        )


def test_vocabulary_and_token_ids_move_together():
    # theirs: mask 17, start 18, end 19; ours: start 17, end 18, mask 19
    tokens = np.array([[18, 3, 17, 19, 0]])
    ours = declip.tokens_from_theirs(tokens, 20)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, [[17, 3, 19, 18, 0]])
    params = variables_of(config_of("declip"))["params"]
    state_dict = state_dict_of("declip")
    table = params["text"]["token_embedding"]["embedding"]
    theirs = state_dict["encode_text.token_embedding.weight"]
    np.testing.assert_array_equal(table[ours], theirs[tokens])
    # the words' logits lie in the order of the vocabulary
    weight, theirs = state_dict["text_label_predictor.weight"], np.arange(20)
    ours = declip.tokens_from_theirs(theirs, 20)
    np.testing.assert_array_equal(weight[theirs], params["mlm_head"]["kernel"].T[ours])
    bias = state_dict["text_label_predictor.bias"]
    np.testing.assert_array_equal(bias[theirs], params["mlm_head"]["bias"][ours])


def test_names_of_the_heads():
    variables = variables_of(config_of("defilip"))
    params, state_dict = variables["params"], state_dict_of("defilip")
    for name, ours in {
        "projector.linear3.weight": params["projector"]["linear3"]["kernel"].T,
        "projector.bn3.running_mean": variables["batch_stats"]["projector"]["bn3"]["mean"],
        "predictor.layer2.bias": params["predictor"]["linear2"]["bias"],
        "predictor.bn1.weight": params["predictor"]["bn1"]["scale"],
        "text_mapping.weight": params["text_mapping"]["kernel"].T,
        "logit_scale_dense": params["logit_scale_dense"],
    }.items():
        np.testing.assert_array_equal(state_dict[name], ours)


def test_huggingface_has_queries_keys_and_values_apart():
    params = variables_of(config_of("clip", proj_bias=False))["params"]
    state_dict = tables.dump(huggingface.LAYOUT, {"params": params})
    layer = "text_model.encoder.layers.1.self_attn"
    attention = params["text"]["blocks"]["attn"]["in_proj"]
    for number, name in enumerate("qkv"):
        part = slice(24 * number, 24 * (number + 1))
        kernel, bias = attention["kernel"][1][:, part], attention["bias"][1][part]
        np.testing.assert_array_equal(state_dict[f"{layer}.{name}_proj.weight"], kernel.T)
        np.testing.assert_array_equal(state_dict[f"{layer}.{name}_proj.bias"], bias)


def test_variables_without_a_name_are_refused():
    with pytest.raises(ValueError, match="no name for: params/head/kernel"):
        tables.dump(huggingface.LAYOUT, {"params": {"head": {"kernel": np.zeros(3)}}})


def test_names_without_a_counterpart_are_ignored():
    state_dict, head = state_dict_of("slip", "resnet"), "predictor_sim.bn3.running_var"
    extended = state_dict | {
        "visual.bn1.num_batches_tracked": np.array(3),
        "visual.fc.weight": np.zeros((16, 2048), np.float32),
        head: np.ones(16, np.float32),
    }
    table = declip.layout("resnet", "slip")
    assert_same(tables.load(table, extended), tables.load(table, state_dict))


# --- what a file holds ----------------------------------------------------------------------------


def test_a_file_tells_its_layout_and_its_model(layout):
    format, method, variables, table = layout
    arrays = tables.dump(table, variables)
    if format == "openai":
        arrays |= {name: np.array(3) for name in pretrained.openai.SIZES}
    same = format in ("alip", "open_clip") and "text_projection" in arrays
    read = pretrained.of_arrays(arrays)
    assert read.format == ("" if same else format)
    assert read.method == (method if format == "declip" else "clip")
    if same:
        assert pretrained.of_arrays(arrays, format=format).format == format
        assert pretrained.of_arrays(arrays, format="alip").method == "alip"
    assert_same(read.variables, variables)
    kind = "resnet" if "conv3" in variables["params"]["image"] else "vit"
    expected = config_of(method, kind, "bias" in variables["params"]["text"]["proj"]).model
    # Heads are no shape: a head for each 64 channels is assumed, and told.
    image, text = sections(expected)
    assert read.model["image"] | {"heads": image.heads} == image.as_dict()
    assert read.model["text"] | {"heads": 3, "eot_id": 18} == text.as_dict()
    assert read.model["embed_dim"] == 16
    known = {"declip": "quick_gelu", "openai": "quick_gelu"}.get(format)
    assert read.model["activation"] == known
    assert read.unknown == tuple(n for n in UNKNOWN if not (known and n == "activation"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(prefix):
    state_dict = state_dict_of()
    wrapped = {prefix + name: array for name, array in state_dict.items()}
    assert reading.strip_prefixes(wrapped).keys() == state_dict.keys()
    some = dict(list(wrapped.items())[:3]) | {"other": 1}
    assert reading.strip_prefixes(some) == some


def test_the_text_tower_may_lie_deeper():
    table = pretrained.layout_of("open_clip", "vit")
    variables = variables_of(config_of("clip", proj_bias=False))
    state_dict = tables.dump(table, variables)
    text = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
    deeper = {("text." if n.startswith(text) else "") + n: x for n, x in state_dict.items()}
    assert deeper.keys() != state_dict.keys()
    assert_same(pretrained.of_arrays(deeper).variables, variables)


@pytest.mark.parametrize("embed_dim, kind", [(3072, "vit"), (1024, "resnet")])
def test_embeddings_of_the_88m_models(embed_dim, kind):
    config = config_of("declip", kind)
    config.model.embed_dim = embed_dim
    variables = variables_of(config)
    read = pretrained.of_arrays(tables.dump(declip.layout(kind, "declip"), variables))
    assert (read.model["embed_dim"], read.method) == (embed_dim, "declip")
    taken, notes = fit(read, variables, config.model)
    assert_same(taken, variables)
    assert not [note for note in notes if "anew" in note or "left" in note]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_load_as_float32(dtype):
    state_dict = {name: value.astype(dtype) for name, value in state_dict_of().items()}
    variables = pretrained.of_arrays(state_dict).variables
    expected = variables_of(config_of("declip"))
    assert_same(variables, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), expected))


def test_everything_that_does_not_fit_is_listed_at_once():
    state_dict = state_dict_of()
    del state_dict["encode_text.transformer.resblocks.1.ln_2.bias"]
    del state_dict["encode_text.transformer.resblocks.0.attn.in_proj_weight"]
    state_dict["nn_replacer.bank"] = np.zeros((2, 2), np.float32)
    state_dict["encode_text.ln_final.bias"] = np.zeros(24, np.int8)
    state_dict["logit_scale"] = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError) as error:
        pretrained.of_arrays(state_dict)
    for part in (
        "missing: encode_text.transformer.resblocks.0.attn.in_proj_weight, "
        "encode_text.transformer.resblocks.1.ln_2.bias\n",
        "unexpected: nn_replacer.bank\n",
        "encode_text.ln_final.bias has type int8, expected floating point",
        "logit_scale has shape (2, 3), which does not fit",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name, shape", [("ln_final.weight", (7,)), ("ln_final.bias", None)])
def test_towers_must_be_whole(name, shape):
    state_dict = state_dict_of()
    if shape:
        state_dict[f"encode_text.{name}"] = np.zeros(shape, np.float32)
        message = r"encode_text.ln_final.weight has shape \(7,\), expected \(24,\)"
    else:
        del state_dict[f"encode_text.{name}"]
        message = f"missing: encode_text.{name}"
    with pytest.raises(ValueError, match=message):
        pretrained.of_arrays(state_dict)


def test_other_models_are_refused():
    bert = {"embeddings.word_embeddings.weight": np.zeros((3, 4), np.float32)}
    with pytest.raises(ValueError, match="no CLIP model of a known layout .*embeddings.word_embe"):
        pretrained.of_arrays(bert)
    siglip = state_dict_of("alip", format="alip") | {"logit_bias": np.zeros((), np.float32)}
    with pytest.raises(ValueError, match="unexpected: logit_bias"):
        pretrained.of_arrays(siglip, format="alip")
    with pytest.raises(ValueError, match="names are those of declip, not of 'huggingface'"):
        pretrained.of_arrays(state_dict_of(), format="huggingface")
    no_patches = {n: x for n, x in state_dict_of().items() if n != "visual.conv1.weight"}
    with pytest.raises(ValueError, match="missing: visual.conv1.weight"):
        pretrained.of_arrays(no_patches)


@pytest.mark.parametrize("kind", IMAGES)
def test_configurations_beside_the_weights_are_heeded(kind):
    config = config_of("clip", kind, proj_bias=False)
    for activation in ("gelu", "quick_gelu"):
        config.model.activation = activation
        sizes = model_of(config).model
        if kind == "vit":
            found = huggingface.from_config(huggingface.to_config(sizes))
            assert found["activation"] == activation and found["text"]["eot_id"] == 18
            assert (found["image"]["heads"], found["text"]["heads"]) == (2, 3)
        file = json.loads(json.dumps(open_clip.to_config(sizes, (0, 0, 0), (1, 1, 1))))
        found = open_clip.from_config(file)
        assert found["activation"] == activation
        heads = IMAGES[kind]["heads"]
        assert (found["image"]["heads"], found["text"]["heads"]) == (heads, 3)


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("vision_cfg", "timm_model_name", "vit_base"),
        ("vision_cfg", "no_ln_pre", True),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "hf_model_name", "roberta"),
        ("text_cfg", "from_the_future", 1),
    ],
)
def test_architectures_of_open_clip_that_are_not_ours_are_refused(section, field, value):
    config = open_clip.to_config(model_of(config_of("clip")).model, (0, 0, 0), (1, 1, 1))
    config["model_cfg"][section][field] = value
    with pytest.raises(ValueError, match=f"{section}.{field}={value!r}"):
        open_clip.from_config(config)


def test_architectures_of_huggingface_that_are_not_ours_are_refused():
    def refused(message, **changes):
        config = huggingface.to_config(model_of(config_of("clip")).model)
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            (config[section] if section else config)[field] = value
        with pytest.raises(ValueError, match=message):
            huggingface.from_config(config)

    refused("model_type='siglip'", model_type="siglip")
    refused(
        "text_config.layer_norm_eps=1e-06, our LayerNorm has 1e-5", text_config__layer_norm_eps=1e-6
    )
    refused("'gelu' for images and 'quick_gelu' for texts", vision_config__hidden_act="gelu")
    # An old file has 2 for the end token: the largest id is then meant.
    config = huggingface.to_config(model_of(config_of("clip")).model)
    assert config["text_config"]["bos_token_id"] == 17
    config["text_config"]["eos_token_id"] = 2
    assert huggingface.from_config(config)["text"]["eot_id"] is None


# --- into a run -----------------------------------------------------------------------------------


def test_heads_are_taken_whole_or_not_at_all():
    like = shapes_of(config_of("defilip").to_json_best_effort())
    read = pretrained.of_arrays(state_dict_of("declip"))
    taken, notes = fit(read, like, config_of("defilip").model)
    assert_same(taken, variables_of(config_of("declip")))
    assert "not in it, start anew: image_mapping, logit_scale_dense, text_mapping" in notes
    like = shapes_of(config_of("clip").to_json_best_effort())
    taken, notes = fit(read, like, config_of("clip").model)
    assert sorted(taken["params"]) == ["image", "logit_scale", "text"]
    assert "left out: mlm_head, predictor, projector" in notes

    config = config_of("defilip")
    config.model.heads.projector = 7
    with pytest.raises(ValueError, match=r"projector.bn3.bias has shape \(32,\), expected \(7,\)"):
        fit(read, shapes_of(config.to_json_best_effort()), config.model)


@pytest.mark.parametrize("lacks", ["bn2.bias", "bn1.running_var", "linear2.weight", "linear1"])
def test_half_a_head_is_refused(lacks):
    part = {n: x for n, x in state_dict_of().items() if not n.startswith(f"projector.{lacks}")}
    with pytest.raises(ValueError, match=f"missing: projector.{lacks}"):
        pretrained.of_arrays(part)


def test_another_architecture_is_told_by_field():
    read = pretrained.of_arrays(state_dict_of())
    config = config_of("declip")
    config.model.image.update(layers=2, width=64, resolution=24)
    config.model.text.proj_bias = False
    with pytest.raises(ValueError) as error:
        fit(read, variables_of(config), config.model)
    for line in (
        "model.image.layers: 3 in it, 2 in the configuration: set config.model.image.layers=3",
        "model.image.width: 32 in it, 64 in the configuration",
        "model.text.proj_bias: True in it, False in the configuration",
        "set config.model.image.resolution=16, or config.init_resize=True",
    ):
        assert line in str(error.value)


def test_a_missing_row_of_tokens_is_new():
    config = config_of("clip", proj_bias=False)
    variables = variables_of(config)
    state_dict = tables.dump(pretrained.layout_of("openai", "vit"), variables)
    state_dict["token_embedding.weight"] = state_dict["token_embedding.weight"][:-1]
    read = pretrained.of_arrays(state_dict)
    assert (read.model["text"]["vocab_size"], read.model["text"]["eot_id"]) == (19, 18)
    taken, notes = fit(read, variables, config.model)
    table = taken["params"]["text"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table, state_dict["token_embedding.weight"])
    assert any("tokens 19 … 19 are not in it" in note for note in notes)
    assert any("taken from the configuration: image.heads=2" in note for note in notes)


@pytest.mark.parametrize("kind", IMAGES)
def test_positions_are_resized_on_request(kind):
    config = config_of("clip", kind)
    state_dict = state_dict_of("clip", kind)
    # A map that is linear in the place stays so, off the edges.
    name = (
        "visual.positional_embedding" if kind == "vit" else "visual.attnpool.positional_embedding"
    )
    width = state_dict[name].shape[1]
    plane = np.add.outer(10.0 * np.arange(2), np.arange(2.0)).reshape(4, 1) * np.ones(width)
    first = np.full((1, width), 7.0)
    state_dict[name] = np.concatenate([first, plane]).astype(np.float32)
    step = 8 if kind == "vit" else 32
    config.model.image.resolution = 4 * step
    config.model.text.context = 6
    read = pretrained.of_arrays(state_dict)
    taken, notes = fit(read, variables_of(config), config.model, resize=True)
    image = taken["params"]["image"]
    positions = (image if kind == "vit" else image["attnpool"])["positional_embedding"]
    assert positions.shape == (17, width)
    np.testing.assert_array_equal(positions[0], first[0])
    grid = positions[1:].reshape(4, 4, width)
    np.testing.assert_allclose(grid.mean(axis=(0, 1)), 5.5, rtol=1e-5)
    assert (np.diff(grid, axis=0) > 0).all() and (np.diff(grid, axis=1) > 0).all()
    text = taken["params"]["text"]["positional_embedding"]
    np.testing.assert_array_equal(text, state_dict["encode_text.positional_embedding"][:6])
    assert [n for n in notes if "2×2 patches were interpolated to 4×4" in n]
    assert [n for n in notes if "positions of 8 tokens were cut to 6" in n]

    longer, notes = resized(read, 2 * step, 15)
    text = longer.variables["params"]["text"]["positional_embedding"]
    before = state_dict["encode_text.positional_embedding"]
    assert text.shape == (15, 24) and notes == ["positions of 8 tokens were interpolated to 15"]
    np.testing.assert_allclose(text[7], (before[3] + before[4]) / 2, atol=1e-6)  # the middle
    for size, context, message in ((2 * step + 1, 8, "no multiple"), (2 * step, 2, "at least 3")):
        with pytest.raises(ValueError, match=message):
            resized(read, size, context)


# --- into files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("format", pretrained.FORMATS)
def test_what_is_written_is_read_again_as_it_was(format, kind, tmp_path):
    if (format, kind) == ("huggingface", "resnet"):
        return
    config = config_of("declip" if format == "declip" else "clip", kind, format == "declip")
    config.model.activation = pretrained.ACTIVATIONS.get(format, "gelu")
    config.model.image.width = 64
    config.model.image.heads = 32 if kind == "resnet" else 1
    if kind == "resnet":
        config.model.image.bn_group_size = 4  # of training alone: it goes nowhere
    config.model.text.update(width=64, heads=1)
    model = model_of(config)
    exporting.export(model, format, tmp_path / "out", {"step": 3})
    read = trained.complete(trained.read(tmp_path / "out"))
    assert_same(read.variables, model.variables)
    if kind == "resnet":
        model.model["image"]["bn_group_size"] = 0
    assert read.model == model.model and read.unknown == ()
    assert read.format == format
    assert (read.mean, read.std, read.short_side) == (model.mean, model.std, model.short_side)
    # Without our notes, what the libraries' own files tell is the same.
    (tmp_path / "out" / "declip_jax.json").unlink()
    read = trained.read(tmp_path / "out", format if format == "alip" else "")
    assert_same(read.variables, model.variables)
    known = format in ("open_clip", "huggingface")
    assert (read.unknown == ()) == known and read.format == format
    if known:
        assert (read.mean, read.std) == (model.mean, model.std)
        # That the end token is not the last, only Transformers' file tells.
        eot_id = 18 if format == "huggingface" else 19
        text = {**model.model["text"], "eot_id": eot_id}
        assert read.model == {**model.model, "text": text}


@pytest.mark.parametrize("format", ["huggingface", "openai"])
def test_a_bias_moves_into_the_layernorm_where_there_is_no_place_for_it(format):
    config = config_of("clip")
    config.model.embed_dim = 20
    config.model.image.update(width=64, heads=1)
    config.model.text.update(width=64, heads=1)
    model = model_of(config)
    adapted, notes = writing.adapt(model, format)
    assert any("ln_final.bias" in note for note in notes)
    assert "bias" not in adapted.variables["params"]["text"]["proj"]
    assert adapted.model["text"]["proj_bias"] is False and model.model["text"]["proj_bias"] is True
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    tokens = np.array([[17, 3, 18, 0], [17, 3, 4, 18]], np.int32)
    one, other = (verify.ours(m, pixels, tokens) for m in (model, adapted))
    np.testing.assert_allclose(one.text, other.text, atol=1e-5)
    np.testing.assert_array_equal(one.image, other.image)
    # A projection into more dimensions than there are does not reach every bias.
    config.model.embed_dim = 128
    with pytest.raises(ValueError, match="does not reach it. open_clip's format has one"):
        writing.adapt(model_of(config), format)


def test_what_a_format_would_compute_otherwise_is_refused():
    def refused(format, config, *messages):
        with pytest.raises(ValueError) as error:
            writing.adapt(model_of(config), format)
        for message in messages:
            assert message in str(error.value)

    config = config_of("clip", "resnet", proj_bias=False)
    refused("huggingface", config, "there is no ResNet there")
    refused("declip", config, "model.text.proj_bias=False")
    config.model.activation = "gelu"
    config.model.text.proj_bias = True
    refused("declip", config, "model.activation='gelu', there it is 'quick_gelu'")
    refused("openai", config, "model.activation='gelu'", "model.text.heads=3")
    config.model.text.vocab_size = 30
    config.model.activation = "quick_gelu"
    refused("declip", config, "vocab_size=30")
    refused("alip", config, "there it is 'gelu'")


@pytest.mark.parametrize("format", pretrained.FORMATS)
def test_options_of_the_towers_are_refused_by_field(format):
    config = config_of("clip")
    config.model.image = dict(IMAGES["vit"], pooling="mean", positions="sincos2d")
    with pytest.raises(ValueError) as error:
        writing.adapt(model_of(config), format)
    for message in (
        f"cannot be written in the format {format!r}",
        "config.model.image.pooling='mean', there it is 'class_token'",
        "config.model.image.positions='sincos2d', there it is 'learned'",
    ):
        assert message in str(error.value)


def test_options_of_training_alone_go_nowhere():
    config = config_of("clip")
    config.model.image = dict(IMAGES["vit"], patch_dropout=0.5)
    model = model_of(config)
    adapted, _ = writing.adapt(model, "open_clip")
    assert_same(adapted.variables, model.variables)
    config.model.image.patch_dropout = 0.25
    fit(model, shapes_of(config.to_json_best_effort()), config.model)


def test_a_model_with_other_options_is_another_model():
    config = config_of("clip")
    model = model_of(config)
    config.model.image = dict(IMAGES["vit"], pooling="attention", positions="sincos2d")
    with pytest.raises(ValueError, match="image.pooling: 'class_token' in it, 'attention' in the"):
        fit(model, shapes_of(config.to_json_best_effort()), config.model)
    # Of a run before there were options nothing is told of them: they are what they were.
    sizes = {**model.model, "image": IMAGES["vit"]}
    before = model._replace(model=sizes)
    assert before.digest() == model.digest() != model_of(config).digest()
    assert fit(before, shapes_of(config_of("clip").to_json_best_effort()), config_of("clip").model)
    # Fixed positions are those of any resolution.
    fitted, notes = resized(model_of(config), 24, 8)
    assert notes == [] and fitted.model["image"]["resolution"] == 24
    assert_same(fitted.variables, model_of(config).variables)


def test_towers_are_recognized_by_their_parameters():
    for options in (dict(pooling="mean"), dict(pooling="attention", positions="sincos2d")):
        config = config_of("clip")
        config.model.image = dict(IMAGES["vit"], **options)
        image = infer(variables_of(config), "declip_jax")["image"]
        assert options.items() <= image.items()
    for kind, layer in (("vit", "patch_embed"), ("resnet", "conv1")):
        variables = variables_of(config_of("clip", kind))
        assert infer(variables, "declip_jax")["image"]["kind"] == kind
        del variables["params"]["image"][layer]
        with pytest.raises(ValueError, match="no array is image/patch_embed/kernel or image/conv1"):
            infer(variables, "declip_jax")


@pytest.mark.parametrize("name", ["class_embedding", "positional_embedding", "ln_pre.weight"])
def test_an_array_that_a_file_lacks_is_no_option(name):
    state_dict = {n: x for n, x in state_dict_of().items() if n != f"visual.{name}"}
    with pytest.raises(ValueError, match=f"missing: visual.{name}$"):
        pretrained.of_arrays(state_dict)


def test_a_bias_of_the_logits_is_open_clip_s_alone(tmp_path):
    config = config_of("clip")
    config.model.init_logit_bias = -10.0
    model = model_of(config)
    bias = model.variables["params"]["logit_bias"]
    for format in {*pretrained.FORMATS} - {"open_clip"}:
        with pytest.raises(ValueError, match="config.model.init_logit_bias is set, there logits"):
            writing.adapt(model, format)
    exporting.export(model, "open_clip", tmp_path / "out", {})
    file = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert file["model_cfg"]["init_logit_bias"] == float(bias)
    (tmp_path / "out" / "declip_jax.json").unlink()
    read = trained.read(tmp_path / "out")
    assert_same(read.variables, model.variables)
    # It is taken if the run has one, as a head is.
    taken, _ = fit(read, shapes_of(config.to_json_best_effort()), with_heads_of(read, config))
    assert taken["params"]["logit_bias"] == bias
    config = config_of("clip")
    like = shapes_of(config.to_json_best_effort())
    taken, notes = fit(read, like, with_heads_of(read, config))
    assert "logit_bias" not in taken["params"] and "left out: logit_bias" in notes
    # Without a configuration beside it the array tells whose file it is.
    arrays = reading.read(tmp_path / "out").arrays
    assert pretrained.of_arrays(dict(arrays)).format == "open_clip"
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    tokens = np.array([[17, 3, 18, 0], [17, 3, 4, 18]], np.int32)
    scale = np.exp(model.variables["params"]["logit_scale"])
    found = verify.ours(model, pixels, tokens)
    np.testing.assert_allclose(found.logits, scale * found.image @ found.text.T + bias, rtol=1e-5)


def with_heads_of(read, config):
    """The configuration's model with what the file tells of the end token."""
    config.model.text.eot_id = read.model["text"]["eot_id"]
    return config.model


def test_only_declip_s_format_has_the_heads():
    model = model_of(config_of("declip"))
    adapted, notes = writing.adapt(model, "open_clip")
    assert sorted(adapted.variables["params"]) == ["image", "logit_scale", "text"]
    assert "batch_stats" not in adapted.variables  # those of the heads
    assert any("mlm_head, predictor, projector" in note for note in notes)
    # Nor does open_clip resize to more than the crop, as this run's evaluation does.
    assert any("resizes the short side to 18 pixels" in note for note in notes)
    adapted, notes = writing.adapt(model, "declip")
    assert_same(adapted.variables, model.variables)
    assert notes == []


def test_ids_beyond_the_end_token_s():
    """Of a vocabulary that is not OpenAI's: no tokenizer, and no reading at the largest id."""
    config = config_of("clip", proj_bias=False)
    config.model.text.vocab_size = 30
    model = model_of(config)
    with pytest.raises(ValueError, match="config.model.text.eot_id=18 of text.vocab_size=30"):
        writing.adapt(model, "open_clip")
    _, notes = writing.adapt(model, "huggingface")
    assert "the tokenizer stays behind: the vocabulary is another one" in notes


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    model = model_of(config_of("clip"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("five years")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"{name} is not empty: nothing was written"):
            exporting.export(model, "open_clip", tmp_path / name, {})
    assert (tmp_path / "full" / "thesis.txt").read_text() == "five years"
    (tmp_path / "empty").mkdir()
    exporting.export(model, "open_clip", tmp_path / "empty", {})
    assert len(list((tmp_path / "empty").iterdir())) == 3

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(writing, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        exporting.export(model, "open_clip", tmp_path / "half", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


# --- bad files ------------------------------------------------------------------------------------


def save(path, arrays):
    safetensors.numpy.save_file(arrays, path)
    return path


def test_bad_files_are_refused_by_name(tmp_path):
    good = save(tmp_path / "good.safetensors", state_dict_of())
    assert reading.read(good).path == good

    def refused(name, message, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            trained.read(tmp_path / name)
        assert name in str(error.value)

    data = good.read_bytes()
    refused("absent", "does not exist")
    refused("cut.safetensors", "is damaged", data[: len(data) // 2])
    refused("header.safetensors", "is damaged", data[:100])
    refused("empty.safetensors", "no file of weights", b"")
    refused("noise.bin", "no file of weights", bytes(range(256)))
    refused("zip.pt", "is damaged", b"PK\x03\x04" + bytes(100))
    none = save(tmp_path / "none.safetensors", {})
    refused(none.name, "holds no arrays")
    (tmp_path / "bare").mkdir()
    refused("bare", "must hold one file of weights .*found none")
    for name in ("a.safetensors", "b.pt"):
        (tmp_path / "bare" / name).write_bytes(b"x")
    refused("bare", r"found 2 \(a.safetensors, b.pt\): name one")
    whole = {name: array.astype(np.int32) for name, array in state_dict_of().items()}
    save(tmp_path / "int.safetensors", whole)
    refused("int.safetensors", "logit_scale has type int32, expected floating point")


def test_a_folder_s_known_file_is_taken_and_damaged_json_is_named(tmp_path):
    save(tmp_path / "other.safetensors", {"x": np.zeros(1, np.float32)})
    save(tmp_path / "model.safetensors", state_dict_of())
    assert trained.read(tmp_path).method == "declip"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        trained.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        trained.read(tmp_path)


BAD_JSON = {
    "open_clip_config.json": [
        {},
        {"model_cfg": {"vision_cfg": None, "text_cfg": {}}},
        {"model_cfg": {"vision_cfg": {"head_width": 0}, "text_cfg": {}}},
        {"model_cfg": {"vision_cfg": {"width": 64}, "text_cfg": {}}},
        {"preprocess_cfg": {"mean": 0.5}},
        {"preprocess_cfg": {"mean": [0.5], "std": [1, 1, 1]}},
    ],
    "config.json": [
        {"vision_config": None},
        {"text_config": {"eos_token_id": [97]}},
        {"projection_dim": 99},
        {"text_config": {"num_hidden_layers": 7}},
    ],
    "preprocessor_config.json": [{"image_mean": 1.0}, {"size": "large"}],
    "declip_jax.json": [
        {},
        {"model": {"embed_dim": 99}, "preprocess": {}},
        {"model": {}, "preprocess": {"mean": [1, 2, 3], "std": [1, 1, 1], "short_side": 3}},
    ],
}


@pytest.mark.parametrize("name, changes", [(n, c) for n in BAD_JSON for c in BAD_JSON[n]])
def test_json_that_does_not_fit_is_named(name, changes, tmp_path):
    format = "open_clip" if name == "open_clip_config.json" else "huggingface"
    exporting.export(model_of(config_of("clip", proj_bias=False)), format, tmp_path / "out", {})
    if name != "declip_jax.json":
        (tmp_path / "out" / "declip_jax.json").unlink()
    trained.read(tmp_path / "out")
    file = tmp_path / "out" / name
    before = json.loads(file.read_text()) if changes and name != "declip_jax.json" else {}
    for section, value in changes.items():
        nested = isinstance(value, dict) and section in before
        before[section] = {**before[section], **value} if nested else value
    file.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=name):
        trained.read(tmp_path / "out")


def test_notes_are_of_the_file_they_name(tmp_path):
    """Another file beside an exported one is not read by its notes."""
    config = config_of("clip", proj_bias=False)
    exporting.export(model_of(config), "huggingface", tmp_path / "out", {})
    other = save(tmp_path / "out" / "other.safetensors", state_dict_of())
    assert trained.read(other).format == "declip" and trained.read(other).mean is None
    assert trained.read(tmp_path / "out").format == "huggingface"


def test_what_a_file_wants_of_images_and_we_do_otherwise_is_told():
    config = {
        "size": {"height": 9, "width": 9},
        "crop_size": 8,
        "resample": 2,
        "do_normalize": False,
    }
    found, notes = huggingface.preprocessing(config, 16)
    assert found == {"mean": None, "std": None, "short_side": 16}
    for part in ("size={'height': 9", "crop_size=8", "resample=2", "do_normalize=False"):
        assert any(part in note for note in notes)
    config = {"image_mean": [1, 2, 3], "size": {"shortest_edge": 48}, "crop_size": {"height": 16}}
    assert huggingface.preprocessing(config, 16) == (
        {"mean": [1, 2, 3], "std": None, "short_side": 48},
        (),
    )
    found, notes = huggingface.preprocessing({"size": 9}, 16)
    assert found["short_side"] == 16 and "size=9 is below the crop" in notes[0]
    config = {"resize_mode": "squash", "interpolation": "bilinear", "size": [32, 32]}
    found, notes = open_clip.preprocessing(config, 16)
    for part in ("resize_mode='squash'", "interpolation='bilinear'", "size=[32, 32]"):
        assert any(part in note for note in notes)
    assert open_clip.preprocessing({"mean": [1, 2, 3], "size": 16}, 16)[1] == ()


def test_names_that_would_take_the_memory_are_refused():
    huge = "encode_text.transformer.resblocks.20000000.ln_1.weight"
    with pytest.raises(ValueError, match=f"unexpected: {huge}"):
        pretrained.of_arrays(state_dict_of() | {huge: np.zeros(24, np.float32)})
    twice = "encode_text.transformer.resblocks.00.ln_1.weight"
    with pytest.raises(ValueError, match=f"unexpected: {twice}"):
        pretrained.of_arrays(state_dict_of() | {twice: np.zeros(24, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_no_numbers_are_named(value):
    state_dict = state_dict_of()
    name = "encode_text.transformer.resblocks.1.ln_1.weight"
    state_dict[name] = np.full(24, value)
    with pytest.raises(ValueError, match=f"with infinite values or NaN: {name}$"):
        pretrained.of_arrays(state_dict)


def test_a_folder_s_file_is_chosen_by_format_and_shards_are_refused(tmp_path):
    save(tmp_path / "model.safetensors", state_dict_of())
    save(tmp_path / "open_clip_model.safetensors", state_dict_of("alip", format="alip"))
    assert trained.read(tmp_path).format == "declip"
    assert trained.read(tmp_path, "open_clip").format == "open_clip"
    (tmp_path / "in_shards").mkdir()
    (tmp_path / "in_shards" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weights in several files"):
        trained.read(tmp_path / "in_shards")


def test_an_unknown_activation_is_asked_for(tmp_path):
    path = save(tmp_path / "w.safetensors", state_dict_of("alip", format="alip"))
    with pytest.raises(ValueError, match="does not tell the activation function"):
        trained.complete(trained.read(path))
    assert trained.complete(trained.read(path, "alip")).model["activation"] == "gelu"
    model = trained.complete(trained.read(path, "openai"))
    assert model.model["activation"] == "quick_gelu" and trained.protocol(model) == "openai"
    path = save(tmp_path / "d.safetensors", state_dict_of())
    assert trained.protocol(trained.complete(trained.read(path))) == "declip"
    model = trained.complete(trained.read(path))
    assert trained.protocol(model._replace(std=(1, 1, 1))) == "weights"
    assert trained.protocol(model._replace(std=(1, 1, 1), short_side=16)) == "train"
    assert model.digest() != model._replace(std=(1, 1, 1)).digest()
