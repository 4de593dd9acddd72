from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip_jax.evals import probe
from declip_jax.evals.probe import few_shot, fit, linear_probe
from declip_jax.parallel.mesh import make_mesh

CLASSES = 10


@pytest.fixture(scope="module")
def digits():
    """train, train_labels, validation, validation_labels, test, test_labels: real features."""
    features, labels = load_digits(return_X_y=True)
    features = features.astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.split(order, [700, 1000])
    return [array[part] for part in parts for array in (features, labels)]


@pytest.fixture(scope="module")
def cifar10():
    """The same of CIFAR-10: a tenth of a sample of it, as configs/cifar10.py's CLIP sees it."""
    with np.load(Path(__file__).parent / "features" / "cifar10.npz") as stored:
        data = {name: stored[name] for name in stored}
    train, labels = data["train"].astype(np.float32), data["train_labels"].astype(np.int32)
    test, test_labels = data["test"].astype(np.float32), data["test_labels"].astype(np.int32)
    return [train[:1500], labels[:1500], train[3000:], labels[3000:], test, test_labels]


def _place(features, labels, mesh=None):
    """What `fit` takes, of all examples, and where it begins."""
    put = probe._Placement(features, mesh)
    ones = np.ones(len(features), np.float32)
    placed = put.features(features), put.rows(labels.astype(np.int32)), put.rows(ones)
    return placed, put.zeros(CLASSES)


def _objective(weight, bias, features, labels, strength):
    logits = features.astype(np.float64) @ weight + bias
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return losses.sum() + strength / 2 * (weight**2).sum()


@pytest.mark.parametrize(
    "data, strength",
    [
        *(("digits", np.float64(strength)) for strength in (1e-3, 1e-1, 1.0, 10.0, 1e3)),
        *(("cifar10", np.float64(strength)) for strength in (1e-1, 1.0, 10.0)),
    ],
)
def test_equals_scikit_learn(data, strength, request):
    train, train_labels, _, _, test, test_labels = request.getfixturevalue(data)
    expected = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=10_000).fit(
        train.astype(np.float64), train_labels
    )
    placed, start = _place(train, train_labels)
    weight, bias = map(np.float64, fit(*placed, strength, start))
    bias = bias - train.mean(axis=0) @ weight  # the placed features have no mean

    objective = _objective(weight, bias, train, train_labels, strength)
    lowest = _objective(expected.coef_.T, expected.intercept_, train, train_labels, strength)
    assert objective == pytest.approx(lowest, rel=2e-4, abs=0)
    accuracy = ((test @ weight + bias).argmax(axis=1) == test_labels).mean()
    assert accuracy == pytest.approx(expected.score(test, test_labels), abs=0.002)


def test_linear_probe_is_fitted_to_train_and_validation(digits):
    train, train_labels, validation, validation_labels, test, test_labels = digits
    result = linear_probe(*digits, CLASSES)
    expected = LogisticRegression(C=1 / result["lambda"], tol=1e-6, max_iter=10_000).fit(
        np.concatenate([train, validation]).astype(np.float64),
        np.concatenate([train_labels, validation_labels]),
    )
    taken = expected.predict(test)
    assert result["top1"] == pytest.approx((taken == test_labels).mean(), abs=0.002)
    per_class = [(taken[test_labels == c] == c).mean() for c in range(CLASSES)]
    assert result["mean_per_class"] == pytest.approx(np.mean(per_class), abs=0.002)
    assert result["top1"] < result["top5"] <= 1 and result["images"] == 797

    # The λ is at least as good on the validation split as scikit-learn's at any of these.
    accuracies = {
        strength: LogisticRegression(C=1 / strength, max_iter=10_000)
        .fit(train.astype(np.float64), train_labels)
        .score(validation, validation_labels)
        for strength in (1e-2, 1.0, 1e2, result["lambda"])
    }
    assert accuracies[result["lambda"]] >= max(accuracies.values()) - 0.002


@pytest.mark.parametrize(
    "peak, indices",
    [
        (48 + 13, [*range(96, -1, -16), 56, 72, 60, 68, 58, 62, 59, 61]),
        (0, [*range(96, -1, -16), 8, 4, 2, 1]),
        (None, [*range(96, -1, -16), 40, 56, 44, 52, 46, 50, 47, 49]),
    ],
    ids=["inside", "at an end", "all equally good"],
)
def test_sweep_halves_its_steps_around_the_best(monkeypatch, peak, indices):
    tried = []

    def fit(features, labels, weights, strength, start):
        tried.append(int(round(np.log10(strength) * 8)) + 48)
        return tried[-1]

    def metrics(index, *_):
        return {"top1": 1.0 if peak is None else -abs(index - peak)}

    monkeypatch.setattr(probe, "fit", fit)
    monkeypatch.setattr(probe, "_metrics", metrics)
    strength, index = probe._sweep(*[None] * 6)
    assert tried == indices
    assert index == (48 if peak is None else peak)
    assert strength == pytest.approx(10 ** (index / 8 - 6))


