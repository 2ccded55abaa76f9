"""Where every array lives: the mesh, and one table from logical axis names to mesh axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ovseg_jax.errors import UserError

# Programs are also traced for meshes that have no devices.
AnyMesh = Mesh | AbstractMesh

MESH_AXES = ("data", "fsdp", "tensor")
# Under the Explicit default, scatter-adds and products such as ``z @ z.T`` need their output
# sharding written out.
AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)

# A batch is split over both: fully sharded data parallelism is data parallelism whose parameters
# are split as well.
BATCH_AXES = ("data", "fsdp")

LOGICAL_RULES = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "joint": None,
    "layers": None,
    None: None,
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of `devices`, or of all that are present; for the sizes see `mesh_shape`."""
    count = jax.device_count() if devices is None else len(devices)
    shape = mesh_shape(data, fsdp, tensor, count)
    return jax.make_mesh(shape, MESH_AXES, axis_types=AXIS_TYPES, devices=devices)


def abstract_mesh(data: int, fsdp: int, tensor: int, count: int) -> AbstractMesh:
    """The mesh of `count` devices that are not here."""
    return AbstractMesh(mesh_shape(data, fsdp, tensor, count), MESH_AXES, axis_types=AXIS_TYPES)


def mesh_shape(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, int, int]:
    """Sizes of the axes on `count` devices; -1 for `data` takes what the other axes leave.

    Raises:
      UserError: an axis has no size, or their product is not the number of devices.
    """
    for name, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        if size < 1 and (name, size) != ("data", -1):
            rest = ", or -1 for the devices that the other axes leave" if name == "data" else ""
            raise UserError(f"config.mesh.{name} is {size}; it must be at least 1{rest}")
    if data == -1:
        data = max(1, count // (fsdp * tensor))
    shape = (data, fsdp, tensor)
    if math.prod(shape) != count:
        raise UserError(
            f"config.mesh asks for data x fsdp x tensor = {data} x {fsdp} x {tensor} = "
            f"{math.prod(shape)} devices, but there are {count}; set config.mesh.data=-1 to use all"
        )
    return shape


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Leading axis split over the batch axes, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: AnyMesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def keep_split(tree: Any, mesh: AnyMesh | None) -> Any:
    """Activations, examples first, pinned to the batch sharding in forward and backward pass.

    Left alone, the partitioner moves the width of some activations to the fsdp axis, as the
    parameters' is; on a mesh with both fsdp and tensor above 1 it then returned the gradient of
    the groups with rows of different examples exchanged.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, batch_sharding(mesh))


def spec_of(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The partition of a parameter from its logical axis names.

    An axis that the mesh axis does not divide stays whole, and a mesh axis is used once per array.
    Names that `LOGICAL_RULES` does not have, or that do not fit the shape, are errors.
    """
    parts: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = LOGICAL_RULES[name]
        fits = axis is not None and axis not in parts and size % mesh.shape[axis] == 0
        parts.append(axis if fits else None)
    return PartitionSpec(*parts)


def laid_out(boxed: Any, mesh: AnyMesh) -> Any:
    """Shapes, dtypes and shardings of an abstract tree, unboxed.

    Boxes, which hold logical axis names, are parameters, moments and teacher; the rest is whole on
    every device.
    """

    def leaf(value: Any) -> jax.ShapeDtypeStruct:
        spec, shape = PartitionSpec(), nn.unbox(value)
        if isinstance(value, nn.LogicallyPartitioned):
            spec = spec_of(value.names, shape.shape, mesh)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def put_batch(batch: dict[str, np.ndarray], mesh: AnyMesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch onto its devices as one global array each."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def process_slots(batch_size: int, mesh: AnyMesh) -> list[int]:
    """The global batch rows that live on this process's devices, in order.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"batch size {batch_size} does not divide over {shards} batch shards "
            "(data x fsdp); change the phase's batch_size or config.mesh"
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (part,) in indices.values() for row in range(batch_size)[part]})
