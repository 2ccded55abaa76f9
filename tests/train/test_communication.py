"""What a compiled step sends between devices: embeddings and gradients, never what it matches."""

import functools
import re

import jax
import pytest
from reference.batches import B, make_batch

from ovseg_jax import sharding
from ovseg_jax.aot import COLLECTIVES, collectives_of

pytestmark = pytest.mark.slow

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


def test_on_a_pure_data_mesh_only_embeddings_are_gathered(compiled):
    moved = list(exchanged(compiled("data")))
    assert any(shape[-1:] == (JOINT,) for shape, _ in moved)
    assert all(of_examples for _, of_examples in moved), moved


def test_on_an_fsdp_mesh_parameters_are_gathered_and_no_activation(compiled, make_steps):
    """Nor is one handed around: every device keeps its own examples."""
    params = make_steps("fsdp", 0.1).start.params
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    shapes |= {shape[1:] for shape in shapes}  # of one layer of a stack
    words = make_batch(0)["caption_ids"].shape[1]
    shapes.add((words, params["text_encoder"]["position"].shape[1]))  # those that texts reach
    gathered = [shape for shape, of_examples in exchanged(compiled("fsdp")) if not of_examples]
    assert len(gathered) > 20 and set(gathered) <= shapes


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
