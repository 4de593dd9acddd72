"""Accuracies and the confusion from scores, for every way of classifying."""

from collections.abc import Iterable

import numpy as np


def accuracies(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], classes: int
) -> tuple[dict[str, float], np.ndarray]:
    """Counts how often the right class has the highest score; of equal ones, the first class has.

    Args:
      blocks: (scores [b, C], labels int [b]) in turn; b may vary.
      classes: C.

    Returns:
      top1, top5: fractions of images; mean_per_class: top1 within each class, averaged over the
      classes that have images; images: how many there were.
      int64 [C, C], how many images of the class of the row were taken for that of the column.

    Raises ValueError: no images, a label outside [0, C), scores that are not finite.
    """
    confusion = np.zeros((classes, classes), np.int64)
    top5 = 0
    for scores, labels in blocks:
        labels = np.asarray(labels)
        _check_labels(labels, classes)
        if not np.isfinite(scores).all():
            raise ValueError("image or class features are not finite: the model has diverged")
        own = np.take_along_axis(scores, labels[:, None], axis=1)  # [b, 1]
        before = np.arange(classes) < labels[:, None]  # [b, C]
        rank = ((scores > own) | ((scores == own) & before)).sum(axis=1)  # [b]
        top5 += int((rank < 5).sum())
        np.add.at(confusion, (labels, scores.argmax(axis=1)), 1)
    images_of_class = confusion.sum(axis=1)
    images = int(images_of_class.sum())
    if not images:
        raise ValueError("batches held no images: the evaluation set is empty")
    right_of_class = confusion.diagonal()
    present = images_of_class > 0
    metrics = {
        "top1": float(right_of_class.sum() / images),
        "top5": top5 / images,
        "mean_per_class": float((right_of_class[present] / images_of_class[present]).mean()),
        "images": images,
    }
    return metrics, confusion


def check_splits(classes: int, **splits: tuple[np.ndarray, np.ndarray]) -> None:
    """Raises ValueError unless all have finite features [N, D], D in common, and labels int [N] in
    [0, C)."""
    for name, (features, labels) in splits.items():
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name}: expected features [N, D] and labels [N], got {features.shape} and "
                f"{labels.shape}"
            )
        if not len(features):
            raise ValueError(f"{name}: no features; the split is empty")
        _check_labels(labels, classes, f"{name}: ")
        if not np.isfinite(features).all():
            raise ValueError(f"{name}: features are not finite: the model has diverged")
    widths = [features.shape[1] for features, _ in splits.values()]
    if len(set(widths)) > 1:
        raise ValueError(
            f"the features of {', '.join(splits)} have different widths: "
            f"{', '.join(map(str, widths))}"
        )


def _check_labels(labels: np.ndarray, classes: int, where: str = "") -> None:
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.size:
        raise ValueError(
            f"{where}label {outside[0]} is outside [0, {classes}): the classes and the labels come "
            "from different sets, or this split is not labeled"
        )
