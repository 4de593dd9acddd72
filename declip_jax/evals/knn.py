"""Classification by the nearest neighbors of an image among training images.

Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4, with the k = 20 of Caron et al. 2021
(DINO), https://arxiv.org/abs/2104.14294.
"""

import numpy as np
from jax.sharding import Mesh

from declip_jax.evals.classification import accuracies, check_splits
from declip_jax.evals.retrieval import top_matches


def knn(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    neighbors: int = 20,
    temperature: float = 0.07,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Accuracies of the class with most votes.

    The training images with the highest cosines (of equal ones, the first) vote for their classes
    with the weight exp(cosine / temperature). Classes without votes are all equally bad, so top5
    counts the first of them if neighbors are of fewer than five classes.

    Args:
      train, test: float32 [N, D], unit rows.
      train_labels, test_labels: int [N].
      classes: C; labels lie in [0, C).
      neighbors: that vote, or all training images if there are fewer.
      temperature: of the weights.
      mesh: the test images are divided over its devices; None for one device.

    Returns:
      top1, top5, mean_per_class, images, see `classification.accuracies`.

    Raises:
      ValueError: an empty split, shapes that do not fit, a label outside [0, C), features that are
      not finite, neighbors below 1 or a temperature that is not above 0.
    """
    check_splits(classes, train=(train, train_labels), test=(test, test_labels))
    if neighbors < 1:
        raise ValueError(f"neighbors={neighbors}: expected at least one")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number above 0")
    nearest = top_matches(test, train, neighbors, mesh=mesh)  # [N, k]

    def voted(block=1024):
        for start in range(0, len(test), block):
            rows = nearest[start : start + block]  # [b, k]
            # [b, k, D] @ [b, D, 1] -> [b, k]
            cosines = (train[rows] @ test[start : start + block, :, None])[..., 0]
            # Less the highest, which divides all votes by one number: no temperature overflows.
            weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / temperature)
            votes = np.zeros((len(rows), classes))
            np.add.at(votes, (np.arange(len(rows))[:, None], train_labels[rows]), weights)
            yield votes, test_labels[start : start + block]

    metrics, _ = accuracies(voted(), classes)
    return metrics
