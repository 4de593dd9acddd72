"""Image-text retrieval: recall at k and the median rank, both ways.

Scores are computed on the device in tiles of [block, block], so memory does not grow with the
product of the two sides.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def collect(
    encode_image: Callable[[np.ndarray], np.ndarray],
    encode_texts: Callable[[Sequence[str]], np.ndarray],
    batches: Iterable[dict],
    prefix: str = "",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encodes a captioned set.

    Args:
      encode_image: uint8 [B, H, W, 3] -> float32 [B, D], unit rows.
      encode_texts: B texts -> float32 [B, D], unit rows.
      batches: {"image": uint8 [b, H, W, 3], "captions": b lists of texts}; b may vary.
      prefix: put before every caption ("a photo of ").

    Returns:
      image features [N, D]; text features [M, D], the captions image by image; int32 [M], the
      image each caption belongs to.

    Raises ValueError: no images, an image without captions, lists that do not match the images.
    """
    image_features, text_features, image_of_text = [], [], []
    images = 0
    for batch in batches:
        captions = batch["captions"]
        if len(captions) != len(batch["image"]):
            raise ValueError(
                f"captions: {len(captions)} lists for {len(batch['image'])} images; "
                "expected one list an image"
            )
        for index, texts in enumerate(captions, start=images):
            if not texts:
                raise ValueError(f"captions: image {index} has none; leave it out of the set")
            image_of_text += [index] * len(texts)
        images += len(captions)
        image_features.append(encode_image(batch["image"]))
        text_features.append(encode_texts([prefix + text for texts in captions for text in texts]))
    if not images:
        raise ValueError("batches held no images: the evaluation set is empty")
    features = np.concatenate(image_features), np.concatenate(text_features)
    return *features, np.array(image_of_text, np.int32)


