import jax
import numpy as np
import pytest

from declip_jax.evals.retrieval import collect, ranks, retrieval, top_matches
from declip_jax.parallel.mesh import make_mesh


def _features(rng, rows, width=64, grid=2.0**10):
    """Near-unit rows on a grid coarse enough that a float32 dot product has no rounding at all,
    whatever the order of summation: NumPy and the device then agree bit for bit."""
    features = rng.normal(size=(rows, width))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return (np.round(features * grid) / grid).astype(np.float32)


def _set(seed, images, texts, grid):
    rng = np.random.default_rng(seed)
    image_features, text_features = (
        _features(rng, images, grid=grid),
        _features(rng, texts, grid=grid),
    )
    # the same photograph or the same caption twice: their scores are equal for every query
    image_features[images // 2 :: 7] = image_features[0]
    text_features[texts // 2 :: 7] = text_features[1]
    image_of_text = rng.permutation(np.arange(texts) % images).astype(np.int32)
    return image_features, text_features, image_of_text


def _plain_ranks(scores, match):
    order = np.argsort(-scores, axis=1, kind="stable")  # equal scores: the lower index first
    return np.take_along_axis(match, order, axis=1).argmax(axis=1)


@pytest.mark.parametrize("grid", [2.0**10, 8.0], ids=["few ties", "mostly ties"])
@pytest.mark.parametrize(
    "block, devices",
    [(128, 1), (1024, 1), (4096, 1), pytest.param(128, 6, marks=pytest.mark.mesh)],
)
def test_ranks_and_metrics_equal_plain_numpy(grid, block, devices):
    mesh = make_mesh(devices, 1, jax.devices()[:devices])
    image, text, image_of_text = _set(0, 500, 2500, grid)
    scores = image @ text.T
    match = image_of_text == np.arange(500)[:, None]
    to_text, to_image = _plain_ranks(scores, match), _plain_ranks(scores.T, match.T)

    of_image = np.arange(500, dtype=np.int32)
    np.testing.assert_array_equal(ranks(image, text, of_image, image_of_text, block, mesh), to_text)
    np.testing.assert_array_equal(
        ranks(text, image, image_of_text, of_image, block, mesh), to_image
    )
    assert retrieval(image, text, image_of_text, ks=(1, 5, 10), block=block, mesh=mesh) == {
        "image_to_text_r1": (to_text < 1).mean(),
        "image_to_text_r5": (to_text < 5).mean(),
        "image_to_text_r10": (to_text < 10).mean(),
        "image_to_text_median_rank": np.median(to_text) + 1,
        "text_to_image_r1": (to_image < 1).mean(),
        "text_to_image_r5": (to_image < 5).mean(),
        "text_to_image_r10": (to_image < 10).mean(),
        "text_to_image_median_rank": np.median(to_image) + 1,
        "images": 500,
        "texts": 2500,
    }


@pytest.mark.parametrize(
    "k, block, devices",
    [(5, 64, 1), (100, 64, 1), (5, 1024, 1), pytest.param(5, 64, 6, marks=pytest.mark.mesh)],
)
def test_top_matches_equal_plain_numpy(k, block, devices):
    mesh = make_mesh(devices, 1, jax.devices()[:devices])
    image, text, _ = _set(1, 130, 300, grid=8.0)
    expected = np.argsort(-(text @ image.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top_matches(text, image, k, block, mesh), expected)


def test_equal_rows_are_ranked_by_index_without_exact_arithmetic():
    # Ordinary unit features, every candidate twice, 300 apart and so at other places of a tile.
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(300, 96)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    first = np.arange(300, dtype=np.int32)
    twice = np.concatenate([rows, rows])
    apart = np.concatenate([first, first + 300])
    assert (ranks(rows, twice, first, apart, block=128) == 0).all()
    assert (ranks(rows, twice, first + 300, apart, block=128) == 1).all()


def test_any_caption_of_an_image_counts():
    image = np.eye(2, dtype=np.float32)
    text = np.array([[0, 1], [1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    metrics = retrieval(image, text, np.array([0, 0, 1, 1]), ks=(1, 2))
    assert metrics["image_to_text_r1"] == 0.5  # image 0 finds text 1; image 1 finds text 0
    assert metrics["image_to_text_r2"] == 1.0
    assert metrics["text_to_image_r1"] == 0.5  # texts 1 and 2


def test_fewer_candidates_than_k():
    image, text, image_of_text = _set(3, 3, 4, grid=2.0**10)
    metrics = retrieval(image, text, image_of_text, ks=(10,))
    assert metrics["image_to_text_r10"] == metrics["text_to_image_r10"] == 1.0
    assert top_matches(text, image, k=5).shape == (4, 3)


def test_refuses_what_cannot_be_ranked():
    image, text = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    own = np.arange(3)
    with pytest.raises(ValueError, match="got 0 and 3"):
        retrieval(image[:0], text, own)
    with pytest.raises(ValueError, match=r"\(3, 3\), \(3, 2\) and \(3,\)"):
        retrieval(image, text[:, :2], own)
    with pytest.raises(ValueError, match=r"\(3, 3\), \(3, 3\) and \(2,\)"):
        retrieval(image, text, own[:2])
    with pytest.raises(ValueError, match=r"7 is outside \[0, 3\)"):
        retrieval(image, text, np.array([0, 1, 7]))
    with pytest.raises(ValueError, match="image 1 has no text"):
        retrieval(image, text, np.array([0, 2, 2]))
    with pytest.raises(ValueError, match="text_features are not finite"):
        retrieval(image, text * np.nan, own)


def _encode_image(image):
    assert image.dtype == np.uint8
    return image[:, 0, 0, :].astype(np.float32)


def _encode_texts(texts):
    return np.array([[len(text), ord(text[0]), ord(text[-1])] for text in texts], np.float32)


def test_collect_keeps_the_order_of_images_and_captions():
    image = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    batches = [
        {"image": image[:2], "captions": [["a", "bb"], ["c"]]},
        {"image": image[2:], "captions": [["d", "ee", "f"]]},
    ]
    image_features, text_features, image_of_text = collect(
        _encode_image, _encode_texts, batches, prefix="of "
    )
    np.testing.assert_array_equal(image_features, image[:, 0, 0, :])
    expected = _encode_texts(["of a", "of bb", "of c", "of d", "of ee", "of f"])
    np.testing.assert_array_equal(text_features, expected)
    np.testing.assert_array_equal(image_of_text, [0, 0, 1, 2, 2, 2])


def test_collect_refuses_sets_without_pairs():
    image = np.zeros((2, 2, 2, 3), np.uint8)

    def run(*batches):
        collect(_encode_image, _encode_texts, batches)

    with pytest.raises(ValueError, match="empty"):
        run()
    with pytest.raises(ValueError, match="image 3 has none"):
        run({"image": image, "captions": [["a"], ["b"]]}, {"image": image, "captions": [["c"], []]})
    with pytest.raises(ValueError, match="1 lists for 2 images"):
        run({"image": image, "captions": [["a"]]})
