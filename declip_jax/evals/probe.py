"""Linear probes: multinomial logistic regression on frozen features, with many or few examples.

The protocol is that of Radford et al. 2021, https://arxiv.org/abs/2103.00020, appendix A.3: L-BFGS
with at most 1,000 iterations, its regularization λ chosen on a validation split.

The objective is that of scikit-learn's LogisticRegression with C = 1/λ,

  Σᵢ cross_entropy(features[i] · weight + bias, labels[i]) + λ/2 ‖weight‖²

(the bias is free), divided by the number of examples. It is minimized on the devices in float32.

Features lie there whole, N · D · 4 bytes divided over the devices of the mesh: 2.6 GB for the 1.3
million rows of 512 of ImageNet. Logits are made and dropped in blocks of `BLOCK` rows a device.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from declip_jax.evals.classification import accuracies, check_splits

GRID = 10.0 ** (np.arange(97) / 8 - 6)  # 1e-6 … 1e6 in 96 steps, eight a decade
MAX_ITERATIONS = 1000
# ‖gradient‖ at which a fit ends, as a fraction of that of the zero classifier. An absolute bound
# would end at once where there are many classes, as each has a small part in the mean loss.
TOLERANCE = 1e-5
BLOCK = 16384


class Classifier(NamedTuple):
    weight: jax.Array  # float32 [D, C]
    bias: jax.Array  # float32 [C]


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Accuracies on the test split of a classifier fitted to the two others.

    λ is the one with the highest top-1 accuracy on the validation split of classifiers fitted to
    the training split (see `_sweep`); the classifier tested is fitted to both splits with that λ.

    Args:
      train, validation, test: float32 [N, D] features.
      train_labels, validation_labels, test_labels: int [N].
      classes: C; labels lie in [0, C).
      mesh: the rows are divided over its devices; None for one device.

    Returns:
      top1, top5, mean_per_class, images, see `classification.accuracies`; lambda.

    Raises:
      ValueError: an empty split, shapes that do not fit, a label outside [0, C), a class without
      training examples, features that are not finite.
    """
    _check(train, train_labels, validation, validation_labels, test, test_labels, classes)
    put = _Placement(train, mesh)
    features = put.features(np.concatenate([train, validation]))
    labels = put.rows(np.concatenate([train_labels, validation_labels]).astype(np.int32))
    # Examples to be validated on have weight 0 at first: one compiled program fits either way.
    both = np.ones(len(train) + len(validation), np.float32)
    alone = np.where(np.arange(len(both)) < len(train), both, 0)
    examples = features, labels, put.rows(alone)
    judges = put.features(validation), validation_labels
    strength, classifier = _sweep(*examples, *judges, put.zeros(classes))
    classifier = fit(features, labels, put.rows(both), strength, classifier)
    metrics = _metrics(classifier, put.features(test), test_labels)
    return metrics | {"lambda": float(strength)}


