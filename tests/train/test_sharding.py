"""Where arrays lie: the mesh, the table of logical names, moments and teacher beside parameters."""

import functools
import re

import jax
import pytest
from jax.sharding import PartitionSpec
from reference.batches import B, adam_of, make_batch

from ovseg_jax import sharding
from ovseg_jax.aot import COLLECTIVES, collectives_of
from ovseg_jax.errors import UserError
from ovseg_jax.optim.ema_teacher import find_teacher
from ovseg_jax.optim.groups import flatten


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


# ---- what a compiled step sends between devices: never what it matches

JOINT = 8  # width of the tiny model's joint space
DEVICES, GROUPS = 8, 2  # of which each image keeps two for the mask loss


@pytest.fixture(scope="module")
def compiled(make_steps):
    """Text of the compiled mask phase on a mesh of eight devices."""

    @functools.cache
    def text_of(mesh):
        steps = make_steps(mesh, 0.1)
        return steps.program(sharding.put_batch(make_batch(0), steps.mesh)).as_text()

    return text_of


def exchanged(text):
    """Shapes of all but reductions, and whether each has the form of embeddings.

    Those have a row for each example; so has what says which pairs count, one number an example.
    """
    for collective in collectives_of(text):
        if collective.kind == "all-reduce":
            continue
        assert collective.kind in ("all-gather", "reduce-scatter"), collective
        for _, shape in collective.shapes:
            rows = shape[:-1] if shape[-1:] == (JOINT,) else shape
            yield shape, rows in ((B,), (B // DEVICES,), (B, 1), (B // DEVICES, 1))


@pytest.mark.slow
def test_on_a_pure_data_mesh_only_embeddings_are_gathered(compiled):
    moved = list(exchanged(compiled("data")))
    assert any(shape[-1:] == (JOINT,) for shape, _ in moved)
    assert all(of_examples for _, of_examples in moved), moved


@pytest.mark.slow
def test_on_an_fsdp_mesh_parameters_are_gathered_and_no_activation(compiled, make_steps):
    """Nor is one handed around: every device keeps its own examples."""
    params = make_steps("fsdp", 0.1).start.params
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    shapes |= {shape[1:] for shape in shapes}  # of one layer of a stack
    words = make_batch(0)["caption_ids"].shape[1]
    shapes.add((words, params["text_encoder"]["position"].shape[1]))  # those that texts reach
    gathered = [shape for shape, of_examples in exchanged(compiled("fsdp")) if not of_examples]
    assert len(gathered) > 20 and set(gathered) <= shapes


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "shards"), [("data", 8), ("mixed", 4)])
def test_the_matching_on_the_host_is_local(compiled, mesh, shards):
    """Each device hands over the costs of its own pairs, of which no collective knows."""
    program = compiled(mesh)
    local = f"f32[{2 * B // shards},{GROUPS},{GROUPS}]"
    calls = [line for line in program.splitlines() if "callback" in line and "custom-call(" in line]
    assert len(calls) == 1
    operands = re.findall(r"custom-call\((.*?)\)", calls[0])[0]
    name = operands.split("%")[-1].split(",")[0]
    made = next(line for line in program.splitlines() if f"%{name} = " in line)
    assert local in made
    assert f"f32[{2 * B},{GROUPS},{GROUPS}]" not in program
    for line in program.splitlines():
        if re.search(rf" ({'|'.join(COLLECTIVES)})(-start)?\(", line):
            assert local not in line
            assert f"s32[{2 * B // shards},{GROUPS}]" not in line
