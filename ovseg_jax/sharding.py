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

# A name that is not listed is an error (`spec_of`).
LOGICAL_RULES = (
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("joint", None),
    ("layers", None),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The device mesh, of all devices that are present where `devices` is None.

    Args:
      data, fsdp, tensor: sizes of the axes, see `mesh_shape`.
    """
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


def keep_split(tree: Any, mesh: AnyMesh | None) -> Any:
    """Activations, pinned to the batch sharding in the forward and the backward pass.

    Left alone, the partitioner moves the width of some activations to the fsdp axis, as the
    parameters' is; on a mesh with both fsdp and tensor above 1 it then returned the gradient of
    the groups with rows of different examples exchanged.

    Args:
      tree: arrays whose first axis is the batch. mesh: None leaves them as they are.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, batch_sharding(mesh))


def rows_split(x: jax.Array) -> jax.Array:
    """An activation inside the model, its first axis pinned to the batch axes.

    Only where the mesh of the trace (`jax.sharding.use_abstract_mesh`) has an fsdp axis. There the
    partitioner would keep the parameters where they are and move the activations instead, each
    device then holding other examples' too: on 16 chips, split over fsdp alone, a ViT-B step took
    four times the memory.
    Without such an axis nothing moves, and pins cost memory: 12.3 instead of 10.1 GiB a chip for
    the step with masks.

    Args:
      x: examples first. The other axes may be split as they are, over tensor.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1 or x.shape[0] % batch_shards(mesh):
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *rest))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: AnyMesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def spec_of(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The partition of a parameter from its logical axis names.

    An axis that the mesh axis does not divide stays whole, and a mesh axis is used once per array.

    Raises:
      ValueError: a name that the table does not have, or names that do not fit the shape.
    """
    if len(names) != len(shape):
        raise ValueError(f"logical axes {names} do not fit shape {shape}")
    table = dict(LOGICAL_RULES)
    used: set[str] = set()
    parts: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in table:
            raise ValueError(f"logical axis {name!r} is not in LOGICAL_RULES")
        axis = table[name] if name is not None else None
        fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
        parts.append(axis if fits else None)
        if fits:
            used.add(axis)
    return PartitionSpec(*parts)


def parameter_shardings(boxed: Any, mesh: AnyMesh) -> Any:
    """Shardings of a boxed (abstract) parameter tree, in the shape of the unboxed one."""

    def leaf(value: Any) -> NamedSharding:
        if isinstance(value, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec_of(value.names, value.value.shape, mesh))
        return replicated(mesh)

    return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def shardings_like(tree: Any, parameters: dict[str, NamedSharding], mesh: AnyMesh) -> Any:
    """Shardings for a tree that holds copies of parameters among other things.

    Optimizer moments and the EMA teacher keep a parameter's path as the end of their own, and are
    sharded like it; everything else is replicated.

    Args:
      tree: any (abstract) pytree.
      parameters: flat "a/b/c" path to sharding.
    """

    def leaf(path: tuple, value: Any) -> NamedSharding:
        names = [
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path
        ]
        for start in range(len(names)):
            found = parameters.get("/".join(names[start:]))
            if found is not None and len(found.spec) <= len(value.shape):
                return found
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: AnyMesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch onto its devices as one global array each."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


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
    rows = {row for (part,) in indices.values() for row in range(*part.indices(batch_size))}
    return sorted(rows)