def few_shot(
    train: np.ndarray,
    train_labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: int = 3,
) -> dict[str, float]:
    """Top-1 accuracy of linear probes that see only a few training examples of each class.

    λ is chosen as by `linear_probe`, on min(shots, 4) validation examples a class (or as many as
    there are), as by Zhou et al. 2022, https://arxiv.org/abs/2109.01134; these are not trained on.
    The examples of a class are a function of the seed, the class and the order of that class's
    own records, and those of more shots include those of fewer. A number of shots that some class
    has not the training examples for is left out of the result. So few rows are not divided: one
    device fits them.

    Args:
      train … classes: as for `linear_probe`.
      shots: training examples a class.
      seeds: draws, with the seeds 0, 1, ….

    Returns:
      top1_{k}_shot, the mean over the seeds, and top1_{k}_shot_std, the standard deviation, for
      each k of `shots`; images, the number of test images.

    Raises:
      ValueError: as `linear_probe`; shots or seeds below 1; no number of shots that every class has
      examples for.
    """
    _check(train, train_labels, validation, validation_labels, test, test_labels, classes)
    if min(shots, default=0) < 1 or seeds < 1:
        raise ValueError(f"shots={tuple(shots)}, seeds={seeds}: expected numbers of at least 1")
    fewest = int(np.bincount(train_labels, minlength=classes).min())
    possible = [k for k in shots if k <= fewest]
    if not possible:
        raise ValueError(
            f"shots={tuple(shots)}: the smallest class has {fewest} training examples; ask for "
            f"1 … {fewest}"
        )
    put = _Placement(train, None)
    test_features = put.features(test)
    top1 = {k: [] for k in possible}
    for seed in range(seeds):
        # Those of fewer shots are weights over those of most: one compiled program fits them all.
        rows, place = _draw(train_labels, max(possible), seed)
        features = put.features(train[rows])
        labels = put.rows(train_labels[rows].astype(np.int32))
        held_out, held_out_place = _draw(validation_labels, 4, seed)
        for k in possible:
            examples = features, labels, put.rows((place < k).astype(np.float32))
            chosen = held_out[held_out_place < k]
            judges = put.features(validation[chosen]), validation_labels[chosen]
            _, classifier = _sweep(*examples, *judges, put.zeros(classes))
            top1[k].append(_metrics(classifier, test_features, test_labels)["top1"])
    result = {}
    for k, values in top1.items():
        result[f"top1_{k}_shot"] = float(np.mean(values))
        result[f"top1_{k}_shot_std"] = float(np.std(values))
    return result | {"images": len(test)}


@jax.jit
def fit(features, labels, weights, strength, start: Classifier) -> Classifier:
    """Minimizes the objective of this module, which is convex, by L-BFGS.

    Args:
      features: float32 [n, b, D], n blocks of examples; they are computed with one at a time.
      labels: int32 [n, b].
      weights: float32 [n, b], of the examples in the sum; 0 leaves one out.
      strength: λ.
      start: the first guess.

    Returns:
      where the gradient is small (`TOLERANCE`), or what `MAX_ITERATIONS` have come to.
    """
    count = weights.sum()

    def objective(classifier):
        @jax.checkpoint  # keeps no logits for the gradient: they are the largest arrays by far
        def add(total, block):
            x, y, w = block
            losses = optax.softmax_cross_entropy_with_integer_labels(_logits(classifier, x), y)
            return total + (w * losses).sum(), None

        total, _ = jax.lax.scan(add, jnp.zeros(()), (features, labels, weights))
        return (total + strength / 2 * (classifier.weight**2).sum()) / count

    linesearch = optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one")
    solver = optax.lbfgs(linesearch=linesearch)
    value_and_grad = optax.value_and_grad_from_state(objective)
    zeros = jax.tree.map(jnp.zeros_like, start)
    small = TOLERANCE * optax.tree.norm(jax.grad(objective)(zeros))

    def unfinished(carry):
        iteration, _, gradient_norm, _ = carry
        return (iteration < MAX_ITERATIONS) & (gradient_norm > small)

    def step(carry):
        iteration, classifier, _, state = carry
        value, gradient = value_and_grad(classifier, state=state)
        updates, state = solver.update(
            gradient, state, classifier, value=value, grad=gradient, value_fn=objective
        )
        # The line search has computed the gradient at the new classifier and left it in its state.
        gradient_norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return iteration + 1, optax.apply_updates(classifier, updates), gradient_norm, state

    begin = (0, start, jnp.inf, solver.init(start))
    return jax.lax.while_loop(unfinished, step, begin)[1]


