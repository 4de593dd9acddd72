"""Zero-shot classification: an image belongs to the class whose prompts it resembles most.

Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def class_embeddings(
    encode_text: Callable[[np.ndarray], np.ndarray],
    tokenize: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str],
    templates: Sequence[str],
) -> np.ndarray:
    """One unit vector a class: the mean over its prompts' unit features, normalised again.

    Args:
      encode_text: int32 [B, L] -> float32 [B, D], unit rows; given all C*T prompts at once.
      tokenize: B texts -> int32 [B, L].
      class_names: C names, as they should read in a sentence.
      templates: T prompts, each with a `{}` where the name goes.

    Returns:
      float32 [C, D], rows in the order of `class_names`.

    Raises:
      ValueError: no or repeated class names, no templates, a template without `{}`.
    """
    if not class_names:
        raise ValueError("class_names is empty: zero-shot classification needs named classes")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"class_names: {repeated} stand for more than one class, which no prompt could tell "
            "apart; give each class a name of its own"
        )
    if not templates:
        raise ValueError("templates is empty: expected prompts such as 'a photo of a {}.'")
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"templates: {template!r} has no {{}} where the class name goes; "
                "expected a list of prompts such as 'a photo of a {}.'"
            )
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = encode_text(tokenize(prompts))
    # [C*T, D] -> [C, T, D] -> [C, D]
    means = features.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def zeroshot(
    encode_image: Callable[[np.ndarray], np.ndarray],
    batches: Iterable[dict],
    class_embeddings: np.ndarray,
) -> dict[str, float]:
    """Accuracy of taking the class with the highest cosine; of equal ones, the first.

    Args:
      encode_image: uint8 [B, H, W, 3] -> float32 [B, D], unit rows.
      batches: {"image": uint8 [b, H, W, 3], "label": int [b]}, other fields ignored; b may vary.
      class_embeddings: [C, D], unit rows.

    Returns:
      top1, top5: fractions of images; mean_per_class: top1 within each class, averaged over the
      classes that have images; images: how many there were.

    Raises:
      ValueError: no images, no labels, a label outside [0, C), features that are not finite.
    """
    classes = len(class_embeddings)
    images_of_class = np.zeros(classes, np.int64)
    top1_of_class = np.zeros(classes, np.int64)
    top5 = 0
    for batch in batches:
        if "label" not in batch:
            raise ValueError(
                "batches have no 'label': this set has no classes. Zero-shot classification needs "
                "a set prepared from class folders; a captioned set is evaluated by retrieval"
            )
        label = np.asarray(batch["label"])
        outside = label[(label < 0) | (label >= classes)]
        if outside.size:
            raise ValueError(
                f"label {outside[0]} is outside [0, {classes}): the class embeddings and the "
                "labels come from different sets, or this split is not labelled"
            )
        scores = encode_image(batch["image"]) @ class_embeddings.T  # [b, C]
        if not np.isfinite(scores).all():
            raise ValueError("image or class features are not finite: the model has diverged")
        own = np.take_along_axis(scores, label[:, None], axis=1)  # [b, 1]
        before = np.arange(classes) < label[:, None]  # [b, C]
        rank = ((scores > own) | ((scores == own) & before)).sum(axis=1)  # [b]
        np.add.at(images_of_class, label, 1)
        np.add.at(top1_of_class, label, rank < 1)
        top5 += int((rank < 5).sum())
    images = int(images_of_class.sum())
    if not images:
        raise ValueError("batches held no images: the evaluation set is empty")
    present = images_of_class > 0
    return {
        "top1": float(top1_of_class.sum() / images),
        "top5": top5 / images,
        "mean_per_class": float((top1_of_class[present] / images_of_class[present]).mean()),
        "images": images,
    }
