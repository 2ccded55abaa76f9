"""Where arrays lie: the mesh, the table of logical names, moments and teacher beside parameters."""

import jax
import pytest
from jax.sharding import PartitionSpec
from reference.batches import adam_of, make_batch

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.optim.groups import flatten
from ovseg_jax.optim.optimizer import find_teacher


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 2, 2)


@pytest.mark.parametrize(
    ("names", "shape", "want"),
    [
        (("embed", "mlp"), (8, 6), ("fsdp", "tensor")),
        (("layers", "heads", "embed"), (3, 4, 6), (None, "tensor", "fsdp")),
        (("vocab", "embed"), (7, 8), (None, "fsdp")),  # 7 rows do not divide over two devices
        (("mlp", "heads"), (4, 4), ("tensor", None)),  # a mesh axis is used once
        ((None, "joint"), (4, 4), (None, None)),
    ],
)
def test_partition_of_a_parameter(mesh, names, shape, want):
    assert sharding.spec_of(names, shape, mesh) == PartitionSpec(*want)


def test_names_that_do_not_fit_are_refused(mesh):
    for names, shape in ((("width",), (4,)), (("embed",), (4, 4))):
        with pytest.raises((KeyError, ValueError)):
            sharding.spec_of(names, shape, mesh)


def test_mesh_sizes():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert one.size == 1 and sharding.batch_shards(one) == 1
    for sizes in ((3, 1, 1), (-1, 3, 1), (8, 2, 1)):
        with pytest.raises(UserError, match="config.mesh.*there are 8"):
            sharding.make_mesh(*sizes)
    for sizes, name in (((0, 1, 1), "data"), ((-8, -1, 1), "data"), ((-1, 1, 0), "tensor")):
        with pytest.raises(UserError, match=f"config.mesh.{name} is .*; it must be at least 1"):
            sharding.make_mesh(*sizes)


def test_a_process_reads_the_rows_of_its_devices(mesh):
    assert sharding.batch_shards(mesh) == 4
    assert sharding.process_slots(12, mesh) == list(range(12))
    with pytest.raises(UserError, match="batch size 10 does not divide over 4"):
        sharding.process_slots(10, mesh)


def test_a_state_is_split_over_the_mesh_and_stays_there(make_steps):
    """Split axes are really smaller on each device, in parameters, moments and teacher alike."""
    steps = make_steps("mixed", 0.0)
    state, metrics = steps(steps.place(), make_batch(0, second=False))
    path = "image_encoder/first/layers/mlp/fc1/kernel"  # [2, 32, 64]: layers, embed, mlp
    adam = adam_of(state)
    for tree in (state.params, adam.mu, adam.nu, find_teacher(state.opt_state)):
        leaf = flatten(tree)[path]
        assert leaf.shape == (2, 32, 64)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, 16, 32)}
    for leaf in (state.step, adam.count, *metrics.values()):
        assert leaf.is_fully_replicated
    wanted, got = jax.tree.leaves(steps.shardings), jax.tree.leaves(state)
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for s, x in zip(wanted, got, strict=True))
