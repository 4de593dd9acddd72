import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from configs import common
from declip_jax.models import transformer
from declip_jax.models.batchnorm import BatchNorm
from declip_jax.models.heads import Mlp, linear
from declip_jax.models.text import real_tokens
from declip_jax.models.tower import Shapes
from declip_jax.models.two_towers import Model, TwoTowers, two_towers
from declip_jax.models.variants import variant
from declip_jax.models.vit import ViT, sincos2d
from declip_jax.parallel.rules import SHARDING_RULES, match

EOT, MASK = 18, 19

VIT = dict(kind="vit", resolution=16, patch=8, width=32, layers=3, heads=2)
RESNET = dict(kind="resnet", resolution=32, width=8, layers=(1, 1, 1, 1), heads=4, bn_group_size=0)

HEADS = dict(projector=8, predictor=8, simclr_hidden=8, simclr=8, dense=8)


def config(image=VIT, text=None, **fields):
    text = dict(
        vocab_size=20, eot_id=EOT, context=8, width=24, layers=2, heads=3, proj_bias=True
    ) | (text or {})
    return ConfigDict(
        dict(
            embed_dim=16,
            activation="quick_gelu",
            dtype="float32",
            scan=True,
            remat="none",
            attention="xla",
            image=image,
            text=text,
            heads=HEADS,
            init_logit_scale=math.log(1 / 0.07),
            init_logit_bias=None,
        )
        | fields
    )


def images(batch, resolution=16, views=1):
    shape = (batch, views, resolution, resolution, 3)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


TOKENS = np.array([[16, 3, 1, 4, EOT, 0, 0, 0], [16, 5, MASK, 2, 6, 7, EOT, 0]])


def both(model, images, tokens):
    return model.encode_image(images), model.encode_text(tokens)


def initialize(model):
    key = jax.random.key(0, impl="rbg")  # compiles in half the time
    init = functools.partial(model.init, method=both)
    return jax.jit(init)(key, images(2, model.image.config.resolution), TOKENS[:, None])


