"""The nearest-neighbor support set: a queue of features, sharded by rows over all devices.

Dwibedi et al., With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
Representations (NNCLR), 2021, arXiv:2104.14548. Li et al., Supervision Exists Everywhere: A Data
Efficient Contrastive Language-Image Pre-training Paradigm (DeCLIP), 2022, arXiv:2110.05208.

Published code keeps a private set on each GPU, drops the rows that do not fit when the queue wraps,
and leaves the set out of checkpoints. Here there is one set, first in, first out, whatever the
number of devices; it is a dict of arrays, to be checkpointed with the rest of the state:

  rows: float32 [N, D] unit rows, laid out as PartitionSpec(mesh.axis_names).
  pointer: int32 [], the row to overwrite next.
  filled: int32 [], how many rows have been replaced since the start, at most N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

State = dict[str, jax.Array]


class Neighbors(NamedTuple):
    """The k rows nearest to each of Q queries, nearest first. No gradient flows through them."""

    rows: jax.Array  # [Q, k, D], sharded by queries over all devices
    similarity: jax.Array  # [Q, k] cosines
    age: jax.Array  # int32 [Q, k], how many rows have been enqueued after it; -1: it is of `init`


def check(size: int, devices: int, enqueued_per_step: int, neighbors: int) -> None:
    """Raises ValueError, naming the field, for a support set that could not work.

    It has `size` rows, divided over the devices; all devices together enqueue so many a step.
    """
    field = f"config.loss.support_set.size={size}"
    if size % devices:
        raise ValueError(
            f"{field} cannot be divided over {devices} devices: "
            f"choose a positive multiple of {devices}."
        )
    if size < enqueued_per_step:
        raise ValueError(
            f"{field} is smaller than the {enqueued_per_step} rows enqueued a step, 2 × "
            "config.batch_size (augmented captions and captions): choose at least that many."
        )
    if neighbors > size:
        raise ValueError(
            f"config.loss.support_set.neighbors={neighbors} must lie in 1 … {size}, the size of "
            "the set."
        )


def init(rng: jax.Array, size: int, width: int) -> State:
    """A set of `size` random unit rows; the same whatever sharding the caller gives it."""
    rows = jax.random.normal(rng, (size, width))
    return {
        "rows": _normalize(rows),
        "pointer": jnp.zeros((), jnp.int32),
        "filled": jnp.zeros((), jnp.int32),
    }


def nearest(state: State, queries: jax.Array, k: int = 1, *, mesh: Mesh, block: int) -> Neighbors:
    """Finds the k rows of the set that are nearest to each query by cosine.

    Of equally near rows the one with the lower index comes first, on every mesh. Rows of a set that
    comes from elsewhere may have any length; those found are scaled to unit length.

    A device compares all queries with its own rows, `block` of them at a time, and the devices
    agree on the best: what travels are the queries and the rows found, never the set. It does so
    k times, leaving out the rows found before: only what is returned grows with k.

    Args:
      state: the set.
      queries: [Q, D] unit rows; Q must be a multiple of the number of devices.
      k: neighbors a query, at most N.
      mesh: over all of whose axes the set lies.
      block: rows; a device holds [Q, block] similarities at a time.
    """
    axes = mesh.axis_names
    size = len(state["rows"])

    def search(rows, queries):  # [N / devices, D], [Q, D]
        first = jax.lax.axis_index(axes) * len(rows)  # the index in the set of this device's rows
        width = min(block, len(rows))
        # The last block begins early enough to be whole: seeing a row twice changes no maximum.
        starts = jnp.minimum(jnp.arange(0, len(rows), width), len(rows) - width)

        def find_next(found, place):  # found: [Q, k] indices, those from `place` on still -1
            def best_of_block(start):
                part = jax.lax.dynamic_slice_in_dim(rows, start, width)  # [block, D]
                index = first + start + jnp.arange(width)
                part = _normalize(part)
                similarity = jnp.matmul(queries, part.T, precision=jax.lax.Precision.HIGHEST)
                seen = (found[:, None, :] == index[:, None]).any(axis=2)  # [Q, block]
                similarity = jnp.where(seen, -jnp.inf, similarity)
                # Not top_k: of equal values argmax takes the first on every backend.
                return similarity.max(axis=1), index[similarity.argmax(axis=1)]

            similarities, indices = jax.lax.map(best_of_block, starts)  # [blocks, Q] each
            best = jax.lax.pmax(similarities.max(axis=0), axes)  # [Q]
            index = jnp.where(similarities == best, indices, size).min(axis=0)
            index = jax.lax.pmin(index, axes)  # [Q]
            # The owner of a row contributes it, all others zeros; each query's device sums.
            mine = (first <= index) & (index < first + len(rows))
            row = jnp.where(mine[:, None], jnp.take(rows, index - first, axis=0, mode="clip"), 0)
            row = jax.lax.psum_scatter(row, axes, tiled=True)  # [Q, D] -> [Q / devices, D]
            return found.at[:, place].set(index), (_normalize(row), best)

        found = jnp.full((len(queries), k), -1)
        found, (neighbors, similarity) = jax.lax.scan(find_next, found, jnp.arange(k))
        neighbors = neighbors.swapaxes(0, 1)  # [k, Q / devices, D] -> [Q / devices, k, D]
        return neighbors, similarity.T, found

    by_rows, whole = PartitionSpec(axes), PartitionSpec()
    rows, similarity, index = jax.shard_map(
        search, mesh=mesh, in_specs=(by_rows, whole), out_specs=(by_rows, whole, whole)
    )(*jax.lax.stop_gradient((state["rows"], queries)))
    age = _age(index, state["pointer"], size)
    return Neighbors(rows, similarity, jnp.where(age < state["filled"], age, -1))


def enqueue(state: State, batch: jax.Array, *, mesh: Mesh) -> State:
    """Overwrites the oldest rows of the set with `batch`, in its order; no gradient flows into it.

    The batch is [M, D] unit rows: of more than N the last N stay. The rows of a set that is donated
    are replaced in place.
    """
    axes = mesh.axis_names
    size, count = len(state["rows"]), len(batch)
    pointer = (state["pointer"] + count) % size

    def replace(rows, batch, pointer):  # [N / devices, D], [M, D], []
        # Each row looks up what it becomes: no scatter, nothing sent but the batch.
        index = jax.lax.axis_index(axes) * len(rows) + jnp.arange(len(rows))
        age = _age(index, pointer, size)  # when the batch is in
        new = jnp.take(batch, count - 1 - age, axis=0, mode="clip")  # [N / devices, D]
        return jnp.where((age < count)[:, None], new, rows)

    by_rows, whole = PartitionSpec(axes), PartitionSpec()
    rows = jax.shard_map(replace, mesh=mesh, in_specs=(by_rows, whole, whole), out_specs=by_rows)(
        *jax.lax.stop_gradient((state["rows"], batch)), pointer
    )
    return {"rows": rows, "pointer": pointer, "filled": jnp.minimum(state["filled"] + count, size)}


def metrics(neighbors: Neighbors, state: State, *, young_rows: int) -> dict[str, jax.Array]:
    """How the set does, as scalars, by the neighbors of some queries that were found in it.

    "nn_similarity": mean cosine between a query and its nearest row. "nn_replaced": share of the
    set that is no longer random. "nn_young": share of the queries after whose nearest row fewer
    than `young_rows` were enqueued: if nearly all are young, the set is larger than it need be, or
    its old rows are out of date.
    """
    age = neighbors.age[:, 0]
    return {
        "nn_similarity": neighbors.similarity[:, 0].mean(),
        "nn_replaced": state["filled"] / len(state["rows"]),
        "nn_young": ((0 <= age) & (age < young_rows)).mean(),
    }


def _normalize(rows: jax.Array) -> jax.Array:
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _age(index: jax.Array, pointer: jax.Array, size: int) -> jax.Array:
    """How many rows have been written after row `index`, if all of the set has been written."""
    return (pointer - 1 - index) % size
