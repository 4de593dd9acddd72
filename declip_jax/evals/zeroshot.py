"""Zero-shot classification: an image belongs to the class whose prompts it resembles most.

Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from declip_jax.evals.classification import accuracies


def class_embeddings(
    encode_texts: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    repeated_names: bool = False,
    block: int = 16384,
) -> np.ndarray:
    """One unit vector a class: the mean over its prompts' unit features, normalized again.

    Args:
      encode_texts: B texts -> float32 [B, D], unit rows.
      class_names: C names, as they should read in a sentence.
      templates: T prompts, each with a `{}` where the name goes.
      repeated_names: whether classes may share a name. Those of ImageNet in published lists do (two
        missiles, two sunglasses); in other data it is a mistake.
      block: prompts whose features are in memory at a time (those of a class stay together).

    Returns:
      float32 [C, D], rows in the order of `class_names`.

    Raises:
      ValueError: no class names, repeated ones unless that is said to be right, no templates, a
      template without `{}`.
    """
    check_prompts(class_names, templates, repeated_names=repeated_names)
    count, embeddings = len(templates), []
    step = max(1, block // count)
    for start in range(0, len(class_names), step):
        names = class_names[start : start + step]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        # [b*T, D] -> [b, T, D] -> [b, D]
        means = encode_texts(prompts).reshape(len(names), count, -1).mean(axis=1)
        embeddings.append(means / np.linalg.norm(means, axis=1, keepdims=True))
    return np.concatenate(embeddings).astype(np.float32)


def check_prompts(
    class_names: Sequence[str], templates: Sequence[str], *, repeated_names: bool = False
) -> None:
    """Raises ValueError as `class_embeddings` says."""
    if not class_names:
        raise ValueError("class_names is empty: zero-shot classification needs named classes")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated and not repeated_names:
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


def zeroshot(
    encode_image: Callable[[np.ndarray], np.ndarray],
    batches: Iterable[dict],
    class_embeddings: np.ndarray,
) -> tuple[dict[str, float], np.ndarray]:
    """Takes for each image the class with the highest cosine; of equal ones, the first.

    Args:
      encode_image: uint8 [B, H, W, 3] -> float32 [B, D], unit rows.
      batches: {"image": uint8 [b, H, W, 3], "label": int [b]}, other fields ignored; b may vary.
      class_embeddings: [C, D], unit rows.

    Returns:
      metrics and confusion, see `classification.accuracies`.

    Raises ValueError: no images, no labels, a label outside [0, C), features that are not finite.
    """

    def scored():
        for batch in batches:
            if "label" not in batch:
                raise ValueError(
                    "batches have no 'label': this set has no classes. Zero-shot classification "
                    "needs a set prepared from class folders; a captioned set is evaluated by "
                    "retrieval"
                )
            yield encode_image(batch["image"]) @ class_embeddings.T, batch["label"]

    return accuracies(scored(), len(class_embeddings))


def per_class(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict]:
    """What became of each class that has images, in the order of the classes.

    Args:
      confusion: int [C, C], of `zeroshot`.
      class_names: C names.

    Returns:
      dicts of name, images, accuracy, and taken_for: [name, images] of the at most three other
      classes that most of its images were taken for, most first; of equal ones, the first class.

    Raises ValueError: names that do not match the confusion.
    """
    if len(class_names) != len(confusion):
        raise ValueError(f"class_names: {len(class_names)} names for {len(confusion)} classes")
    table = []
    for index, row in enumerate(confusion):
        images = int(row.sum())
        if images:
            wrong = row.copy()
            wrong[index] = 0
            worst = np.argsort(-wrong, kind="stable")[:3]
            taken_for = [[class_names[c], int(wrong[c])] for c in worst if wrong[c]]
            known = dict(name=class_names[index], images=images)
            table.append(known | dict(accuracy=float(row[index] / images), taken_for=taken_for))
    return table
