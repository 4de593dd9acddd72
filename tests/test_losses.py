import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from declip_jax.losses import adaptive, contrastive, language, self_supervised


def features(rows, width=7, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, width))
    return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))


X, Y, SCALE = features(9), features(9, seed=1), 14.2857


def cross_entropy(logits, target):
    """One row, from the definition, in float64."""
    logits = np.float64(logits)
    return np.log(np.exp(logits).sum()) - logits[target]


# --- contrastive ----------------------------------------------------------------------------------


def test_info_nce_is_the_cross_entropy_in_both_directions():
    own = np.arange(9)
    similarities = SCALE * X @ Y.T
    losses = contrastive.info_nce(X, Y, SCALE)
    for got, logits in zip(losses, (similarities, similarities.T), strict=True):
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, own)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("excluded", [1, 4])
def test_info_nce_leaves_the_excluded_pairs_out(excluded):
    got = jax.jit(contrastive.info_nce, static_argnums=3)(X, Y, SCALE, excluded)
    logits = SCALE * np.float64(X) @ np.float64(Y).T
    for i in range(9):
        negative = (i + excluded) % 9  # of x_i; x_i is left out for that y
        expected = cross_entropy(np.delete(logits[i], negative), i - (negative < i))
        np.testing.assert_allclose(got[0][i], expected, rtol=1e-5)
        left_out = (i - excluded) % 9
        expected = cross_entropy(np.delete(logits[:, i], left_out), i - (left_out < i))
        np.testing.assert_allclose(got[1][i], expected, rtol=1e-5)


def clip_loss_in_float64(image, text, scale, weights):
    logits = scale * np.float64(image) @ np.float64(text).T
    pairs = [
        weight * (cross_entropy(logits[i], i) + cross_entropy(logits[:, i], i)) / 2
        for i, weight in enumerate(weights)
    ]
    return np.mean(pairs)


def test_clip_loss_equals_the_equation():
    expected = clip_loss_in_float64(X, Y, SCALE, np.ones(9))
    np.testing.assert_allclose(contrastive.clip_loss(X, Y, SCALE), expected, rtol=1e-6)
    weights = np.random.default_rng(0).uniform(size=9).astype(np.float32)
    expected = clip_loss_in_float64(X, Y, SCALE, weights)
    np.testing.assert_allclose(contrastive.clip_loss(X, Y, SCALE, weights), expected, rtol=1e-6)


def test_clip_loss_of_equal_features_is_log_of_batch():
    same = jnp.ones((5, 3)) / jnp.sqrt(3.0)
    np.testing.assert_allclose(contrastive.clip_loss(same, same, 10.0), np.log(5), rtol=1e-6)


def test_gradient_pulls_pairs_together():
    grad = jax.jit(jax.grad(contrastive.clip_loss))(X, Y, 10.0)
    moved = contrastive.normalize(X - 0.1 * grad)
    assert contrastive.clip_loss(moved, Y, 10.0) < contrastive.clip_loss(X, Y, 10.0)
    assert np.mean(np.sum(moved * Y, 1)) > np.mean(np.sum(X * Y, 1))


def test_nearest_neighbor_loss_is_the_mean_over_neighbors_of_image_to_text():
    neighbors = np.stack([Y, features(9, seed=2)], axis=1)  # [B, 2, D]
    expected = [
        cross_entropy(SCALE * X[i] @ neighbors[:, n].T, i) for i in range(9) for n in range(2)
    ]
    got = contrastive.nearest_neighbor_loss(X, neighbors, SCALE)
    np.testing.assert_allclose(got, np.mean(expected), rtol=1e-6)
    one = contrastive.nearest_neighbor_loss(X, neighbors[:, :1], SCALE)
    np.testing.assert_allclose(one, contrastive.info_nce(X, Y, SCALE)[0].mean(), rtol=1e-6)


