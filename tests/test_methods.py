"""What methods make of a batch and of the config; that their values are right, test_golden says."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import common
from declip_jax import methods
from declip_jax.config import Config
from declip_jax.losses import contrastive
from declip_jax.methods import base, declip
from declip_jax.models.batchnorm import BatchNorm
from declip_jax.parallel import rules
from declip_jax.parallel.mesh import make_mesh
from declip_jax.step import Setup
from tests.drawn import draw_variables, method_of

WEIGHTS = {
    name: {term: 0.5 / (number + 1) for number, term in enumerate(definition.terms)}
    for name, definition in methods.METHODS.items()
}
# SimSiam, which alone goes through batch normalization, is only looked at
WEIGHTS["declip"]["simsiam"] = 0.0
every_method = pytest.mark.parametrize("name", WEIGHTS)

BATCH, CONTEXT, EOT, MASK = 8, 16, 62, 63
RESNET = dict(kind="resnet", resolution=32, width=8, layers=(1, 1, 1, 1), heads=4, bn_group_size=0)


def config_of(name, **changes):
    config = common.get_config("tiny").unlock()
    config.method = name
    config.batch_size = BATCH
    config.model.image.layers = config.model.text.layers = 1
    config.model.text.update(vocab_size=64, eot_id=EOT, context=CONTEXT)
    config.loss.weights = WEIGHTS[name]
    config.loss.max_scale = 10.0
    config.loss.late_interaction.mask_padding = name == "filip"
    config.update_from_flattened_dict(changes)
    return config.lock()


def build(name, **changes):
    return method_of(config_of(name, **changes))


@functools.cache
def variables_of(name):
    return draw_variables(build(name))


def texts(seed=0):
    """Each text view: int32 [B, L]; and the labels of the masked one."""
    rng = np.random.default_rng(seed)
    views = rng.integers(1, EOT, (3, BATCH, CONTEXT)).astype(np.int32)
    place, end = np.arange(CONTEXT), rng.integers(4, CONTEXT, (3, BATCH, 1))
    views = np.where(place < end, views, np.where(place == end, EOT, 0)).astype(np.int32)
    caption, augmented, synthetic = views
    chosen = (caption > 0) & (caption < EOT) & (rng.random((BATCH, CONTEXT)) < 0.15)
    return {
        "caption": caption,
        "masked": np.where(chosen, np.int32(MASK), caption),
        "augmented": augmented,
        "synthetic": synthetic,
        "labels": np.where(chosen, caption, np.int32(-1)),
    }


def batch_of(views, **changed):
    """A batch as the pipeline would give it and `augment` leave it."""
    text = texts() | changed
    image = np.random.default_rng(0).normal(size=(BATCH, len(views.image), 4, 4, 3))
    return {
        "image": np.float32(image.repeat(8, axis=2).repeat(8, axis=3)),  # a color each patch
        "tokens": np.stack([text[view] for view in views.text], axis=1),
        "mlm_labels": text["labels"],
    }


IN_TOWERS = re.compile("(image|text)/(?!proj/)")  # parameters below what the losses work with


@functools.cache
def run(name, towers=True, **changes):
    """(loss, aux, gradients by name) of a training step; with towers=False not of IN_TOWERS."""
    method = build(name, **changes)

    def stop(path, x):
        return jax.lax.stop_gradient(x) if IN_TOWERS.match(rules.path_name(path)) else x

    def loss(params, model_state, batch, rng):
        if not towers:  # compiles in half the time
            params = jax.tree_util.tree_map_with_path(stop, params)
        return method.loss(params, model_state, batch, rng)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    arguments = *variables_of(name), batch_of(method.views), jax.random.key(0)
    (loss, aux), gradients = jax.device_get(step(*arguments))
    gradients = named(gradients)
    if not towers:
        gradients = {path: gradients[path] for path in gradients if not IN_TOWERS.match(path)}
    return loss, aux, gradients


def named(tree):
    return {rules.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def assert_same_gradients(got, expected):
    """Each to 1e-5 of its norm; a true gradient of zero is rounding, counted against the whole."""
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in expected.values()))
    for name, gradient in got.items():
        limit = 1e-5 * np.linalg.norm(gradient) + 1e-6 * whole
        assert np.linalg.norm(expected[name] - gradient) <= limit, name


def assert_same_step(got, expected):
    loss, aux, gradients = expected
    got_loss, got_aux, got_gradients = got
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    assert_close(got_aux, aux)
    assert_same_gradients(got_gradients, gradients)


# --- what a method is built from and says of itself -----------------------------------------------


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("clip", {}, (["weak"], ["caption"], False)),
        ("slip", {}, (["weak", "strong", "strong"], ["caption"], False)),
        ("filip", {}, (["strong"], ["masked"], True)),
        ("filip", {"loss.contrast_masked": False}, (["strong"], ["caption"], True)),
        ("declip", {}, (["strong"] * 2, ["masked", "augmented"], False)),
        ("defilip", {}, (["strong"] * 2, ["masked", "augmented"], True)),
        ("alip", {}, (["weak"], ["caption", "synthetic"], False)),
        *(
            (
                name,
                {"loss.contrast_masked": False, "loss.late_interaction.mask_padding": True},
                (["strong"] * 2, ["caption", "masked", "augmented"], False),
            )
            for name in ("declip", "defilip")
        ),
        ("filip", {"loss.late_interaction.mask_padding": True}, (["strong"], ["masked"], False)),
    ],
)
def test_views(name, changes, expected):
    views = build(name, **{"loss.late_interaction.mask_padding": False} | changes).views
    assert (list(views.image), list(views.text), views.padded) == expected


def test_variables_of_each_method():
    heads = {"projector", "predictor", "mlm_head"}
    dense = {"image_mapping", "text_mapping", "logit_scale_dense"}
    expected = {
        "clip": (set(), set()),
        "slip": ({"simclr"}, {"batch_stats"}),
        "filip": (dense, set()),
        "declip": (heads, {"batch_stats", "support_set"}),
        "defilip": (heads | dense, {"batch_stats", "support_set"}),
        "alip": (set(), {"running_means"}),
    }
    for name, (of_method, state) in expected.items():
        params, model_state = variables_of(name)
        assert set(params) == {"image", "text", "logit_scale"} | of_method
        assert set(model_state) == state


def test_projection_keeps_the_logit_scales_within_their_limits():
    method = build("filip", **{"loss.logit_scale_range": (3.0, 6.0)})
    for scale, expected in ((2.0, 3.0), (4.0, 4.0), (7.0, 6.0)):
        params = {"logit_scale": scale, "logit_scale_dense": scale, "image": scale}
        projected = {"logit_scale": expected, "logit_scale_dense": expected, "image": scale}
        assert method.constrain(params) == projected
    assert build("clip").constrain({"logit_scale": 7.0}) == {"logit_scale": 6.0}


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("clip", {"method": "clipp"}, r"config\.method='clipp'.*'alip', 'clip'"),
        *(
            (name, {"loss.weights": weights}, r"config\.loss\.weights has .*: name each term")
            for name in WEIGHTS
            for weights in ({}, WEIGHTS[name] | {"other": 0.0})
        ),
        ("clip", {"loss.logit_scale_range": (2.0, 1.0)}, r"logit_scale_range=\(2\.0, 1\.0\)"),
        ("clip", {"loss.block": 0}, r"config\.loss\.block=0 must be at least 1"),
        ("slip", {"loss.temperature": 0.0}, r"config\.loss\.temperature=0\.0 must be .*, above 0"),
        ("filip", {"loss.late_interaction.tokens": -1}, r"tokens=-1 must be at least 0"),
        ("declip", {"loss.support_set.size": 15}, r"support_set\.size=15 .* 16 rows enqueued"),
        ("alip", {"loss.adaptive.momentum": 1.0}, r"adaptive\.momentum=1\.0 must lie in 0 … 1"),
        ("declip", {"model.heads.projector": 0}, r"model\.heads\.projector=0.*at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


# --- a training step ------------------------------------------------------------------------------


@every_method
def test_metrics(name):
    loss, aux, _ = run(name)
    metrics = aux.metrics
    terms = {term: metrics[term] for term in WEIGHTS[name]}
    assert all(np.isfinite(value) and value != 0 for value in terms.values())
    expected = sum(weight * terms[term] for term, weight in WEIGHTS[name].items())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["loss"] == loss
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 1
    np.testing.assert_allclose(metrics["logit_scale"], 10)  # config.loss.max_scale
    if "filip" in name:
        np.testing.assert_allclose(metrics["logit_scale_dense"], np.exp(2.5), rtol=1e-6)
    if "declip" in name:
        assert metrics["mlm_dropped"] == 0
    if name == "alip":
        for weight in ("sample_weight", "raw_weight", "synthetic_weight"):
            assert 0 < metrics[weight] <= 1
        assert all(mean != 1 for mean in aux.model_state["running_means"].values())


def test_a_term_of_weight_zero_has_no_gradient():
    _, _, gradients = run("declip")
    for path, gradient in gradients.items():
        head = path.startswith(("projector/", "predictor/"))
        assert np.any(gradient) != head, path


@every_method
def test_logits_in_blocks_give_the_same(name):
    blocks = {"loss.ring_threshold": 2, "loss.block": 2}
    assert_same_step(run(name, towers=False, **blocks), run(name))


@pytest.mark.parametrize("name, parts", [("clip", 2), ("filip", 2), ("alip", 4)])
def test_microbatches_give_the_same(name, parts):
    assert_same_step(run(name, towers=name == "clip", microbatches=parts), run(name))


def test_microbatches_change_batch_statistics_and_nothing_else():
    """Of DeCLIP, whose SimSiam has no weight here: the loss and all gradients stay."""
    results = [run("declip"), run("declip", towers=False, microbatches=2)]
    simsiam, other = (aux.metrics["simsiam"] for _, aux, _ in results)
    assert abs(simsiam - other) > 1e-4
    stats, others = (named(aux.model_state["batch_stats"]) for _, aux, _ in results)
    for path in stats:
        assert not np.allclose(stats[path], others[path], rtol=1e-3), path

    def rest(loss, aux, gradients):
        metrics = {name: x for name, x in aux.metrics.items() if name != "simsiam"}
        return loss, base.Aux(metrics, aux.model_state["support_set"]), gradients

    assert_same_step(rest(*results[1]), rest(*results[0]))


def test_microbatches_leave_what_batch_statistics_do_not_touch():
    """Of SLIP, whose second term goes through the head's batch normalization."""
    _, aux, gradients = run("slip")
    _, got_aux, got_gradients = run("slip", towers=False, microbatches=2)
    assert abs(got_aux.metrics["simclr"] - aux.metrics["simclr"]) > 1e-4
    for metric in ("clip", "top1", "top5"):
        np.testing.assert_allclose(got_aux.metrics[metric], aux.metrics[metric], rtol=1e-5)
    untouched = [path for path in got_gradients if path.startswith(("text/", "logit_scale"))]
    assert_same_gradients({path: got_gradients[path] for path in untouched}, gradients)


