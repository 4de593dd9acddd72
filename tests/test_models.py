import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from declip_jax.models import transformer
from declip_jax.models.batchnorm import BatchNorm
from declip_jax.models.two_towers import TwoTowers, two_towers
from declip_jax.models.variants import variant

EOT, MASK = 18, 19

VIT = dict(kind="vit", resolution=16, patch=8, width=32, layers=3, heads=2)
RESNET = dict(kind="resnet", resolution=32, width=8, layers=(1, 1, 1, 1), heads=4, bn_group_size=0)


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
            image=image,
            text=text,
        )
        | fields
    )


def images(batch, resolution=16):
    shape = (batch, resolution, resolution, 3)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


TOKENS = np.array([[16, 3, 1, 4, EOT, 0, 0, 0], [16, 5, MASK, 2, 6, 7, EOT, 0]])


def initialise(model):
    key = jax.random.key(0, impl="rbg")  # compiles in half the time
    return jax.jit(model.init)(key, images(2, model.image.resolution), TOKENS)


def drawn_variables(model):
    """Without compiling `init`, and with no zeros."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(leaf.dtype), shapes(model)
    )


def named(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes(model):
    size = model.image.resolution
    return jax.eval_shape(
        model.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, model.text.context), jnp.int32),
    )


def check_std(params, expected):
    """Zero means, and standard deviations as expected to within five standard errors."""
    for name, std in expected.items():
        values = np.asarray(params[name])
        tolerance = 5 / np.sqrt(2 * values.size)
        assert values.std() == pytest.approx(std, rel=tolerance), name
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size), name


def test_initialisation_of_the_transformers():
    w, layers, text_w, text_layers = 96, 3, 80, 5
    model = two_towers(
        config(
            image=VIT | dict(width=w, layers=layers),
            text=dict(width=text_w, layers=text_layers, heads=2, vocab_size=200),
            embed_dim=64,
        )
    )
    params = named(initialise(model)["params"])

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

    drawn = {
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
    check_std(params, drawn)
    assert params["logit_scale"] == pytest.approx(np.log(1 / 0.07))
    for name in set(params) - set(drawn) - {"logit_scale"}:  # norms, attention biases
        assert (params[name] == name.endswith("scale")).all(), name
    # layers differ, and are stacked on axis 0
    kernel = params["image/blocks/mlp/c_fc/kernel"]
    assert kernel.shape == (layers, w, 4 * w)
    assert not jnp.allclose(kernel[0], kernel[1])


def test_initialisation_of_the_resnet():
    image = RESNET | dict(width=16)
    variables = initialise(two_towers(config(image=image)))
    params, channels = named(variables["params"]["image"]), 32 * 16
    drawn = {
        name: np.prod(leaf.shape[:-1]) ** -0.5 / np.sqrt(3)
        for name, leaf in params.items()
        if name.endswith("kernel") and "attnpool" not in name
    }
    for projection in ("q_proj", "k_proj", "v_proj", "c_proj"):
        drawn[f"attnpool/{projection}/kernel"] = channels**-0.5
        drawn[f"attnpool/{projection}/bias"] = (3 * channels) ** -0.5
    drawn["attnpool/positional_embedding"] = channels**-0.5
    check_std(params, drawn)
    for name in set(params) - set(drawn):  # batch normalisation; a block starts as the identity
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
            dtype=jnp.float32,
            scan=scan,
            remat=remat,
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
    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5),
        run(scan, remat),
        run(True, "none"),
    )


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
    program = jax.make_jaxpr(model.apply)(shapes(model), images(2), TOKENS)
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
def encode_text(model, variables, tokens):
    return model.apply(variables, tokens, method=TwoTowers.encode_text)


def changed(index, value, tokens=TOKENS):
    tokens = tokens.copy()
    tokens[index] = value
    return tokens


def test_text_is_read_at_the_end_token_and_only_from_the_left(model_and_variables):
    expected = encode_text(*model_and_variables, TOKENS)
    after = encode_text(*model_and_variables, changed((0, slice(5, None)), [MASK, 9, EOT]))
    np.testing.assert_allclose(after, expected, atol=1e-5)
    before = encode_text(*model_and_variables, changed((slice(None), 1), 8))
    assert (abs(before - expected).max(axis=1) > 1e-2).all()
    cut = encode_text(*model_and_variables, TOKENS[:, :7])  # as far as the longest caption
    np.testing.assert_allclose(cut, expected, atol=1e-5)


def test_the_end_token_is_found_by_its_id_else_the_last_position_is_read(model_and_variables):
    model, variables = model_and_variables
    other = two_towers(config(text=dict(eot_id=6)))  # second row: position 4; first row: none
    got = encode_text(other, variables, TOKENS)
    # the same caption without any end token, cut after that position
    cut = encode_text(model, variables, TOKENS[1:, :5])
    np.testing.assert_allclose(got[1:], cut, atol=1e-5)
    at_eot = encode_text(model, variables, TOKENS)
    assert abs(got - at_eot).max(axis=1).min() > 1e-2


def test_bfloat16_computes_low_and_keeps_float32_outside(model_and_variables):
    high, variables = model_and_variables
    low = two_towers(config(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(low))} == {jnp.dtype("float32")}
    expected = jax.jit(high.apply)(variables, images(2), TOKENS)
    for got, want in zip(jax.jit(low.apply)(variables, images(2), TOKENS), expected, strict=True):
        assert got.dtype == jnp.float32
        assert 1e-4 < jnp.linalg.norm(got - want) / jnp.linalg.norm(want) < 0.05


def test_inputs_of_the_wrong_size_are_refused(model_and_variables):
    model, variables = model_and_variables
    with pytest.raises(ValueError, match="24x24 pixels.*resolution=16"):
        model.apply(variables, images(1, 24), method=TwoTowers.encode_image)
    with pytest.raises(ValueError, match="9 tokens.*context=8"):
        encode_text(model, variables, np.zeros((1, 9), np.int32))
    with pytest.raises(ValueError, match="64x64 pixels.*resolution=32"):
        two_towers(config(image=RESNET)).init(jax.random.key(0), images(1, 64), TOKENS)


def test_batch_norm_in_training_and_its_running_statistics():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (6, 2, 2, 5))
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)
    got, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
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
    x = jax.random.normal(jax.random.key(0), (6, 3, 5)) * jnp.arange(1, 7)[:, None, None]
    variables = BatchNorm().init(jax.random.key(0), x, train=False)
    got, updated = BatchNorm(group_size=2).apply(variables, x, True, mutable=["batch_stats"])
    parts = [
        BatchNorm().apply(variables, x[start : start + 2], True, mutable=["batch_stats"])
        for start in (0, 2, 4)
    ]
    np.testing.assert_allclose(got, jnp.concatenate([out for out, _ in parts]), atol=1e-5)
    average = jax.tree.map(lambda *stats: sum(stats) / 3, *[stats for _, stats in parts])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updated, average)


def test_batch_norm_refuses_what_has_no_statistics():
    x = jnp.ones((6, 5))
    variables = BatchNorm().init(jax.random.key(0), x, train=False)
    with pytest.raises(ValueError, match="bn_group_size=4 does not divide.*6"):
        BatchNorm(group_size=4).apply(variables, x, True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="more than one value"):
        BatchNorm(group_size=1).apply(variables, x, True, mutable=["batch_stats"])


def test_bn_group_size_of_the_config_reaches_the_resnet():
    whole = two_towers(config(image=RESNET))
    grouped = two_towers(config(image=RESNET | dict(bn_group_size=2)))
    variables = drawn_variables(whole)

    @functools.partial(jax.jit, static_argnums=0)
    def encode(model, x):
        return model.apply(
            variables, x, True, method=TwoTowers.encode_image, mutable=["batch_stats"]
        )[0]

    x = images(4, 32) * np.arange(1, 5)[:, None, None, None]
    parts = jnp.concatenate([encode(whole, x[:2]), encode(whole, x[2:])])
    np.testing.assert_allclose(encode(grouped, x), parts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(activation="relu"),
            r"model\.activation='relu': expected one of 'quick_gelu', 'gelu'",
        ),
        (dict(dtype="float16"), r"model\.dtype='float16'.*bfloat16"),
        (dict(remat="some"), r"model\.remat='some'.*dots"),
        (dict(image=VIT | dict(kind="swin")), r"model\.image\.kind='swin'.*'vit', 'resnet'"),
        (dict(image=VIT | dict(width=33)), r"model\.image\.width=33.*heads=2"),
        (dict(image=VIT | dict(resolution=20)), r"model\.image\.resolution=20.*patch=8"),
        (dict(image=VIT | dict(layers=0)), r"model\.image\.layers=0.*at least 1"),
        (dict(image=VIT | dict(depth=3)), r"model\.image has.*'depth'.*VisionTransformer"),
        (dict(image=RESNET | dict(resolution=48)), r"model\.image\.resolution=48.*multiple of 32"),
        (dict(image=RESNET | dict(layers=(1, 1))), r"model\.image\.layers=\(1, 1\).*four stages"),
        (dict(image=RESNET | dict(width=9)), r"model\.image\.width=9.*even"),
        (dict(image=RESNET | dict(heads=3)), r"model\.image\.heads=3.*=256"),
        (dict(image=RESNET | dict(bn_group_size=-1)), r"model\.image\.bn_group_size=-1"),
        (dict(text=dict(width=25)), r"model\.text\.width=25.*heads=3"),
        (dict(text=dict(eot_id=20)), r"model\.text\.eot_id=20.*vocab_size=20"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        two_towers(config(**changes))