def test_positive_rank_counts_nearer_keys():
    keys = jnp.eye(8, dtype=jnp.float32)
    # Query 0 finds its key first, query 1 second, query 7 last; the others first.
    queries = np.eye(8, dtype=np.float32)
    queries[1] = np.eye(8)[2] + 0.5 * np.eye(8)[1]
    queries[7] = np.arange(8, 0, -1)
    got = contrastive.positive_rank(contrastive.normalize(queries), keys)
    np.testing.assert_array_equal(got, [0, 1, 0, 0, 0, 0, 0, 7])


def test_collapsed_features_and_nan_do_not_look_accurate():
    same = jnp.ones((10, 4)) / 2
    np.testing.assert_array_equal(contrastive.positive_rank(same, same), np.arange(10))
    np.testing.assert_array_equal(contrastive.positive_rank(same * jnp.nan, same), 10)


# --- self-supervised ------------------------------------------------------------------------------


def nt_xent_of_the_paper(z1, z2, temperature):
    """Chen et al. (2020), algorithm 1: views 2k - 1 and 2k are those of image k."""
    z = jnp.stack([z1, z2], axis=1).reshape(-1, z1.shape[1])  # [B, D] twice -> [2B, D]
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    s = z @ z.T
    total = 0.0
    for i in range(len(z)):
        others = jnp.array([k for k in range(len(z)) if k != i])
        positive = i + 1 if i % 2 == 0 else i - 1
        total -= jnp.log(
            jnp.exp(s[i, positive] / temperature) / jnp.exp(s[i, others] / temperature).sum()
        )
    return total / len(z)


def test_nt_xent_is_that_of_the_paper():
    z1, z2 = 3 * features(4), 0.5 * features(4, seed=1)
    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, temperature=0.1), (0, 1)))(z1, z2)
        for loss in (self_supervised.nt_xent, nt_xent_of_the_paper)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_simsiam_predicts_the_other_view_and_has_no_gradient_into_it():
    p1, p2, z1, z2 = (scale * features(5, seed=scale) for scale in (1, 2, 3, 4))
    loss, gradients = jax.jit(jax.value_and_grad(self_supervised.simsiam, (0, 1, 2, 3)))(
        p1, p2, z1, z2
    )
    cosines = (p1 / 1 * z2 / 4 + p2 / 2 * z1 / 3).sum(axis=1)
    np.testing.assert_allclose(loss, -cosines.mean() / 2, rtol=1e-5)
    assert jnp.any(gradients[0]) and jnp.any(gradients[1])
    assert not jnp.any(gradients[2]) and not jnp.any(gradients[3])


# --- language -------------------------------------------------------------------------------------

SHARE, VOCABULARY = 0.2, 11


def words_and_labels(batch, length=8, masked=0.1, seed=0):
    rng = np.random.default_rng(seed)
    words = rng.normal(size=(batch, length, 5)).astype(np.float32)
    ids = rng.integers(0, VOCABULARY, (batch, length)).astype(np.int32)
    return words, np.where(rng.random((batch, length)) < masked, ids, -1)


KERNEL = np.random.default_rng(3).normal(size=(5, VOCABULARY)).astype(np.float32)


def masked_lm_everywhere(kernel, words, labels):
    """The head on all positions, and the mean over those with a label."""
    losses = optax.softmax_cross_entropy_with_integer_labels(words @ kernel, jnp.maximum(labels, 0))
    return jnp.where(labels >= 0, losses, 0).sum() / (labels >= 0).sum()


@jax.jit
def masked_lm(kernel, words, labels):
    return language.masked_lm(lambda x: x @ kernel, words, labels, SHARE)