def retrieval(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    block: int = 1024,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Recall at k (a fraction of queries) and median rank (counted from 1), both ways.

    An image finds its text when any of its captions is among the first k; a caption finds its
    image when that one is. See `ranks` for ties.

    Args:
      image_features: float32 [N, D], unit rows.
      text_features: float32 [M, D], unit rows.
      image_of_text: int [M], the image each text belongs to.
      ks: how many matches to look at.
      block: side of a tile of scores.
      mesh: the queries are divided over its devices; None for one device.

    Returns:
      image_to_text_r{k}, text_to_image_r{k}, image_to_text_median_rank,
      text_to_image_median_rank, images (N), texts (M).

    Raises:
      ValueError: nothing to rank, shapes that do not fit, an index outside [0, N), an image
      without text, features that are not finite.
    """
    image_of_text = np.asarray(image_of_text)
    if not len(image_features) or not len(text_features):
        raise ValueError(
            f"retrieval needs images and texts, got {len(image_features)} and {len(text_features)}"
        )
    shapes = image_features.shape[1:], text_features.shape[1:], image_of_text.shape
    if len(shapes[0]) != 1 or shapes[0] != shapes[1] or shapes[2] != text_features.shape[:1]:
        raise ValueError(
            "expected image_features [N, D], text_features [M, D] and image_of_text [M], got "
            f"{image_features.shape}, {text_features.shape} and {image_of_text.shape}"
        )
    images, texts = len(image_features), len(text_features)
    outside = image_of_text[(image_of_text < 0) | (image_of_text >= images)]
    if outside.size:
        raise ValueError(f"image_of_text: {outside[0]} is outside [0, {images})")
    captions = np.bincount(image_of_text, minlength=images)
    if not captions.all():
        raise ValueError(f"image_of_text: image {captions.argmin()} has no text; leave it out")
    for name, features in (("image", image_features), ("text", text_features)):
        if not np.isfinite(features).all():
            raise ValueError(f"{name}_features are not finite: the model has diverged")

    image = np.arange(images, dtype=np.int32)
    metrics = {}
    for way, rank in (
        ("image_to_text", ranks(image_features, text_features, image, image_of_text, block, mesh)),
        ("text_to_image", ranks(text_features, image_features, image_of_text, image, block, mesh)),
    ):
        metrics |= {f"{way}_r{k}": float((rank < k).mean()) for k in ks}
        metrics[f"{way}_median_rank"] = float(np.median(rank)) + 1
    return metrics | {"images": images, "texts": texts}


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_image: np.ndarray,
    candidate_image: np.ndarray,
    block: int = 1024,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """How many candidates stand before each query's best match.

    Candidates are ordered by falling score and, where scores are equal, by index. A query
    matches the candidates of its own image, and must have one; its rank is the place, from 0, of
    the first of them. The score of that match and the scores it is compared with come out of the
    same compiled product over the same tiles, so that rounding cannot set it apart from itself.

    Args:
      queries: float32 [N, D].
      candidates: float32 [M, D].
      query_image: int [N], the image a query is or belongs to.
      candidate_image: int [M].
      block, mesh: as for `retrieval`.

    Returns:
      int32 [N].
    """
    targets = list(_blocks(candidates, candidate_image, block, mesh, divided=False))
    result = []
    for rows, _, row_image in _blocks(queries, query_image, block, mesh, divided=True):
        best, first = jnp.full(len(rows), -jnp.inf), jnp.zeros(len(rows), jnp.int32)
        for columns, index, column_image in targets:
            scores = _scores(rows, columns, index)
            best, first = _best_match(scores, row_image, column_image, index, best, first)
        rank = jnp.zeros(len(rows), jnp.int32)
        for columns, index, _ in targets:
            rank += _before(_scores(rows, columns, index), index, best, first)
        result.append(rank)
    return np.concatenate(result)[: len(queries)]


def top_matches(
    queries: np.ndarray, candidates: np.ndarray, k: int, block: int = 1024, mesh: Mesh | None = None
) -> np.ndarray:
    """The candidates with the highest scores, best first; of equal ones, the lower index first.

    Of float32 [N, D] queries and [M, D] candidates: int32 [N, min(k, M)], rows of the candidates.
    `block` and `mesh` are as for `retrieval`.
    """
    k = min(k, len(candidates))
    targets = list(_blocks(candidates, np.arange(len(candidates)), block, mesh, divided=False))
    result = []
    for rows, _, _ in _blocks(queries, np.arange(len(queries)), block, mesh, divided=True):
        best, matches = jnp.full((len(rows), k), -jnp.inf), jnp.zeros((len(rows), k), jnp.int32)
        for columns, index, _ in targets:
            best, matches = _merge_top(_scores(rows, columns, index), index, best, matches)
        result.append(matches)
    return np.concatenate(result)[: len(queries)]


def _blocks(
    features: np.ndarray, image: np.ndarray, block: int, mesh: Mesh | None, *, divided: bool
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """Yields features [block, D], their row numbers [block] and images [block] on the devices.

    Each device has all of a block, or if it is divided a part of it: `block` is rounded up for
    that. The last one is padded, so that every tile has one shape: row number and image -1.
    """
    mesh = mesh or Mesh(jax.local_devices()[:1], ("data",))
    block = -(-block // mesh.size) * mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names) if divided else PartitionSpec())
    for start in range(0, len(features), block):
        rows = np.arange(start, min(start + block, len(features)), dtype=np.int32)
        pad = (0, block - len(rows))
        arrays = (
            np.pad(features[rows], (pad, (0, 0))),
            np.pad(rows, pad, constant_values=-1),
            np.pad(image[rows], pad, constant_values=-1),
        )
        yield jax.device_put(arrays, sharding)


@jax.jit
def _scores(rows: jax.Array, columns: jax.Array, index: jax.Array) -> jax.Array:
    """[block, D], [block, D], column numbers [block] -> [block, block]; -inf in the padding."""
    # The default precision rounds float32 to TF32 on GPUs and to bfloat16 on TPUs.
    scores = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(index >= 0, scores, -jnp.inf)


@jax.jit
def _best_match(scores, row_image, column_image, index, best, first):
    """Carries each row's highest score among its matches, and the first column that has it."""
    own = jnp.where(row_image[:, None] == column_image, scores, -jnp.inf)
    column = own.argmax(axis=1)
    score = own.max(axis=1)
    return jnp.maximum(best, score), jnp.where(score > best, index[column], first)


@jax.jit
def _before(scores, index, best, first):
    """Counts, a row, the columns that are ordered before its best match."""
    best, first = best[:, None], first[:, None]
    return ((scores > best) | ((scores == best) & (index < first))).sum(axis=1, dtype=jnp.int32)


@jax.jit
def _merge_top(scores, index, best, matches):
    """Carries each row's k highest scores and their columns."""
    # top_k prefers the earlier of equal entries, and what is carried has the lower indices.
    everything = jnp.concatenate([best, scores], axis=1)  # [block, k + block]
    columns = jnp.concatenate([matches, jnp.broadcast_to(index, scores.shape)], axis=1)
    best, place = jax.lax.top_k(everything, best.shape[1])
    return best, jnp.take_along_axis(columns, place, axis=1)
