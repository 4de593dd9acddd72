import jax
import jax.numpy as jnp
import numpy as np

from declip_jax.losses import contrastive


def features(rows, width=7, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clip_loss_in_float64(image, text, scale):
    logits = scale * image @ text.T

    def cross_entropy(z):
        z = z - z.max(axis=1, keepdims=True)
        return np.mean(np.log(np.exp(z).sum(axis=1)) - np.diag(z))

    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def test_clip_loss_equals_the_equation():
    image, text = features(9), features(9, seed=1)
    ours = contrastive.clip_loss(jnp.float32(image), jnp.float32(text), jnp.float32(14.2857))
    np.testing.assert_allclose(ours, clip_loss_in_float64(image, text, 14.2857), rtol=1e-6)


def test_clip_loss_of_equal_features_is_log_of_batch():
    same = jnp.ones((5, 3)) / jnp.sqrt(3.0)
    np.testing.assert_allclose(contrastive.clip_loss(same, same, 10.0), np.log(5), rtol=1e-6)


def test_gradient_pulls_pairs_together():
    image, text = jnp.float32(features(6)), jnp.float32(features(6, seed=1))
    grad = jax.grad(contrastive.clip_loss)(image, text, 10.0)
    moved = contrastive.normalise(image - 0.1 * grad)
    assert contrastive.clip_loss(moved, text, 10.0) < contrastive.clip_loss(image, text, 10.0)
    assert np.mean(np.sum(moved * text, 1)) > np.mean(np.sum(image * text, 1))


def test_info_nce_takes_more_keys_than_queries():
    logits = jnp.float32([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    expected = [np.log(np.e**2 + 1 + np.e) - 2, np.log(1 + np.e**3 + np.e) - 3]
    np.testing.assert_allclose(contrastive.info_nce(logits), expected, rtol=1e-6)


def test_retrieval_accuracy_counts_ranks():
    keys = jnp.eye(8, dtype=jnp.float32)
    # Query 0 finds its key first, query 1 second, query 7 last; the others first.
    queries = np.eye(8, dtype=np.float32)
    queries[1] = np.eye(8)[2] + 0.5 * np.eye(8)[1]
    queries[7] = np.arange(8, 0, -1)
    accuracy = contrastive.retrieval_accuracy(contrastive.normalise(jnp.asarray(queries)), keys)
    np.testing.assert_allclose(accuracy["top1"], 6 / 8)
    np.testing.assert_allclose(accuracy["top5"], 7 / 8)


def test_collapsed_features_and_nan_do_not_look_accurate():
    same = jnp.ones((10, 4)) / 2
    accuracy = contrastive.retrieval_accuracy(same, same)
    np.testing.assert_allclose([accuracy["top1"], accuracy["top5"]], [1 / 10, 5 / 10])
    nothing = contrastive.retrieval_accuracy(same * jnp.nan, same)
    np.testing.assert_allclose([nothing["top1"], nothing["top5"]], 0)