def _sweep(features, labels, weights, validation, validation_labels, start):
    """The λ of `GRID`, and its classifier, with the highest top-1 accuracy on validation examples.

    Every sixteenth λ of the grid is tried, from the largest on; then, four times, those in the
    middle between the best so far and its neighbors. Each fit begins at the one before, or at the
    best so far. Of equally good λ the nearest to 1 is taken: the very large ones leave little but
    the bias, which may choose well among classes of one size and not at all among others.
    """

    def attempt(index, start):
        classifier = fit(features, labels, weights, GRID[index], start)
        top1 = _metrics(classifier, validation, validation_labels)["top1"]
        return (top1, -abs(index - middle), index), classifier

    middle = len(GRID) // 2
    tried, classifier = [], start
    for index in range(len(GRID) - 1, -1, -16):
        tried.append(attempt(index, classifier))
        _, classifier = tried[-1]
    for step in (8, 4, 2, 1):
        (*_, center), classifier = max(tried, key=operator.itemgetter(0))
        for index in (center - step, center + step):
            if 0 <= index < len(GRID):
                tried.append(attempt(index, classifier))
    (*_, index), classifier = max(tried, key=operator.itemgetter(0))
    return GRID[index], classifier


def _metrics(classifier: Classifier, features: jax.Array, labels: np.ndarray) -> dict[str, float]:
    """`accuracies` on features [n, b, D] (the padding in the end) with labels [N]."""
    everywhere = NamedSharding(features.sharding.mesh, PartitionSpec())

    def scored():
        blocks, length, _ = features.shape
        for number in range(blocks):
            own = labels[number * length :][:length]
            scores = jax.device_put(_scores(classifier, features, number), everywhere)
            yield np.asarray(scores)[: len(own)], own

    return accuracies(scored(), len(classifier.bias))[0]


@jax.jit
def _scores(classifier: Classifier, features: jax.Array, number: int) -> jax.Array:
    """Of one block: [n, b, D] -> [b, C]."""
    return _logits(classifier, features[number])


def _logits(classifier: Classifier, features: jax.Array) -> jax.Array:
    """[b, D] -> [b, C]."""
    # The default precision rounds float32 to TF32 on GPUs and to bfloat16 on TPUs.
    product = jnp.matmul(features, classifier.weight, precision=jax.lax.Precision.HIGHEST)
    return product + classifier.bias


class _Placement:
    """Puts host arrays on the devices, in blocks.

    The mean of the training features is taken from all of them. As the bias is free, the objective
    has the same minimum, which L-BFGS then reaches in fewer steps: the features of a model have a
    large part in common.
    """

    def __init__(self, train: np.ndarray, mesh: Mesh | None):
        mesh = mesh or Mesh(jax.local_devices()[:1], ("data",))
        self._center = train.mean(axis=0)
        self._divided = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
        self._everywhere = NamedSharding(mesh, PartitionSpec())

    def features(self, features: np.ndarray) -> jax.Array:
        """[N, D] -> [n, b, D]."""
        return self.rows((features - self._center).astype(np.float32, copy=False))

    def rows(self, rows: np.ndarray) -> jax.Array:
        """[N, …] -> [n, b, …], zeros in the end; n and b follow from N."""
        devices = self._divided.mesh.size
        blocks = -(-len(rows) // (BLOCK * devices))
        length = -(-len(rows) // (blocks * devices)) * devices
        padded = np.zeros((blocks * length, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        padded = padded.reshape(blocks, length, *rows.shape[1:])
        # Every process has all rows, and gives its devices theirs.
        return jax.make_array_from_callback(padded.shape, self._divided, lambda at: padded[at])

    def zeros(self, classes: int) -> Classifier:
        width = len(self._center)
        zeros = Classifier(np.zeros((width, classes), np.float32), np.zeros(classes, np.float32))
        return jax.device_put(zeros, self._everywhere)


def _draw(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` examples of each class in random order, or all where there are fewer.

    Returns:
      int [M] numbers of rows; int [M], the place of each among those of its class.
    """
    rows = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        rows.append(np.random.default_rng((seed, label)).permutation(own)[:count])
    return np.concatenate(rows), np.concatenate([np.arange(len(own)) for own in rows])


def _check(train, train_labels, validation, validation_labels, test, test_labels, classes):
    """Raises ValueError as `linear_probe` says."""
    check_splits(
        classes,
        train=(train, train_labels),
        validation=(validation, validation_labels),
        test=(test, test_labels),
    )
    examples = np.bincount(train_labels, minlength=classes)
    if not examples.all():
        raise ValueError(f"train: class {examples.argmin()} has no examples")