@pytest.mark.parametrize("batch", [6, 128])  # one group, two groups
def test_masked_lm_equals_the_head_on_all_positions(batch):
    words, labels = words_and_labels(batch)
    assert masked_lm(KERNEL, words, labels).dropped == 0
    got, expected = (
        jax.jit(jax.value_and_grad(loss, (0, 1)))(KERNEL, words, labels)
        for loss in (lambda *args: masked_lm(*args).mean(), masked_lm_everywhere)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    # words get a gradient where they are masked, and nowhere else
    np.testing.assert_array_equal(jnp.any(got[1][1], axis=2), labels >= 0)


def test_parts_of_a_batch_add_up():
    words, labels = words_and_labels(12)
    whole = masked_lm(KERNEL, words, labels)
    parts = [masked_lm(KERNEL, words[n::3], labels[n::3]) for n in range(3)]
    together = language.MaskedLoss(*(jnp.concatenate(sums) for sums in zip(*parts, strict=True)))
    np.testing.assert_allclose(together.mean(), whole.mean(), rtol=1e-5)
    assert together.words.sum() == whole.words.sum() == (labels >= 0).sum()


def test_masked_positions_without_a_place_are_counted():
    words, labels = words_and_labels(128)
    labels[64:] = 3  # all positions of the second group
    taken = jax.jit(language.take_masked, static_argnums=2)(words, labels, SHARE)
    places = 103  # a fifth of a group's 64 * 8 positions, rounded up
    assert taken.words.shape == (2, places, 5) and taken.labels.shape == (2, places)
    assert taken.dropped == 64 * 8 - places
    # what found a place counts, first come
    kept = labels.reshape(2, -1).copy()
    kept[1, places:] = -1
    got = masked_lm(KERNEL, words, labels)
    expected = masked_lm_everywhere(KERNEL, words, kept.reshape(labels.shape))
    np.testing.assert_allclose(got.mean(), expected, rtol=1e-5)
    assert got.dropped == taken.dropped


def test_without_a_masked_position_the_loss_is_zero():
    words, labels = words_and_labels(4, masked=0)

    def loss(kernel, words):
        return masked_lm(kernel, words, labels).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(KERNEL, words)
    assert value == 0
    assert not any(map(jnp.any, gradients))  # zeros, not NaN


# --- ALIP's gates ---------------------------------------------------------------------------------


def test_gates_over_three_steps_are_those_of_the_paper():
    h = {"text": 1.0, "raw": 1.0, "synthetic": 1.0}
    means = adaptive.initial_means()
    gates = jax.jit(functools.partial(adaptive.gates, momentum=0.75, gamma=2.0))
    capped = []
    for step in range(3):
        image, raw = features(8, seed=2 * step), features(8, seed=2 * step + 1)
        synthetic = np.float32(contrastive.normalize(raw + 0.7 * features(8, seed=9)))
        got, means = gates(image, raw, synthetic, means)
        s = {
            "text": np.sum(np.float64(raw) * synthetic, axis=1),
            "raw": np.sum(np.float64(image) * raw, axis=1),
            "synthetic": np.sum(np.float64(image) * synthetic, axis=1),
        }
        h = {name: 0.25 * s[name].mean() + 0.75 * h[name] for name in h}
        w = {name: np.exp(s[name] - h[name]) ** 2 for name in h}
        for name in h:
            np.testing.assert_allclose(means[name], h[name], rtol=1e-5)
        agree = w["text"] >= 1
        capped.append(agree.mean())
        np.testing.assert_allclose(got.sample, np.minimum(1, w["text"]), rtol=1e-5)
        np.testing.assert_allclose(got.raw, np.where(agree, 1, w["raw"]), rtol=1e-5)
        np.testing.assert_allclose(got.synthetic, np.where(agree, 1, w["synthetic"]), rtol=1e-5)
    assert 0 < np.mean(capped) < 1  # both cases were there


def test_gates_have_no_gradient():
    def total(*features):
        gates, means = adaptive.gates(*features, adaptive.initial_means(), 0.5, 2.0)
        return sum(map(jnp.sum, (*gates, *means.values())))

    rows = [features(4, seed=seed) for seed in range(3)]
    assert not any(map(jnp.any, jax.jit(jax.grad(total, (0, 1, 2)))(*rows)))
