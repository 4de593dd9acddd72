"""The device mesh and batches laid over it."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from declip_jax.section import Section, at_least

AXES = ("data", "fsdp")


class MeshShape(Section):
    """The section `config.mesh`: devices on each axis, -1 for "the rest"."""

    data: int = at_least(-1)
    fsdp: int = at_least(-1)


def make_mesh(data: int, fsdp: int, devices=None) -> Mesh:
    """A ("data", "fsdp") mesh over all devices; one axis may be -1 for "the rest".

    Both axes divide the batch; "fsdp" also divides parameters and optimizer state.

    Raises ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp]
    if shape.count(-1) == 1:
        known = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // known if known > 0 else 0
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"config.mesh.data={data} × config.mesh.fsdp={fsdp} does not fit {len(devices)} "
            "devices: the product must be their number, and one of the two may be -1."
        )
    return jax.make_mesh(
        tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over all devices, whichever mesh axis they stand on."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless `batch_size` can be divided over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"{name}={batch_size} cannot be divided over {mesh.size} devices: "
            f"choose a positive multiple of {mesh.size}."
        )


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays (this process's share of axis 0) -> global arrays over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