@pytest.mark.mesh
def test_sharded_in_blocks_equals_one_device(digits, monkeypatch):
    features, labels = np.concatenate(digits[0:3:2]), np.concatenate(digits[1:4:2])
    placed, start = _place(features, labels)
    expected = fit(*placed, np.float64(0.1), start)
    one = linear_probe(*digits, CLASSES)

    monkeypatch.setattr(probe, "BLOCK", 32)
    mesh = make_mesh(data=4, fsdp=2)
    placed, start = _place(features, labels, mesh)
    assert placed[0].shape == (4, 256, 64)  # 1,000 examples, and 24 rows that do not count
    assert placed[0].sharding.shard_shape(placed[0].shape) == (4, 32, 64)
    for actual, reference in zip(fit(*placed, np.float64(0.1), start), expected, strict=True):
        np.testing.assert_allclose(actual, reference, atol=2e-3)
    assert linear_probe(*digits, CLASSES, mesh) == pytest.approx(one, abs=0.002)


def test_few_shot_equals_fits_to_the_drawn_examples(digits):
    train, train_labels, validation, validation_labels, test, test_labels = digits
    result = few_shot(*digits, CLASSES, shots=(1, 4, 16, 1000), seeds=2)
    names = {f"top1_{k}_shot{end}" for k in (1, 4, 16) for end in ("", "_std")}
    assert result.keys() == names | {"images"}  # no class has 1,000 examples
    assert 0.3 < result["top1_1_shot"] < result["top1_4_shot"] < result["top1_16_shot"] < 1

    top1 = []
    for seed in range(2):
        rows, place = probe._draw(train_labels, 16, seed)
        rows = rows[place < 4]
        assert (np.bincount(train_labels[rows]) == 4).all()
        chosen, _ = probe._draw(validation_labels, 4, seed)
        alone = train[rows], train_labels[rows], validation[chosen], validation_labels[chosen]
        placed, start = _place(*alone[:2])
        put = probe._Placement(alone[0], None)
        _, classifier = probe._sweep(*placed, put.features(alone[2]), alone[3], start)
        top1.append(probe._metrics(classifier, put.features(test), test_labels)["top1"])
    assert result["top1_4_shot"] == pytest.approx(np.mean(top1), abs=0.002)
    assert result["top1_4_shot_std"] == pytest.approx(np.std(top1), abs=0.002)


def test_drawn_examples_follow_from_seed_and_own_class_alone():
    labels = np.repeat([0, 1, 2], [5, 9, 2])
    rows, place = probe._draw(labels, 4, seed=0)
    assert labels[rows].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert place.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert len(set(rows)) == len(rows)
    fewer, _ = probe._draw(labels, 2, seed=0)
    assert set(fewer) == set(rows[place < 2])
    elsewhere, _ = probe._draw(np.concatenate([[2] * 7, labels]), 4, seed=0)
    np.testing.assert_array_equal(elsewhere[:8] - 7, rows[:8])
    assert probe._draw(labels, 4, seed=1)[0].tolist() != rows.tolist()


def test_refuses_what_cannot_be_fitted(digits):
    def run(probe=linear_probe, **changed):
        names = ("train", "validation", "test")
        given = {
            name + end: array[:50]
            for name, pair in zip(names, zip(digits[::2], digits[1::2], strict=True), strict=True)
            for end, array in zip(("", "_labels"), pair, strict=True)
        }
        probe(**given | {"classes": CLASSES} | changed)

    train, train_labels, *_, test, test_labels = digits
    with pytest.raises(ValueError, match="validation: no features; the split is empty"):
        run(validation=train[:0], validation_labels=train_labels[:0])
    with pytest.raises(ValueError, match=r"test: label -1 is outside \[0, 10\)"):
        run(test_labels=np.full(50, -1))
    with pytest.raises(ValueError, match="train: class 10 has no examples"):
        run(classes=11)
    with pytest.raises(ValueError, match="test: features are not finite"):
        run(test=test[:50] * np.nan)
    with pytest.raises(ValueError, match=r"train: expected.*\(50, 64\) and \(49,\)"):
        run(train_labels=train_labels[:49])
    with pytest.raises(ValueError, match="different widths: 64, 64, 63"):
        run(test=test[:50, :63])
    with pytest.raises(ValueError, match=r"shots=\(64,\): the smallest class has \d training"):
        run(few_shot, shots=(64,))
    with pytest.raises(ValueError, match="seeds=0: expected numbers of at least 1"):
        run(few_shot, seeds=0)
    for shots in ((), (0, 1)):
        with pytest.raises(ValueError, match=r"shots=\(.*\), seeds=3: expected"):
            run(few_shot, shots=shots)
