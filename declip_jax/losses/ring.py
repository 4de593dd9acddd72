"""InfoNCE and ranks over a global batch whose logits are too many to hold at once.

The batch lies row by row over all devices. Each device keeps its own rows of `x`, and the rows of
`y` travel round the ring of devices, together with what is summed up for each of them. Where the
two meet, logits are made for one block of columns at a time, used in both directions and dropped;
the backward pass makes them again. Memory grows with the rows of one device, not with their square.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

# In shapes: n = N / devices, the rows of one device; b, those of a block.


def info_nce(
    x: jax.Array, y: jax.Array, scale: jax.Array, excluded: int = 0, *, mesh: Mesh, block: int
) -> tuple[jax.Array, jax.Array]:
    """`contrastive.info_nce`, values and gradients, holding [N / devices, block] logits.

    Args:
      x: float32 [N, D] unit rows, sharded over all axes of the mesh.
      y: likewise; row i is the positive of row i of `x`, and the other way round.
      scale: a scalar, factor of the similarities.
      excluded: k > 0 leaves the pairs (x_i, y_((i + k) mod N)) out of the negatives.
      mesh: the mesh that the rows lie on.
      block: most columns of logits to hold at once. A device's rows are cut into equal blocks: as
        large as the largest divisor of their number up to `block`.

    Returns:
      [N] cross-entropies from x to y and [N] from y to x.

    Raises ValueError: the rows cannot be divided over the devices.
    """
    _check_rows(x, mesh)
    return _info_nce(x, y, scale, excluded, mesh, block)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _info_nce(x, y, scale, excluded, mesh, block):
    return _forward(x, y, scale, excluded, mesh, block)[0]


def _forward(x, y, scale, excluded, mesh, block):
    rows = PartitionSpec(mesh.axis_names)

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows)
    def local(x, y, scale):  # [n, D], [n, D], []
        row, scaled = _places(x, mesh), scale * x

        def visit(own, columns, column_sums):
            row_sums, positive = own
            column, y = columns  # [b], [b, D]
            logits = _logits(scaled, y, row, column, excluded, mesh)  # [n, b]
            # Picked out, not computed on its own: its rounding is that of the sums.
            positive += jnp.where(row[:, None] == column, logits, 0).sum(axis=1)
            column_sums = _add_exp(column_sums, logits, axis=0)
            return (_add_exp(row_sums, logits, axis=1), positive), column_sums

        zeros = jnp.zeros_like(x[:, 0])  # [n]
        # A finite maximum to begin with: -inf - -inf, of a row left out, would not be a number.
        nothing = (zeros + jnp.finfo(zeros.dtype).min, zeros)
        (row_sums, positive), column_sums = _ring(
            visit, (nothing, zeros), (row, y), nothing, mesh, block
        )
        # The difference first: it is exact where the positive is the maximum.
        losses = tuple(top - positive + jnp.log(total) for top, total in (row_sums, column_sums))
        return losses, row_sums, column_sums

    losses, row_sums, column_sums = local(x, y, scale)
    return losses, (x, y, scale, row_sums, column_sums)


def _backward(excluded, mesh, block, saved, cotangents):
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, rows, whole, rows, rows, rows),
        out_specs=(rows, rows, whole),
    )
    def local(x, y, scale, row_sums, column_sums, cotangents):
        row, scaled = _places(x, mesh), scale * x
        of_rows, of_columns = cotangents  # [n], [n]
        row_top, row_total = row_sums
        column_top, column_total = column_sums

        def visit(dx, columns, dy):
            column, y, top, total, weight = columns  # [b], [b, D], [b], [b], [b]
            logits = _logits(scaled, y, row, column, excluded, mesh)  # [n, b]
            positive = row[:, None] == column
            # Both terms are 1 for a pair well told apart: their difference comes first.
            of_x = jnp.exp(logits - row_top[:, None]) - jnp.where(positive, row_total[:, None], 0)
            of_y = jnp.exp(logits - top) - jnp.where(positive, total, 0)
            dlogits = of_x * (of_rows / row_total)[:, None] + of_y * weight
            return dx + _matmul(dlogits, y), dy + _matmul(dlogits.T, scaled)

        columns = (row, y, column_top, column_total, of_columns / column_total)
        dx, dy = _ring(visit, jnp.zeros_like(x), columns, jnp.zeros_like(y), mesh, block)
        return scale * dx, dy, lax.psum((x * dx).sum(), mesh.axis_names)

    return local(*saved, cotangents)


_info_nce.defvjp(_forward, _backward)


def positive_rank(queries: jax.Array, keys: jax.Array, *, mesh: Mesh, block: int) -> jax.Array:
    """`contrastive.positive_rank`, holding [N / devices, block] similarities; it has no gradient.

    Queries and keys float32 [N, D] are sharded as those of `info_nce`; the rank is int32 [N].

    Raises ValueError: the rows cannot be divided over the devices.
    """
    _check_rows(queries, mesh)
    rows = PartitionSpec(mesh.axis_names)

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    def local(queries, keys):  # [n, D], [n, D]
        row = _places(queries, mesh)

        # From products of the same shape as below: equal keys must be equally near, to the bit.
        def find_own(own, columns):
            column, keys = columns  # [b], [b, D]
            tile = _matmul(queries, keys.T)  # [n, b]
            return own + jnp.where(row[:, None] == column, tile, 0).sum(axis=1), None

        own, _ = lax.scan(find_own, jnp.zeros_like(queries[:, 0]), _cut((row, keys), block))

        def count(rank, columns, _):
            column, keys = columns  # [b], [b, D]
            tile = _matmul(queries, keys.T)  # [n, b]
            tie_behind = (tile == own[:, None]) & (column >= row[:, None])
            behind = (tile < own[:, None]) | tie_behind
            return rank + (~behind).sum(axis=1, dtype=jnp.int32), None

        return _ring(count, jnp.zeros_like(row), (row, keys), None, mesh, block)[0]

    return local(lax.stop_gradient(queries), lax.stop_gradient(keys))


def _ring(visit: Callable, rows: Any, columns: Any, sums: Any, mesh: Mesh, block: int):
    """Inside shard_map: the columns of every device meet this device's rows, block by block.

    Args:
      visit: (rows, columns, sums) -> (rows, sums), with one block of columns and of their sums.
      rows: what is summed up for this device's rows; stays here.
      columns: arrays [n, ...] that travel unchanged.
      sums: arrays [n, ...] of what is summed up for the columns; travel with them.

    Returns:
      `rows` and `sums` once every pair has met; the sums are back with their columns' device.
    """
    hops = [(device, (device + 1) % mesh.size) for device in range(mesh.size)]

    def pass_on(tree):
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, mesh.axis_names, hops), tree)

    def meet(carry, _):
        rows, columns, sums = carry
        arriving = pass_on(columns)  # needs none of the products, so can go on beside them
        rows, sums = lax.scan(lambda rows, pair: visit(rows, *pair), rows, (columns, sums))
        return (rows, arriving, pass_on(sums)), None

    start = (rows, _cut(columns, block), _cut(sums, block))
    (rows, _, sums), _ = lax.scan(meet, start, length=mesh.size)
    return rows, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sums)  # [n, ...]


def _cut(tree: Any, block: int) -> Any:
    """Arrays [n, ...] -> [n / b, b, ...], b the largest divisor of n up to `block`."""

    def cut(leaf):
        size = max(size for size in range(1, block + 1) if len(leaf) % size == 0)
        return leaf.reshape(-1, size, *leaf.shape[1:])

    return jax.tree.map(cut, tree)


def _places(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Inside shard_map: int32 [n], where the rows of this device stand in the global batch."""
    return lax.axis_index(mesh.axis_names) * len(x) + jnp.arange(len(x))


def _logits(scaled, y, row, column, excluded: int, mesh: Mesh) -> jax.Array:
    """[n, b]; `scaled` is scale * x, so that the product needs no rounding after it.

    Where a multiplication by the scale followed, a compiler could fuse it with the subtraction of
    the maximum in one place and not in another, and large logits would differ in their last bits.
    """
    logits = _matmul(scaled, y.T)
    if excluded:
        left_out = column == (row[:, None] + excluded) % (len(row) * mesh.size)
        logits = jnp.where(left_out, -jnp.inf, logits)
    return logits


def _add_exp(sums: tuple[jax.Array, jax.Array], logits: jax.Array, axis: int):
    """Adds `logits` to a log-sum-exp kept as (maximum, sum of exp(logit - maximum))."""
    top, total = sums
    new_top = jnp.maximum(top, logits.max(axis))
    terms = jnp.exp(logits - jnp.expand_dims(new_top, axis)).sum(axis)
    return new_top, total * jnp.exp(top - new_top) + terms


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _check_rows(x: jax.Array, mesh: Mesh) -> None:
    if len(x) % mesh.size:
        raise ValueError(
            f"{len(x)} rows cannot be divided over {mesh.size} devices: "
            f"choose a batch that is a multiple of {mesh.size}."
        )
