import numpy as np
import pytest

from declip_jax.evals.zeroshot import class_embeddings, per_class, zeroshot


def _unit(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _encode_texts(texts):
    letters = [[ord(letter) for letter in text[:8].ljust(8)] for text in texts]
    return _unit(np.array(letters, np.float32) - 80)


def test_class_embeddings_equal_plain_numpy():
    names, templates = ["cat", "dog", "{}"], ["a {}.", "{} {}", "the {}"]
    embeddings = class_embeddings(_encode_texts, names, templates)
    expected = [
        _unit(_encode_texts([f"a {name}.", f"{name} {name}", f"the {name}"]).mean(axis=0))
        for name in names
    ]
    np.testing.assert_allclose(embeddings, expected, rtol=1e-6)
    assert embeddings.dtype == np.float32


@pytest.mark.parametrize("block, largest", [(7, 6), (2, 3), (1000, 30)])
def test_class_embeddings_in_blocks_are_the_same(block, largest):
    names, templates = [f"{letter} thing" for letter in "abcdefghij"], ["a {}.", "{}", "the {}"]
    sizes = []

    def encode_texts(texts):
        sizes.append(len(texts))
        return _encode_texts(texts)

    embeddings = class_embeddings(encode_texts, names, templates, block=block)
    expected = class_embeddings(_encode_texts, names, templates)
    np.testing.assert_array_equal(embeddings, expected)
    assert max(sizes) == largest and sum(sizes) == 30


def test_class_embeddings_refuse_unusable_prompts():
    def run(names, templates):
        class_embeddings(_encode_texts, names, templates)

    run(["cat"], ["a {}"])
    with pytest.raises(ValueError, match="class_names is empty"):
        run([], ["a {}"])
    with pytest.raises(ValueError, match="crane"):
        run(["crane", "cat", "crane"], ["a {}"])
    shared = ["crane", "cat", "crane"], ["a {}"]
    embeddings = class_embeddings(_encode_texts, *shared, repeated_names=True)
    np.testing.assert_array_equal(embeddings[0], embeddings[2])
    with pytest.raises(ValueError, match="templates is empty"):
        run(["cat"], [])
    with pytest.raises(ValueError, match="'a photo of a dog' has no {}"):
        run(["cat"], ["a {}", "a photo of a dog"])


def _encode_image(image):
    """The features are in the pixels, on a grid on which dot products are exact."""
    return image.reshape(len(image), -1)[:, :48].astype(np.float32) / 8 - 16


def _batches(image, label, size):
    for start in range(0, len(image), size):
        yield {"image": image[start : start + size], "label": label[start : start + size]}


@pytest.mark.parametrize("size", [7, 500])
def test_zeroshot_equals_plain_numpy(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (500, 4, 4, 3), np.uint8)
    classes = rng.integers(-8, 9, (30, 48)).astype(np.float32) / 8
    classes[20:] = classes[:10]  # ten classes tie with another for every image
    scores = _encode_image(image) @ classes.T
    # labels near the top, so that no metric is 0 or 1; the last three classes have no images
    label = np.argsort(-scores, axis=1)[np.arange(500), rng.integers(0, 9, 500)].astype(np.int32)
    label[label >= 27] -= 20
    order = np.argsort(-scores, axis=1, kind="stable")
    top1 = order[:, 0] == label
    per_class = [top1[label == c].mean() for c in range(30) if (label == c).any()]
    assert len(per_class) < 30

    metrics, confusion = zeroshot(_encode_image, _batches(image, label, size), classes)
    assert metrics == {
        "top1": top1.mean(),
        "top5": (order[:, :5] == label[:, None]).any(axis=1).mean(),
        "mean_per_class": pytest.approx(np.mean(per_class)),
        "images": 500,
    }
    assert 0 < metrics["top1"] < metrics["top5"] < 1
    for row in range(30):
        expected = [((label == row) & (order[:, 0] == column)).sum() for column in range(30)]
        np.testing.assert_array_equal(confusion[row], expected)
    assert confusion.dtype == np.int64


def test_top5_of_fewer_classes():
    image = np.zeros((4, 4, 4, 3), np.uint8)
    classes = np.ones((3, 48), np.float32)
    metrics, _ = zeroshot(_encode_image, _batches(image, np.array([0, 1, 2, 2]), 4), classes)
    assert metrics == {
        "top1": 0.25,
        "top5": 1.0,
        "mean_per_class": pytest.approx(1 / 3),
        "images": 4,
    }


def test_zeroshot_refuses_unusable_sets():
    image, classes = np.zeros((2, 4, 4, 3), np.uint8), np.ones((3, 48), np.float32)
    with pytest.raises(ValueError, match="empty"):
        zeroshot(_encode_image, [], classes)
    with pytest.raises(ValueError, match="no classes.*class folders"):
        zeroshot(_encode_image, [{"image": image}], classes)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"label {wrong} is outside \[0, 3\)"):
            zeroshot(_encode_image, [{"image": image, "label": np.array([0, wrong])}], classes)
    with pytest.raises(ValueError, match="not finite"):
        zeroshot(_encode_image, [{"image": image, "label": np.array([0, 1])}], classes * np.nan)


def test_per_class():
    confusion = np.diag([6, 4, 0, 0, 1])
    confusion[0, 1:] = 1, 2, 1, 1
    confusion[3, 0], confusion[4, 3] = 5, 9
    assert per_class(confusion, ["ant", "bee", "cow", "dog", "elk"]) == [
        {
            "name": "ant",
            "images": 11,
            "accuracy": pytest.approx(6 / 11),
            "taken_for": [["cow", 2], ["bee", 1], ["dog", 1]],
        },
        {"name": "bee", "images": 4, "accuracy": 1.0, "taken_for": []},
        {"name": "dog", "images": 5, "accuracy": 0.0, "taken_for": [["ant", 5]]},
        {"name": "elk", "images": 10, "accuracy": 0.1, "taken_for": [["dog", 9]]},
    ]
    with pytest.raises(ValueError, match="2 names for 5 classes"):
        per_class(confusion, ["ant", "bee"])
