import numpy as np
import pytest

from declip_jax.evals.knn import knn


def _set(rows, seed):
    """Features on a grid on which cosines are exact, many of them equal."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, rows)
    features = np.eye(6)[labels] + rng.normal(size=(rows, 6))
    return (np.round(features * 2) / 4).astype(np.float32), labels


@pytest.mark.parametrize("neighbors", [1, 20, 5000])
def test_equals_plain_numpy(neighbors):
    (train, train_labels), (test, test_labels) = _set(1300, 0), _set(1100, 1)
    cosines = test @ train.T
    right, top5 = np.zeros(1100, bool), np.zeros(1100, bool)
    for row, label in enumerate(test_labels):
        votes = np.zeros(7)  # the last class has no images
        for index in np.argsort(-cosines[row], kind="stable")[:neighbors]:
            votes[train_labels[index]] += np.exp(cosines[row, index] / 0.5)
        order = np.argsort(-votes, kind="stable")
        right[row], top5[row] = order[0] == label, label in order[:5]

    assert knn(train, train_labels, test, test_labels, 7, neighbors, 0.5) == {
        "top1": right.mean(),
        "top5": top5.mean(),
        "mean_per_class": pytest.approx(
            np.mean([right[test_labels == label].mean() for label in range(6)])
        ),
        "images": 1100,
    }
    assert 0.2 < right.mean() < 0.9


def test_nearer_neighbors_weigh_more():
    train = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    labels, test = np.array([0, 1, 1]), np.array([[1, 0]], np.float32)

    def top1(temperature, label):
        return knn(train, labels, test, np.array([label]), 2, 3, temperature)["top1"]

    assert top1(10, 1) == 1 and top1(0.07, 0) == 1  # two against one, unless nearness decides
    assert top1(1e-4, 0) == 1  # exp(cosine / temperature) itself would overflow


def test_refuses_what_cannot_be_classified():
    train, labels = np.eye(3, dtype=np.float32), np.arange(3)

    def run(classes=3, **changed):
        arrays = dict(train=train, train_labels=labels, test=train, test_labels=labels)
        knn(**arrays | {"classes": classes} | changed)

    run()
    with pytest.raises(ValueError, match="train: no features; the split is empty"):
        run(train=train[:0], train_labels=labels[:0])
    with pytest.raises(ValueError, match=r"train: label 2 is outside \[0, 2\)"):
        run(classes=2)
    with pytest.raises(ValueError, match=r"test: expected.*\(3, 3\) and \(2,\)"):
        run(test_labels=labels[:2])
    with pytest.raises(ValueError, match="test: features are not finite"):
        run(test=train * np.nan)
    with pytest.raises(ValueError, match="train, test have different widths: 3, 2"):
        run(test=train[:, :2])
    with pytest.raises(ValueError, match="neighbors=0"):
        run(neighbors=0)
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature={temperature}"):
            run(temperature=temperature)