class Toy(nn.Module):
    @nn.compact
    def __call__(self, batch, train):
        x = BatchNorm()(nn.Dense(3)(batch["x"]), train)
        return {"rows": x, "sum": jnp.sin(x).sum()[None]}


def test_microbatches_are_encoded_one_after_the_other():
    network = Toy()
    batch = {"x": np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)}
    variables = network.init(jax.random.key(0), batch, False)
    params, model_state = variables["params"], {"batch_stats": variables["batch_stats"], "other": 5}

    def both(encode):
        def loss(params):
            features, new = encode(params, model_state, batch, jax.random.key(0))
            return jnp.cos(features["rows"]).sum() + features["sum"].sum(), (features, new)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    def by_hand(params, model_state, batch, rng):
        del rng
        parts = []
        for n in range(3):
            part, stats = network.apply(
                {"params": params, "batch_stats": model_state["batch_stats"]},
                {"x": batch["x"][n::3]},
                True,
                mutable=["batch_stats"],
            )
            parts, model_state = [*parts, part], model_state | stats
        rows = jnp.zeros((12, 3))
        for n, part in enumerate(parts):
            rows = rows.at[n::3].set(part["rows"])
        return {"rows": rows, "sum": jnp.concatenate([part["sum"] for part in parts])}, model_state

    assert_close(both(base.make_encode(network, 3)), both(by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_frozen_patch_convolution_costs_no_backward_pass(parts):
    def convolutions(frozen):
        changes = {"microbatches": parts, "optim.frozen": frozen}
        setup = Setup(config_of("clip", **changes), jax.devices()[:1])
        batch = {
            "image": jax.ShapeDtypeStruct((BATCH, 1, 32, 32, 3), jnp.uint8),
            "tokens": jax.ShapeDtypeStruct((BATCH, 1, CONTEXT), jnp.int32),
        }
        program = setup.jit_train_step().lower(setup.abstract_state, batch)
        return program.as_text().count("stablehlo.convolution")

    # the image is data: the kernel's gradient is all that the backward pass has of it
    assert convolutions(("^image/patch_embed/",)) == convolutions(()) - 1


@every_method
def test_bfloat16_towers_give_float32_losses(name):
    method = build(name, **{"model.dtype": "bfloat16", "model.image": RESNET})
    params, model_state = jax.eval_shape(method.init, jax.random.key(0))
    loss, aux = jax.eval_shape(
        method.loss, params, model_state, batch_of(method.views), jax.random.key(0)
    )
    assert loss.shape == () and loss.dtype == jnp.float32
    for metric, value in aux.metrics.items():
        assert (value.shape, value.dtype) == ((), jnp.float32), metric

    def layout(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert layout(aux.model_state) == layout(model_state)


# --- the options of the text views ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["declip", "defilip"])
def test_what_is_contrasted_may_be_the_masked_caption_or_a_whole_one(name):
    method = build(name, **{"loss.contrast_masked": False})
    params, model_state = variables_of(name)
    loss = jax.jit(method.loss)

    def step(**changed):
        batch = batch_of(method.views, **changed)
        _, aux = loss(params, model_state, batch, jax.random.key(0))
        return jax.device_get(aux)

    _, default, _ = run(name)  # contrasts the masked caption
    assert_close(step(caption=texts()["masked"]), default)

    def changes(one, other):
        same = {name for name, value in one.metrics.items() if value == other.metrics[name]}
        return set(one.metrics) - same

    contrasted = {"clip", "nn_text", "filip"} & set(WEIGHTS[name])
    whole = step()
    assert contrasted <= changes(whole, default)
    assert whole.metrics["mlm"] == default.metrics["mlm"]
    # masking other words is a matter of the MLM term alone
    other = step(masked=texts()["caption"])
    assert changes(whole, other) == {"mlm", "loss"}
    assert_close(other.model_state, whole.model_state)


def test_defilip_over_all_pairs_of_views():
    method = build("defilip", **{"loss.late_interaction.all_views": True})
    params, model_state = variables_of("defilip")
    batch = batch_of(method.views)
    first_pair, all_pairs = (
        jax.jit(
            lambda batch, loss=loss: loss(params, model_state, batch, jax.random.key(0))[1].metrics[
                "filip"
            ]
        )
        for loss in (build("defilip").loss, method.loss)
    )
    pairs = [
        first_pair({**batch, "image": batch["image"][:, ::i], "tokens": batch["tokens"][:, ::t]})
        for i in (1, -1)
        for t in (1, -1)
    ]
    assert len(set(map(float, pairs))) == 4
    np.testing.assert_allclose(all_pairs(batch), np.mean(pairs), rtol=1e-5)


# --- features for evaluation ----------------------------------------------------------------------


def test_encoders_give_what_the_loss_compares():
    method = build("slip")
    params, model_state = variables_of("slip")
    batch = batch_of(method.views)
    image = jax.jit(method.encode_image)(params, model_state, batch["image"][:, 0])
    text = jax.jit(method.encode_text)(params, model_state, batch["tokens"][:, 0])
    for rows in (image, text):
        assert rows.shape == (BATCH, 32) and rows.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    _, aux, _ = run("slip")
    np.testing.assert_allclose(
        contrastive.clip_loss(image, text, 10.0), aux.metrics["clip"], rtol=1e-5
    )


def test_in_evaluation_an_image_is_by_itself():
    method = build("clip", **{"model.image": RESNET})
    params, model_state = draw_variables(method)
    encode = jax.jit(functools.partial(method.encode_image, params, model_state))
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    others = images.copy()
    others[2:] = 3 * images[:2] + 1
    rows = encode(images)
    np.testing.assert_allclose(encode(others)[:2], rows[:2], atol=1e-6)
    assert abs(rows[0] - rows[1]).max() > 1e-3


# --- what the methods share -----------------------------------------------------------------------


@pytest.mark.parametrize("logit_scale", [2.0, 5.0, 6.0, 18.0, 20.0, 22.0, 40.0, 80.0])
@pytest.mark.parametrize("cap", [0.0, 100.0])
def test_exp_scale_has_a_cap_that_leaves_the_gradient(logit_scale, cap):
    value, gradient = jax.value_and_grad(base.exp_scale)(jnp.float32(logit_scale), cap)
    exp = np.exp(logit_scale)
    np.testing.assert_allclose(value, min(exp, cap) if cap else exp, rtol=1e-5)
    np.testing.assert_allclose(gradient, exp, rtol=1e-5)
    assert not cap or value <= cap  # exactly


def test_weighted_sum_leaves_a_term_without_weight_out():
    terms = {"a": jnp.float32(3), "b": jnp.float32(jnp.nan), "c": jnp.float32(5)}
    assert base.weighted_sum(terms, {"a": 2.0, "b": 0.0, "c": 0.5}) == 8.5
    assert base.weighted_sum(terms, dict.fromkeys("abc", 0.0)) == 0


def test_accuracy_is_of_the_nearest_and_of_the_nearest_five():
    ranks = jnp.array([0, 1, 4, 5, 0, 9, 3, 0])
    definition = methods.METHODS["clip"]._replace(rank=lambda x: ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "clip", definition)
        method = build("clip")
    _, aux = method.loss(*variables_of("clip"), batch_of(method.views), jax.random.key(0))
    np.testing.assert_allclose([aux.metrics["top1"], aux.metrics["top5"]], [3 / 8, 6 / 8])


def test_what_several_terms_ask_for_is_computed_once():
    calls = []

    @base.once
    def shared(x, view=0):
        calls.append(view)
        return object()

    x, other = (base.Inputs(*[None] * 10) for _ in range(2))
    assert shared(x) is shared(x) and shared(x, 1) is shared(x, 1)
    assert shared(x) is not shared(x, 1) and shared(x) is not shared(other)
    assert calls == [0, 1, 0]


@pytest.mark.mesh
def test_support_set_finds_neighbors_of_both_captions_and_then_takes_them_in():
    changes = {"loss.support_set.neighbors": 2, "loss.block": 8}
    config = Config.read(config_of("declip", **changes))
    mesh = make_mesh(2, 1, jax.devices()[:2])
    state = declip.SUPPORT_SET.init(jax.random.key(0), 32, config.loss)
    assert state["rows"].shape == (64, 32)
    rng = np.random.default_rng(0)
    text, augmented = (
        np.asarray(contrastive.normalize(rng.normal(size=(BATCH, 32)).astype(np.float32)))
        for _ in range(2)
    )

    @jax.jit
    def look_up_and_enqueue(state, texts):
        features = {"text": texts}
        x = base.Inputs(
            features,
            {},
            {"support_set": state},
            {},
            None,
            config.model,
            config.loss,
            mesh,
            None,
            None,
        )
        return declip.neighbors(x), declip.SUPPORT_SET.update(state, x)

    texts = np.stack([text, augmented], axis=1)
    ((found, found_augmented), metrics), after = look_up_and_enqueue(state, texts)
    for queries, neighbors in ((text, found), (augmented, found_augmented)):
        order = np.argsort(-queries @ state["rows"].T, axis=1)[:, :2]
        np.testing.assert_allclose(neighbors, np.asarray(state["rows"])[order], rtol=1e-5)
    assert metrics["nn_replaced"] == 0
    np.testing.assert_array_equal(after["rows"][: 2 * BATCH], np.concatenate([augmented, text]))