def drawn(tree):
    """Arrays for ShapeDtypeStructs, without zeros and without compiling `init`."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(leaf.dtype), tree
    )


def drawn_variables(model):
    return drawn(shapes(model))


def named(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes(model):
    size = model.image.config.resolution
    return jax.eval_shape(
        functools.partial(model.init, method=both),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, model.text.config.context), jnp.int32),
    )


def check_std(params, expected):
    """Zero means, and standard deviations as expected to within five standard errors."""
    for name, std in expected.items():
        values = np.asarray(params[name])
        tolerance = 5 / np.sqrt(2 * values.size)
        assert values.std() == pytest.approx(std, rel=tolerance), name
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size), name


def test_initialization_of_the_transformers():
    w, layers, text_w, text_layers = 96, 3, 80, 5
    model = two_towers(
        config(
            image=VIT | dict(width=w, layers=layers),
            text=dict(width=text_w, layers=text_layers, heads=2, vocab_size=200),
            embed_dim=64,
        )
    )
    params = named(initialize(model)["params"])

    def uniform(fan_in):
        return (3 * fan_in) ** -0.5

    def block(tower, w, layers):
        residual = w**-0.5 * (2 * layers) ** -0.5
        return {
            f"{tower}/blocks/attn/in_proj/kernel": w**-0.5,
            f"{tower}/blocks/attn/out_proj/kernel": residual,
            f"{tower}/blocks/mlp/c_fc/kernel": (2 * w) ** -0.5,
            f"{tower}/blocks/mlp/c_fc/bias": uniform(w),
            f"{tower}/blocks/mlp/c_proj/kernel": residual,
            f"{tower}/blocks/mlp/c_proj/bias": uniform(4 * w),
        }

    random = {
        "image/patch_embed/kernel": uniform(3 * 8 * 8),
        "image/class_embedding": w**-0.5,
        "image/positional_embedding": w**-0.5,
        "image/proj/kernel": w**-0.5,
        **block("image", w, layers),
        "text/token_embedding/embedding": 0.02,
        "text/positional_embedding": 0.01,
        "text/proj/kernel": text_w**-0.5,
        "text/proj/bias": uniform(text_w),
        **block("text", text_w, text_layers),
    }
    check_std(params, random)
    assert params["logit_scale"] == pytest.approx(np.log(1 / 0.07))
    for name in set(params) - set(random) - {"logit_scale"}:  # norms, attention biases
        assert (params[name] == name.endswith("scale")).all(), name
    # layers differ, and are stacked on axis 0
    kernel = params["image/blocks/mlp/c_fc/kernel"]
    assert kernel.shape == (layers, w, 4 * w)
    assert not jnp.allclose(kernel[0], kernel[1])


def test_initialization_of_the_resnet():
    image = RESNET | dict(width=16)
    variables = initialize(two_towers(config(image=image)))
    params, channels = named(variables["params"]["image"]), 32 * 16
    random = {
        name: np.prod(leaf.shape[:-1]) ** -0.5 / np.sqrt(3)
        for name, leaf in params.items()
        if name.endswith("kernel") and "attnpool" not in name
    }
    for projection in ("q_proj", "k_proj", "v_proj", "c_proj"):
        random[f"attnpool/{projection}/kernel"] = channels**-0.5
        random[f"attnpool/{projection}/bias"] = (3 * channels) ** -0.5
    random["attnpool/positional_embedding"] = channels**-0.5
    check_std(params, random)
    for name in set(params) - set(random):  # batch normalization; a block starts as the identity
        one = name.endswith("scale") and not name.endswith("bn3/scale") or name == "bn3/scale"
        assert (params[name] == one).all(), name
    for name, value in named(variables["batch_stats"]).items():
        assert (value == name.endswith("var")).all(), name


@pytest.mark.parametrize(
    "name, count",
    {
        "ViT-B/32": 151_277_313,
        "ViT-B/16": 149_620_737,
        "ViT-L/14": 427_616_513,
        "RN50": 102_007_137,
        "RN101": 119_688_033,
        "RN50x4": 178_300_601,
    }.items(),
)
def test_parameter_counts_are_those_of_openai(name, count):
    model = config(**variant(name))
    model.text.vocab_size = 49408  # no mask token there
    variables = shapes(two_towers(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.mark.parametrize("name", ["ViT-Ti/16", "ViT-S/16", "ViT-S/32", "ViT-L/14-336", "RN50x16"])
def test_variants_fit_together(name):
    model = config(**variant(name))
    variables = shapes(two_towers(model))
    assert variables["params"]["text"]["proj"]["kernel"].shape[1] == model.embed_dim


def test_unknown_variant_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'ViT-B32'.*'ViT-B/32'"):
        variant("ViT-B32")


@pytest.fixture(scope="module")
def stack():
    """x -> (value and gradients) of a stack of blocks, for any scan and remat."""
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)

    def build(scan, remat):
        return transformer.blocks(
            layers=3,
            width=16,
            heads=2,
            causal=True,
            activation="gelu",
            compute=transformer.Compute(jnp.float32, scan, remat, "xla"),
            name=None,
        )

    params = jax.jit(build(True, "none").init)(jax.random.key(0), x)

    def lower(scan, remat):
        def loss(params, x):
            return jnp.sum(jnp.sin(build(scan, remat).apply(params, x)[0]))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x)

    return lower, lambda scan, remat: lower(scan, remat).compile()(params, x)


@pytest.mark.parametrize(
    "scan, remat", [(False, "none"), (True, "dots"), (False, "dots"), (True, "full")]
)
def test_scan_and_remat_leave_values_and_gradients(stack, scan, remat):
    _, run = stack
    assert_close(run(scan, remat), run(True, "none"), rtol=1e-4, atol=1e-5)


def test_scan_and_remat_change_the_program(stack):
    lower, _ = stack
    products = [
        lower(True, remat).as_text().count("dot_general") for remat in ("none", "dots", "full")
    ]
    assert products[0] < products[1] < products[2]
    assert "stablehlo.while" in lower(True, "none").as_text()
    assert "stablehlo.while" not in lower(False, "none").as_text()


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_scan_and_remat_of_the_config_reach_both_towers(scan, remat):
    model = two_towers(config(scan=scan, remat=remat))
    apply = functools.partial(model.apply, method=both)
    program = jax.make_jaxpr(apply)(shapes(model), images(2), TOKENS[:, None])
    loops = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["unroll"] for eqn in loops] == ([1, 1] if scan else [3, 2])
    for eqn in loops:
        inner = {inner.primitive.name for inner in eqn.params["jaxpr"].eqns}
        assert ("remat2" in inner or "checkpoint" in inner) == (remat == "full")


@pytest.fixture(scope="module")
def model_and_variables():
    model = two_towers(config())
    return model, drawn_variables(model)


@functools.partial(jax.jit, static_argnums=0)
def encode_image(model, variables, images):
    """In training mode: features, and the new batch statistics."""
    return model.apply(
        variables, images, True, method=TwoTowers.encode_image, mutable=["batch_stats"]
    )


@functools.partial(jax.jit, static_argnums=0)
def encode_text(model, variables, tokens):
    return model.apply(variables, tokens, method=TwoTowers.encode_text)


def embed(model, variables, tokens):
    """[B, L] -> [B, D]."""
    return encode_text(model, variables, tokens[:, None]).embedding[:, 0]


@functools.partial(jax.jit, static_argnums=0, static_argnames="views")
def train(module, variables, x, **views):
    return module.apply(variables, x, True, **views, mutable=["batch_stats"])


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, other)


def changed(index, value, tokens=TOKENS):
    tokens = tokens.copy()
    tokens[index] = value
    return tokens


def test_text_is_read_at_the_end_token_and_only_from_the_left(model_and_variables):
    expected = embed(*model_and_variables, TOKENS)
    after = embed(*model_and_variables, changed((0, slice(5, None)), [MASK, 9, EOT]))
    np.testing.assert_allclose(after, expected, atol=1e-5)
    before = embed(*model_and_variables, changed((slice(None), 1), 8))
    assert (abs(before - expected).max(axis=1) > 1e-2).all()
    cut = embed(*model_and_variables, TOKENS[:, :7])  # as far as the longest caption
    np.testing.assert_allclose(cut, expected, atol=1e-5)


def test_the_end_token_is_found_by_its_id_else_the_last_position_is_read(model_and_variables):
    model, variables = model_and_variables
    other = two_towers(config(text=dict(eot_id=6)))  # second row: position 4; first row: none
    got = embed(other, variables, TOKENS)
    # the same caption without any end token, cut after that position
    cut = embed(model, variables, TOKENS[1:, :5])
    np.testing.assert_allclose(got[1:], cut, atol=1e-5)
    at_eot = embed(model, variables, TOKENS)
    assert abs(got - at_eot).max(axis=1).min() > 1e-2


def test_text_is_trimmed_without_a_difference():
    model = two_towers(config(text=dict(context=32)))
    variables = drawn_variables(model)
    tokens = np.zeros((3, 32), np.int32)
    for row, end in zip(tokens, (15, 9, 1), strict=True):
        row[:end], row[end] = np.random.default_rng(end).integers(1, 16, end), EOT

    @jax.jit
    def run(tokens):
        def loss(params):
            features = model.apply(
                {"params": params}, tokens[:, None], method=TwoTowers.encode_text
            )
            embedding = features.embedding
            return jnp.sin(embedding).sum(), embedding

        return jax.grad(loss, has_aux=True)(variables["params"])

    gradients, embedding = run(tokens)
    trimmed_gradients, trimmed = run(tokens[:, :16])
    np.testing.assert_allclose(trimmed, embedding, atol=1e-6)
    assert_close(trimmed_gradients["text"], gradients["text"], atol=1e-5)
    positions = gradients["text"]["positional_embedding"]
    assert positions[:16].any(axis=1).all() and not positions[16:].any()


def test_one_column_of_padding_makes_an_odd_context_even():
    model = two_towers(config(text=dict(context=7)))
    variables = drawn_variables(model)
    got, expected = (
        encode_text(model, variables, tokens[:, None]) for tokens in (TOKENS, TOKENS[:, :7])
    )
    np.testing.assert_allclose(got.embedding, expected.embedding, atol=1e-6)
    assert got.words.shape[2] == 8
    np.testing.assert_allclose(got.words[:, :, :7], expected.words, atol=1e-5)


def test_real_tokens_end_with_the_first_end_token():
    rows = np.array([[3, EOT, 0, EOT], [EOT, 1, 2, 3], [1, 2, 3, 4], [1, 2, 0, EOT]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(real_tokens(rows, EOT), expected)
    np.testing.assert_array_equal(real_tokens(rows[:, None], EOT)[:, 0], expected)


@pytest.mark.parametrize("image", [VIT, RESNET], ids=lambda image: image["kind"])
def test_features(image):
    model = two_towers(config(image=image))
    size = image["resolution"]
    (features, texts), _ = jax.eval_shape(
        functools.partial(model.init_with_output, method=both),
        jax.random.key(0),
        jax.ShapeDtypeStruct((4, 3, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((4, 2, 8), jnp.int32),
    )
    cells, width = {"vit": (4, 32), "resnet": (1, 256)}[image["kind"]]
    assert model.image.config.token_width == width
    assert jax.tree.map(jnp.shape, features) == ((4, 3, 16), (4, 3, width), (4, 3, cells, width))
    assert jax.tree.map(jnp.shape, texts) == ((4, 2, 16), (4, 2, 8, 24))


@pytest.mark.parametrize("image", [VIT, RESNET], ids=lambda image: image["kind"])
def test_image_views_in_one_pass_are_those_one_at_a_time(image):
    model = two_towers(config(image=image))
    variables = drawn_variables(model)
    x = images(4, image["resolution"], views=3)
    x = x * np.arange(1, 4)[:, None, None, None] + np.arange(3)[:, None, None, None]
    together, stats = encode_image(model, variables, x)
    apart = []
    for view in range(3):
        features, updated = encode_image(model, variables, x[:, view : view + 1])
        variables = {**variables, **updated}
        apart.append(features)
    expected = jax.tree.map(lambda *views: np.concatenate(views, axis=1), *apart)
    assert_close(together, expected, rtol=1e-3, atol=1e-4)
    # each view updates what the one before left
    assert_close(stats, {name: variables[name] for name in stats}, rtol=1e-4, atol=1e-5)
    # the projection reads what is called pooled
    projection = variables["params"]["image"]
    projection = projection["proj"] if "proj" in projection else projection["attnpool"]["c_proj"]
    embedding = together.pooled @ projection["kernel"] + projection.get("bias", 0)
    np.testing.assert_allclose(together.embedding, embedding, rtol=1e-3, atol=1e-4)


def test_text_views_in_one_pass_are_those_one_at_a_time(model_and_variables):
    together = encode_text(*model_and_variables, TOKENS[None])
    apart = encode_text(*model_and_variables, TOKENS[:, None])
    assert_close(together, jax.tree.map(lambda x: x.swapaxes(0, 1), apart), atol=1e-5)


def test_bfloat16_computes_low_and_keeps_float32_outside(model_and_variables):
    high, variables = model_and_variables
    low = two_towers(config(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(low))} == {jnp.dtype("float32")}
    for encode, x in ((encode_text, TOKENS[:, None]), (encode_image, images(2))):
        got, want = encode(low, variables, x), encode(high, variables, x)
        if encode is encode_image:
            (got, _), (want, _) = got, want
        got, want = got.embedding, want.embedding
        assert got.dtype == jnp.float32
        assert 1e-4 < jnp.linalg.norm(got - want) / jnp.linalg.norm(want) < 0.05


def test_inputs_of_the_wrong_size_are_refused(model_and_variables):
    model, variables = model_and_variables
    with pytest.raises(ValueError, match="24x24 pixels.*resolution=16"):
        encode_image(model, variables, images(1, 24))
    with pytest.raises(ValueError, match="9 tokens.*context=8"):  # padding is for odd contexts
        embed(model, variables, np.zeros((1, 9), np.int32))
    odd = two_towers(config(text=dict(context=7)))
    with pytest.raises(ValueError, match="9 tokens.*context=7"):
        embed(odd, drawn_variables(odd), np.zeros((1, 9), np.int32))
    resnet = two_towers(config(image=RESNET))
    with pytest.raises(ValueError, match="64x64 pixels.*resolution=32"):
        encode_image(resnet, shapes(resnet), images(1, 64))


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_what_cudnn_is_given_is_padded_to_an_even_length(causal, length, monkeypatch):
    x = np.random.default_rng(0).normal(size=(3, 2, length, 2, 4)).astype(np.float32)

    def run(implementation):
        def loss(x):
            y = transformer._attend(*x, causal, implementation)
            return jnp.sin(y).sum(), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
        return y, gradient

    expected = run("xla")
    xla, lengths = jax.nn.dot_product_attention, []

    def cudnn(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(query.shape[1])
        return xla(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    got = run("cudnn")
    assert set(lengths) == {6}
    assert_close(got, expected, atol=1e-6)


def test_cudnn_attention_computes_in_bfloat16_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    two_towers(config(attention="cudnn", dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"model\.attention='cudnn'.*model\.dtype='bfloat16'"):
        two_towers(config(attention="cudnn"))


def test_linear_layers_of_the_heads_start_as_those_of_torch():
    params = linear(300, 200, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 300)))["params"]
    check_std(params, {"kernel": 900**-0.5, "bias": 900**-0.5})
    assert max(abs(x).max() for x in params.values()) <= 300**-0.5


@pytest.mark.parametrize("last_norm", [False, True])
def test_mlp_equals_numpy(last_norm):
    mlp = Mlp((6, 5, 4), last_norm, jnp.float32)
    x = np.random.default_rng(1).normal(size=(7, 2, 3)).astype(np.float32)
    x[:, 1] = 3 * x[:, 1] + 1
    variables = drawn(
        jax.eval_shape(functools.partial(mlp.init, train=False), jax.random.key(0), x)
    )
    expected = []
    for view in np.float64(x).swapaxes(0, 1):
        for n in (1, 2, 3):
            layer = variables["params"][f"linear{n}"]
            view = view @ layer["kernel"] + layer["bias"]
            if n < 3 or last_norm:
                norm = variables["params"][f"bn{n}"]
                view = (view - view.mean(0)) / np.sqrt(view.var(0) + 1e-5)
                view = view * norm["scale"] + norm["bias"]
            if n < 3:
                view = np.maximum(view, 0)
        expected.append(view)
    got, updated = train(mlp, variables, x)
    np.testing.assert_allclose(got, np.stack(expected, axis=1), atol=1e-5)
    assert set(updated["batch_stats"]) == {"bn1", "bn2", "bn3"}.intersection(variables["params"])
    # in evaluation each example is by itself
    variables = {"params": variables["params"], **updated}
    evaluate = jax.jit(functools.partial(mlp.apply, train=False))
    np.testing.assert_allclose(evaluate(variables, x)[:1], evaluate(variables, x[:1]), atol=1e-6)


def test_mlp_computes_low_and_returns_float32():
    mlp = Mlp((6, 4), last_norm=True, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((5, 2, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(mlp.init, train=False), jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(lambda v, x: mlp.apply(v, x, False))(variables, x)
    products = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert [eqn.outvars[0].aval.dtype for eqn in products] == [jnp.bfloat16] * 2
    assert program.out_avals[0].dtype == jnp.float32


BATCH_NORM = {  # of five channels, as it starts
    "params": {"scale": np.ones(5, np.float32), "bias": np.zeros(5, np.float32)},
    "batch_stats": {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)},
}


def test_batch_norm_in_training_and_its_running_statistics():
    x = 3 + 2 * np.random.default_rng(0).normal(size=(6, 2, 2, 5)).astype(np.float32)
    norm, variables = BatchNorm(), BATCH_NORM
    got, updated = train(norm, variables, x)
    mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
    np.testing.assert_allclose(got, (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    unbiased = np.var(x, (0, 1, 2), ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=1e-5)
    # in evaluation the running statistics count, not the batch
    got = norm.apply(variables | updated, x, train=False)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(got, (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5), rtol=1e-4)


def test_batch_norm_groups_are_separate_batches():
    x = np.random.default_rng(0).normal(size=(6, 3, 5)).astype(np.float32)
    x *= np.arange(1, 7)[:, None, None]
    variables = BATCH_NORM
    got, updated = train(BatchNorm(group_size=2), variables, x)
    parts = [train(BatchNorm(), variables, x[start : start + 2]) for start in (0, 2, 4)]
    np.testing.assert_allclose(got, jnp.concatenate([out for out, _ in parts]), atol=1e-5)
    average = jax.tree.map(lambda *stats: sum(stats) / 3, *[stats for _, stats in parts])
    assert_close(updated, average, rtol=1e-5)


@pytest.mark.parametrize("group_size", [0, 2])
def test_batch_norm_takes_views_one_after_the_other(group_size):
    norm = BatchNorm(group_size)
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)  # [B, V, ..., C]
    x = x * np.float32([1, 2, 3])[:, None, None] + np.float32([0, 1, 2])[:, None, None]
    rows = x.reshape(12, 2, 5)  # -> [B * V, ..., C]
    variables = BATCH_NORM
    got, updated = train(norm, variables, rows, views=3)
    for view in range(3):
        expected, stats = train(norm, variables, x[:, view])
        variables = variables | stats
        np.testing.assert_allclose(got.reshape(x.shape)[:, view], expected, atol=1e-5)
    assert_close(updated["batch_stats"], variables["batch_stats"], rtol=1e-5)


def test_batch_norm_refuses_what_has_no_statistics():
    x = np.ones((6, 5), np.float32)
    variables = BATCH_NORM
    with pytest.raises(ValueError, match="bn_group_size=4 does not divide.*6 examples"):
        train(BatchNorm(group_size=4), variables, x)
    with pytest.raises(ValueError, match="bn_group_size=2 does not divide.*3 examples"):
        train(BatchNorm(group_size=2), variables, x, views=2)
    with pytest.raises(ValueError, match="more than one value"):
        train(BatchNorm(group_size=1), variables, x)
    with pytest.raises(ValueError, match="more than one value"):
        train(BatchNorm(), variables, x, views=6)


OPTIONS = {
    "mean": dict(pooling="mean"),
    "attention": dict(pooling="attention"),
    "sincos2d": dict(positions="sincos2d"),
    "mean of fixed positions": dict(pooling="mean", positions="sincos2d"),
    "fewer patches": dict(patch_dropout=0.5),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_change_no_other_parameters(options):
    """And a tower is found again in the shapes of its parameters, but for what is no shape."""
    usual = named(shapes(two_towers(config()))["params"])
    model = two_towers(config(image=VIT | options))
    found = named(shapes(model)["params"])
    gone = {"image/class_embedding"} if "pooling" in options else set()
    gone |= {"image/positional_embedding"} if "positions" in options else set()
    assert usual.keys() - found.keys() == gone
    new = found.keys() - usual.keys()
    assert all(name.startswith("image/map_head/") for name in new)
    assert bool(new) == (options.get("pooling") == "attention")
    changed = {name for name in found.keys() & usual.keys() if found[name] != usual[name]}
    assert changed == {"image/positional_embedding"} - gone if "pooling" in options else not changed
    image = model.image.config
    told = ViT.recognize(Shapes({name: leaf.shape for name, leaf in found.items()}))
    assert (told.pooling, told.positions) == (image.pooling, image.positions)
    assert told.resolution == (224 if "positions" in options else image.resolution)
    # Everything has a rule for its sharding and its decay.
    match(found, SHARDING_RULES, "the rules")
    match(found, common.get_config().optim.decay_rules, "the rules")


def norm_of(params, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_pooling_equals_numpy(pooling):
    model = two_towers(config(image=VIT | dict(pooling=pooling)))
    variables = drawn_variables(model)
    features, _ = encode_image(model, variables, images(3))
    params = jax.tree.map(np.float64, variables["params"]["image"])
    tokens = np.float64(features.tokens[:, 0])
    assert tokens.shape == (3, 4, 32)
    if pooling == "mean":
        pooled = norm_of(params["ln_post"], tokens.mean(1))
    else:
        x, head = norm_of(params["ln_post"], tokens), params["map_head"]
        attn, query = head["attn"], head["query_embedding"]
        query = np.einsum("w,whd->hd", query, attn["query"]["kernel"]) + attn["query"]["bias"]
        key, value = (
            np.einsum("bnw,whd->bnhd", x, attn[name]["kernel"]) + attn[name]["bias"]
            for name in ("key", "value")
        )
        weights = np.exp(np.einsum("hd,bnhd->bhn", query, key) / np.sqrt(16))
        weights /= weights.sum(-1, keepdims=True)
        x = np.einsum("bhn,bnhd,hdw->bw", weights, value, attn["out"]["kernel"])
        x += attn["out"]["bias"]
        mlp = head["mlp"]
        hidden = norm_of(head["ln"], x) @ mlp["c_fc"]["kernel"] + mlp["c_fc"]["bias"]
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        pooled = x + hidden @ mlp["c_proj"]["kernel"] + mlp["c_proj"]["bias"]
    np.testing.assert_allclose(features.pooled[:, 0], pooled, rtol=1e-3, atol=1e-4)
    embedding = pooled @ params["proj"]["kernel"]
    np.testing.assert_allclose(features.embedding[:, 0], embedding, rtol=1e-3, atol=1e-3)


def test_fixed_positions_are_sines_and_cosines_of_column_and_row():
    got = sincos2d(3, 8)
    for row in range(3):
        for column in range(3):
            # the frequencies are 1 and 10,000^(-1/2)
            angles = [(column, column / 100), (row, row / 100)]
            expected = [f(a) for pair in angles for f in (np.sin, np.cos) for a in pair]
            np.testing.assert_allclose(got[3 * row + column], expected, atol=1e-7)


def test_fixed_positions_are_those_of_learned_ones_that_hold_them():
    fixed = two_towers(config(image=VIT | dict(positions="sincos2d")))
    learned, variables = two_towers(config()), drawn_variables(fixed)
    table = np.concatenate([np.zeros((1, 32), np.float32), sincos2d(2, 32)])
    params = variables["params"]
    held = {**params, "image": {**params["image"], "positional_embedding": table}}
    one, _ = encode_image(fixed, variables, images(2))
    other, _ = encode_image(learned, {"params": held}, images(2))
    assert_close(one, other, rtol=1e-5, atol=1e-6)


FEWER = VIT | dict(resolution=32, patch_dropout=0.7)  # 5 of 16 patches


def dropped(model, variables, x, key):
    rngs = {"patch_dropout": key}
    return model.apply(variables, x, True, method=TwoTowers.encode_image, rngs=rngs)


def test_patches_are_left_out_in_training_alone():
    model = two_towers(config(image=FEWER))
    full = two_towers(config(image=FEWER | dict(patch_dropout=0.0)))
    variables, x = drawn_variables(full), images(2, 32, views=3)
    evaluated = jax.jit(functools.partial(model.apply, method=TwoTowers.encode_image))
    expected = jax.jit(functools.partial(full.apply, method=TwoTowers.encode_image))
    assert_close(evaluated(variables, x), expected(variables, x), rtol=0, atol=0)
    with pytest.raises(flax.errors.InvalidRngError, match="patch_dropout"):
        model.apply(variables, x, True, method=TwoTowers.encode_image)
    # Without it no rng is asked for, and the program in training is that of evaluation.
    programs = [
        str(
            jax.make_jaxpr(lambda v, x, t=t: full.apply(v, x, t, method="encode_image"))(
                variables, x
            )
        )
        for t in (True, False)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_the_patches_kept_are_computed_as_if_there_were_no_others(pooling):
    image = FEWER | dict(pooling=pooling, layers=2)
    model = two_towers(config(image=image))
    assert model.image.config.patches_kept == 5
    variables, x = drawn_variables(model), images(2, 32, views=2)
    run = jax.jit(functools.partial(dropped, model))
    got = run(variables, x, jax.random.key(1))
    assert got.tokens.shape == (2, 2, 5, 32)
    assert_close(run(variables, x, jax.random.key(1)), got, rtol=0, atol=0)
    assert abs(run(variables, x, jax.random.key(2)).embedding - got.embedding).max() > 1e-3

    # Of blocks that do nothing the tokens are what goes in: they tell which patches were kept.
    params = variables["params"]["image"]
    still = jax.tree.map(np.zeros_like, {n: params["blocks"][n] for n in ("attn", "mlp")})
    idle = {**params, "blocks": {**params["blocks"], **still}}
    idle = {"params": {**variables["params"], "image": idle}}
    evaluate = functools.partial(model.apply, method=TwoTowers.encode_image)
    all_of_them = evaluate(idle, x).tokens[..., None, :, :]  # [B, V, 1, N, w]
    same = abs(run(idle, x, jax.random.key(1)).tokens[..., None, :] - all_of_them).max(-1) < 1e-6
    kept = same.argmax(-1)  # [B, V, K]
    assert (same.sum(-1) == 1).all() and all(
        len(set(row)) == 5 for row in kept.reshape(4, 5).tolist()
    )
    assert len({tuple(sorted(row)) for row in kept.reshape(4, 5).tolist()}) == 4  # each its own

    # The same through the blocks alone.
    first = int(pooling == "class_token")
    bound = {"params": params["blocks"]}
    stack = transformer.blocks(
        layers=2,
        width=32,
        heads=2,
        causal=False,
        activation="quick_gelu",
        compute=transformer.Compute(jnp.float32, True, "none", "xla"),
        name=None,
    )
    tokens = np.take_along_axis(np.asarray(all_of_them[..., 0, :, :]), kept[..., None], axis=2)
    if first:
        token = params["class_embedding"] + params["positional_embedding"][0]
        token = np.broadcast_to(norm_of(params["ln_pre"], token), (2, 2, 1, 32))
        tokens = np.concatenate([token, tokens], axis=2)
    out, _ = stack.apply(bound, tokens.reshape(4, 5 + first, 32).astype(np.float32))
    np.testing.assert_allclose(got.tokens.reshape(4, 5, 32), out[:, first:], rtol=1e-3, atol=1e-4)


@pytest.mark.mesh
def test_which_patches_are_kept_does_not_depend_on_the_devices():
    model = two_towers(config(image=FEWER))
    variables, x = drawn_variables(model), images(8, 32)
    key, found = jax.random.key(1), []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = jax.sharding.Mesh(np.array(devices), "data")
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        run = jax.jit(
            functools.partial(dropped, model), in_shardings=(everywhere, rows, everywhere)
        )
        found.append(jax.device_get(run(variables, x, key)))
    assert_close(*found, rtol=1e-5, atol=1e-5)


class Counting(transformer.Block):
    """A block that carries more than x, has a field of its own, and gives something out."""

    step: float

    @nn.compact
    def __call__(self, carry, mask):
        x, extra = carry
        gate = self.param("gate", nn.initializers.ones, (1,))
        x, _ = super().__call__(x)
        return (x, {"sum": extra["sum"] + self.step * gate * (x * mask).sum()}), x[0, 0, 0]


@pytest.mark.parametrize("scan, remat", [(True, "none"), (False, "none"), (True, "full")])
def test_a_stack_may_carry_more_than_x(scan, remat):
    def build(block, **fields):
        return transformer.blocks(
            layers=3,
            width=16,
            heads=2,
            causal=True,
            activation="gelu",
            compute=transformer.Compute(jnp.float32, scan, remat, "xla"),
            name=None,
            block=block,
            **fields,
        )

    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    mask = np.arange(5)[:, None] < 3
    stack, carry = build(Counting, step=0.5), (x, {"sum": np.zeros(1, np.float32)})
    params = stack.init(jax.random.key(0), carry, mask)["params"]
    plain = build(transformer.Block)
    expected = named(jax.eval_shape(plain.init, jax.random.key(0), x)["params"])
    assert {n: leaf.shape for n, leaf in named(params).items()} == {
        **{n: leaf.shape for n, leaf in expected.items()},
        "gate": (3, 1),
    }
    (got, extra), first = stack.apply({"params": params}, carry, mask)
    of_blocks = {name: params[name] for name in params if name != "gate"}
    out, _ = plain.apply({"params": of_blocks}, x)
    np.testing.assert_allclose(got, out, atol=1e-6)
    one, total, firsts = x, 0.0, []
    for layer in range(3):
        block = transformer.Block(2, True, 0.1, "gelu", plain.compute)
        one, _ = block.apply({"params": jax.tree.map(lambda p, n=layer: p[n], of_blocks)}, one)
        total += 0.5 * (one * mask).sum()
        firsts.append(one[0, 0, 0])
    np.testing.assert_allclose(extra["sum"], [total], rtol=1e-4)
    np.testing.assert_allclose(first, firsts, rtol=1e-4, atol=1e-6)


def test_logits_have_a_bias_if_it_has_a_start():
    model = two_towers(config(init_logit_scale=np.log(10), init_logit_bias=-10))
    params = initialize(model)["params"]
    assert params["logit_bias"] == -10 and params["logit_scale"] == pytest.approx(np.log(10))
    del params["logit_bias"]
    usual = initialize(two_towers(config()))["params"]
    assert "logit_bias" not in usual and usual["logit_scale"] == np.float32(-math.log(0.07))
    assert_close(params["image"], usual["image"], rtol=0, atol=0)


def test_a_network_has_the_towers_and_fields_of_its_own():
    class Network(TwoTowers):
        head: nn.Module
        capacity: float

    section = Model.read(config(), "config.model")
    network = two_towers(section, Network, head=nn.Dense(3), capacity=0.2)
    assert network.capacity == 0.2 and network.image.config == section.image
    assert Model.read(section.as_dict(), "config.model") == section
    assert section.compute == transformer.Compute(jnp.float32, True, "none", "xla")
    towers = Model.read(config(image=RESNET), "config.model").image, section.image
    assert [t.describe() for t in towers] == ["ResNet 1-1-1-1", "ViT/8, 3 layers"]
    assert [(t.side, t.step, t.token_width) for t in towers] == [(1, 32, 256), (2, 8, 32)]
    assert [(t.family, t.bn_group_size) for t in towers] == [("RN", 0), ("ViT", 0)]
    for tower in towers:
        variables = shapes(two_towers(config(image=tower.as_dict())))
        assert tower.first_layer in variables["params"]["image"]
        assert ("batch_stats" in variables) == (tower.kind == "resnet")


def test_bn_group_size_of_the_config_reaches_the_resnet():
    whole = two_towers(config(image=RESNET))
    grouped = two_towers(config(image=RESNET | dict(bn_group_size=2)))
    variables = drawn_variables(whole)

    def embedding(model, x):
        return encode_image(model, variables, x)[0].embedding

    x = images(4, 32) * np.arange(1, 5)[:, None, None, None, None]
    parts = jnp.concatenate([embedding(whole, x[:2]), embedding(whole, x[2:])])
    np.testing.assert_allclose(embedding(grouped, x), parts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(activation="relu"),
            r"config\.model\.activation='relu' is not one of .*'quick_gelu', 'gelu'",
        ),
        (dict(dtype="float16"), r"model\.dtype='float16'.*bfloat16"),
        (dict(remat="some"), r"model\.remat='some'.*dots"),
        (dict(attention="flash"), r"model\.attention='flash' is not one of .*'xla', 'cudnn'"),
        (
            dict(attention="cudnn", dtype="bfloat16"),
            r"model\.attention='cudnn' must be 'xla' without an NVIDIA GPU",
        ),
        (dict(heads=HEADS | dict(projector=0)), r"model\.heads\.projector=0 must be at least 1"),
        (dict(image=VIT | dict(kind="swin")), r"model\.image\.kind='swin'.*'vit', 'resnet'"),
        (dict(image=VIT | dict(width=33)), r"model\.image\.width=33.*heads=2"),
        (dict(image=VIT | dict(resolution=20)), r"model\.image\.resolution=20.*patch=8"),
        (dict(image=VIT | dict(layers=0)), r"model\.image\.layers=0.*at least 1"),
        (dict(image=VIT | dict(depth=3)), r"config\.model\.image has no field 'depth'"),
        (dict(image=RESNET | dict(resolution=48)), r"model\.image\.resolution=48.*multiple of 32"),
        (
            dict(image=RESNET | dict(layers=(1, 1))),
            r"config\.model\.image\.layers=\(1, 1\): expected",
        ),
        (dict(image=RESNET | dict(width=9)), r"model\.image\.width=9.*even"),
        (dict(image=RESNET | dict(heads=3)), r"model\.image\.heads=3.*=256"),
        (dict(image=RESNET | dict(bn_group_size=-1)), r"model\.image\.bn_group_size=-1"),
        (
            dict(image=VIT | dict(pooling="max")),
            r"model\.image\.pooling='max' is not one of .*mean",
        ),
        (dict(image=VIT | dict(positions="rope")), r"model\.image\.positions='rope' is not one of"),
        (
            dict(image=VIT | dict(positions="sincos2d", width=34)),
            r"width=34 must be a multiple of 4 with config\.model\.image\.positions='sincos2d'",
        ),
        (
            dict(image=VIT | dict(patch_dropout=1.0)),
            r"patch_dropout=1\.0 must lie in 0 … 1, below 1",
        ),
        (dict(image=RESNET | dict(pooling="mean")), r"config\.model\.image has no field 'pooling'"),
        (dict(image=dict(width=3)), r"config\.model\.image\.kind=None is not one of"),
        (dict(init_logit_bias="none"), r"config\.model\.init_logit_bias='none': expected a number"),
        (dict(text=dict(width=25)), r"model\.text\.width=25.*heads=3"),
        (dict(text=dict(eot_id=20)), r"model\.text\.eot_id=20.*vocab_size=20"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        two_towers(config(**changes))
