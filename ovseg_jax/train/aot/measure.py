"""One phase's train step on a machine that is not there: memory, operations, communication."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from ovseg_jax import platforms, sharding
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.accumulate import check_accumulation
from ovseg_jax.train.aot.chips import Machine
from ovseg_jax.train.aot.collectives import Collective, collectives_of
from ovseg_jax.train.aot.inputs import batch_shapes
from ovseg_jax.train.flops import matmul_flops, without_repetition
from ovseg_jax.train.mask_terms import check_mask_config, check_matching
from ovseg_jax.train.noun_terms import check_noun_config
from ovseg_jax.train.phases import check_batch_sizes, make_phases
from ovseg_jax.train.program import Program, boxed_params
from ovseg_jax.train.state_shapes import abstract_state

# Stands in for the length of the training set: epochs become steps of the schedule, which change
# nothing in the program but a number.
RECORDS = 1_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      arguments: state and batch. temporaries: everything made in a step. total: both, with the
        program itself and what it returns in memory of its own.
    """

    arguments: int
    temporaries: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Measured:
    """What is known about a step.

    Attributes:
      phase: its name. batch_size: global.
      parameters: of the model.
      fits: whether there is room for it on a chip; None where it was not compiled.
      flops: of the matrix products of a step on all chips, with what rematerialization repeats.
      model_flops: without.
      collectives: of one device; None where it was not compiled.
    """

    phase: str
    batch_size: int
    parameters: int
    fits: bool | None
    memory: Memory
    flops: int
    model_flops: int
    collectives: list[Collective] | None


def program_of(config: ConfigDict, mesh: AnyMesh) -> Program:
    """The program of a config on a mesh, without data or weights.

    Raises:
      UserError: the config is wrong.
    """
    check_mask_config(config.loss)
    check_noun_config(config)
    model = build_model(config.model)
    shardings = sharding.parameter_shardings(boxed_params(model), mesh)
    phases = make_phases(config, RECORDS)
    check_accumulation(config, phases, mesh)
    if any(phase.mask_weight > 0 for phase in phases):
        check_matching(config)
    return Program(config, mesh, model, phases, shardings)


def abstract_mesh(data: int, fsdp: int, tensor: int, count: int) -> AbstractMesh:
    """The mesh of `count` chips without devices; -1 for `data` takes what the other axes leave.

    Raises:
      UserError: the axes' product is not the number of chips.
    """
    if data == -1:
        data = max(1, count // (fsdp * tensor))
    if data * fsdp * tensor != count:
        raise UserError(
            f"config.mesh asks for {data} x {fsdp} x {tensor} chips, the topology has {count}"
        )
    shape = (data, fsdp, tensor)
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def measured(
    config: ConfigDict,
    machine: Machine,
    devices: list[Any] | None,
    phase_index: int,
    text_length: int,
) -> Measured:
    """Traces and, where there are devices, compiles the train step of a phase.

    Args:
      devices: of the machine, see `devices.devices_of`; None to compile nothing.
      text_length: tokens that texts are padded to.

    Raises:
      UserError: the config is wrong, or the batch does not divide over the mesh.
    """
    flat = abstract_mesh(**config.mesh, count=machine.count)
    mesh = flat
    if devices is not None:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
    program = program_of(config, mesh)
    phase = program.phases[phase_index]
    check_batch_sizes([phase], flat)
    batch = batch_shapes(config, phase, phase.batch_size, text_length)
    state, shardings = program.state_layout(phase)
    arguments = sum(
        _on_one(leaf, place)
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    ) + sum(_on_one(leaf, sharding.batch_sharding(mesh)) for leaf in batch.values())
    with platforms.traced_for(machine.chip.platform):
        counts = [
            matmul_flops(one.step(phase), one.state_layout(phase)[0], batch)
            for one in (program_of(config, flat), program_of(without_repetition(config), flat))
        ]
        memory, fits, exchanged = Memory(arguments), None, None
        if devices is not None:
            lowered = program.compiled_step(phase).lower(abstract_state(state, shardings), batch)
            memory, fits, exchanged = compiled(lowered, arguments, machine.chip.memory)
    return Measured(
        phase=phase.name,
        batch_size=phase.batch_size,
        parameters=sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
        fits=fits,
        memory=memory,
        flops=counts[0],
        model_flops=counts[1],
        collectives=exchanged,
    )


def peak_seconds(found: Measured, machine: Machine) -> float:
    """The least time of a step: all operations at the chips' peak."""
    return found.flops / (machine.count * machine.chip.peak)


def _on_one(leaf: jax.ShapeDtypeStruct, place: Any) -> int:
    return int(np.prod(place.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize


def compiled(
    lowered: Any, arguments: int, available: int
) -> tuple[Memory, bool, list[Collective] | None]:
    """Memory, whether it fits and the collectives of a lowered step (`jax.stages.Lowered`).

    Args:
      arguments: bytes on one chip, for a step that does not fit.
      available: bytes on one chip. The compiler lets pass what is a little above.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _too_large(error, arguments), False, None
    stats = program.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, total)
    return memory, total <= available, collectives_of(program.as_text())


def _too_large(error: Exception, arguments: int) -> Memory:
    """What a compiler that ran out of memory says of it. Any other error is passed on."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    # Two of its passes may notice. The second one's temporaries are all of the program's memory.
    used = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+[KMG])", str(error))
    if used is None:
        return Memory(arguments)
    total = in_bytes(used[1])
    return Memory(arguments, total - arguments, total)


def in_bytes(text: str) -> int:
    """Bytes of "1.5G" as the compiler writes them."""
    return int(float(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
