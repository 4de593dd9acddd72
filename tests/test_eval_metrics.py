"""Zero-shot and retrieval metrics against their definitions, written out as plainly as possible."""

import numpy as np
import pytest

from declip_jax.evals.retrieval import retrieval
from declip_jax.evals.zeroshot import zeroshot

ROWS, WIDTH, CLASSES, CAPTIONS = 500, 16, 40, 3


def _features(rng, rows):
    """Multiples of 1/4: dot products are exact in any order, and thousands of them are equal."""
    return rng.integers(-2, 3, (rows, WIDTH)).astype(np.float32) / 4


def _order(query, candidates):
    """Candidates by falling score; where scores are equal, the one with the lower index first."""
    scores = [float(np.dot(query, candidate)) for candidate in candidates]
    return sorted(range(len(candidates)), key=lambda index: (-scores[index], index))


def _ties(queries, candidates):
    """How many of the queries have more than one best candidate."""
    scores = queries @ candidates.T
    return int(((scores == scores.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())


@pytest.mark.parametrize("seed", range(3))
def test_zeroshot_by_its_definition(seed):
    rng = np.random.default_rng(seed)
    images, classes = _features(rng, ROWS), _features(rng, CLASSES)
    classes[30:] = classes[:10]
    assert _ties(images, classes) > 100
    orders = [_order(image, classes) for image in images]
    # One of the first seven, so that no metric is trivial.
    labels = np.array([order[rng.integers(7)] for order in orders])

    first = [order[0] == label for order, label in zip(orders, labels, strict=True)]
    fifth = [label in order[:5] for order, label in zip(orders, labels, strict=True)]
    per_class = []
    for own in sorted(set(labels)):
        right = [hit for hit, label in zip(first, labels, strict=True) if label == own]
        per_class.append(sum(right) / len(right))

    batches = [
        {"image": images[start : start + 64], "label": labels[start : start + 64]}
        for start in range(0, ROWS, 64)
    ]
    metrics, confusion = zeroshot(lambda features: features, batches, classes)
    assert metrics == {
        "top1": sum(first) / ROWS,
        "top5": sum(fifth) / ROWS,
        "mean_per_class": np.mean(per_class),
        "images": ROWS,
    }
    counted = np.zeros((CLASSES, CLASSES), int)
    for order, label in zip(orders, labels, strict=True):
        counted[label][order[0]] += 1
    np.testing.assert_array_equal(confusion, counted)


@pytest.mark.parametrize("block", [64, 1024])
def test_retrieval_by_its_definition(block):
    rng = np.random.default_rng(7)
    images, texts = _features(rng, ROWS), _features(rng, ROWS * CAPTIONS)
    image_of_text = np.repeat(np.arange(ROWS), CAPTIONS)
    # captions that resemble their image, so that recall is not that of chance
    texts[::2] = np.round((texts[::2] + images[image_of_text[::2]]) * 2) / 4
    assert _ties(images, texts) > 50 and _ties(texts, images) > 50

    to_text, to_image = [], []
    for image, query in enumerate(images):
        order = _order(query, texts)
        to_text.append(min(order.index(text) for text in np.flatnonzero(image_of_text == image)))
    for text, query in enumerate(texts):
        to_image.append(_order(query, images).index(image_of_text[text]))

    expected = {"images": ROWS, "texts": ROWS * CAPTIONS}
    for way, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            expected[f"{way}_r{k}"] = sum(rank < k for rank in ranks) / len(ranks)
        expected[f"{way}_median_rank"] = float(np.median(ranks)) + 1
    assert 0 < expected["image_to_text_r1"] < expected["image_to_text_r10"] < 1
    assert retrieval(images, texts, image_of_text, block=block) == expected
