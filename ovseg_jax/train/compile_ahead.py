"""One phase's train step on a machine that is not here: memory, operations, communication."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from ovseg_jax import platforms, sharding
from ovseg_jax.data.captions import Masking
from ovseg_jax.data.examples import MOST_NAMES
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.checks import check_losses, check_phases
from ovseg_jax.train.chips import Machine
from ovseg_jax.train.metrics import matmul_flops, without_repetition
from ovseg_jax.train.phases import Phase, make_phases
from ovseg_jax.train.step import Program

# Stands in for the length of the training set: epochs become steps of the schedule, which change
# nothing in the program but a number.
RECORDS = 1_000_000

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      shapes: of its results on one device, such as ("f32", (2048, 256)).
      source: JAX's name of the operation that it comes from.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    source: str

    @property
    def bytes(self) -> int:
        """Size of its results on one device. In the body of a loop it happens once an iteration."""
        return sum(
            math.prod(shape) * (_BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])) // 8
            for dtype, shape in self.shapes
        )


@dataclass(frozen=True)
class Measured:
    """What is known about a step.

    Attributes:
      phase: its name. batch_size: global. parameters: of the model.
      arguments: bytes of state and batch on one chip.
      temporaries: bytes on one chip of everything made in a step; None where it is not known.
      total: bytes on one chip of both, with the program and what it returns in memory of its own.
      fits: whether a chip has room for it; None where the step was not compiled.
      flops: of the matrix products of a step on all chips, with what rematerialization repeats.
      model_flops: without these repetitions.
      collectives: of one device; None where the step was not compiled.
    """

    phase: str
    batch_size: int
    parameters: int
    arguments: int
    temporaries: int | None
    total: int | None
    fits: bool | None
    flops: int
    model_flops: int
    collectives: list[Collective] | None

    def peak_seconds(self, machine: Machine) -> float:
        """The least time of a step: all operations at the chips' peak."""
        return self.flops / (machine.count * machine.chip.peak)


def measured(
    config: ConfigDict,
    machine: Machine,
    devices: list[Any] | None,
    phase_index: int,
    text_length: int,
) -> Measured:
    """Traces the train step of a phase, and compiles it where there are devices.

    Args:
      devices: of the machine, see `chips.devices_of`; None to compile nothing.
      text_length: tokens that texts are padded to.

    Raises:
      UserError: the config is wrong, or the batch does not divide over the mesh.
    """
    flat = abstract_mesh(**config.mesh, count=machine.count)
    mesh = flat if devices is None else sharding.make_mesh(**config.mesh, devices=devices)
    program = program_of(config, mesh)
    phase = program.phases[phase_index]
    batch = batch_shapes(config, phase, phase.batch_size, text_length)
    state, split = program.abstract_state(phase), sharding.batch_sharding(mesh)
    arguments = sum(_bytes_on_one(leaf, leaf.sharding) for leaf in jax.tree.leaves(state))
    arguments += sum(_bytes_on_one(leaf, split) for leaf in batch.values())
    temporaries = total = fits = collectives = None
    with platforms.traced_for(machine.chip.platform):
        flops, model_flops = (
            matmul_flops(flat_program.step(phase), flat_program.abstract_state(phase), batch)
            for flat_program in (
                program if mesh is flat else program_of(config, flat),
                program_of(without_repetition(config), flat),
            )
        )
        if devices is not None:
            lowered = program.compiled_step(phase).lower(state, batch)
            arguments, temporaries, total, collectives = compiled(lowered, arguments)
            fits = collectives is not None and total <= machine.chip.memory
    return Measured(
        phase=phase.name,
        batch_size=phase.batch_size,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        arguments=arguments,
        temporaries=temporaries,
        total=total,
        fits=fits,
        flops=flops,
        model_flops=model_flops,
        collectives=collectives,
    )


def program_of(config: ConfigDict, mesh: AnyMesh) -> Program:
    """The program of a config on a mesh, without data or weights.

    Raises:
      UserError: the config is wrong.
    """
    check_losses(config)
    phases = make_phases(config, RECORDS)
    check_phases(config, phases, mesh)
    return Program(config, mesh, build_model(config.model), phases)


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


def batch_shapes(
    config: ConfigDict, phase: Phase, batch_size: int, text_length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `data.loader.make_loader` gives in a phase, from the config alone.

    Args:
      batch_size: B. text_length: M.
    """

    def array(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    pairs = phase.mask_weight > 0
    weights = ("weight", "entity_weight") + (("pair_weight",) if pairs else ())
    batch = {name: array((), np.float32) for name in weights}
    batch |= {name: array((), np.int32) for name in ("entity_set", "record", "data_set")}
    batch["caption_set"] = array((MOST_NAMES,), np.int32)
    size, data = phase.transform["size"], config.data
    for name in ("image", "image2")[: 1 + pairs]:
        if data.cache_images:
            encoder = build_model(config.model).image_encoder
            batch[f"{name}_features"] = array(
                (encoder.feature_tokens(size), encoder.feature_width), np.float16
            )
        else:
            batch[name] = array((size, size, 3), np.uint8)
    if data.nouns:
        batch["noun_ids"] = array((data.nouns, text_length), np.int32)
        batch["noun_present"] = array((data.nouns,), np.bool_)
    if Masking(config.loss.masking).classifies:
        batch["masked_targets"] = array((text_length,), np.int32)
    kinds = ("caption", "masked", "prompt") + (("shared",) if pairs else ())
    if not data.cache_texts:
        return batch | {f"{kind}_ids": array((text_length,), np.int32) for kind in kinds}
    width = config.model.text.width
    for kind in kinds:
        if kind != "masked":
            batch[f"{kind}_pooled"] = array((width,), np.float16)
    batch["masked_tokens"] = array((text_length, width), np.float16)
    batch["masked_mask"] = array((text_length,), np.bool_)
    return batch


def compiled(
    lowered: Any, arguments: int
) -> tuple[int, int | None, int | None, list[Collective] | None]:
    """(arguments, temporaries, total, collectives) of a lowered step (`jax.stages.Lowered`).

    Where the step does not fit, collectives are None, and so may temporaries and total be.

    Args:
      arguments: bytes on one chip, for a step that does not fit.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # Two of the compiler's passes may run out of memory. The second one's "temporaries" are
        # all of the program's memory.
        pattern = r"(?:Used |required for HLO temporaries \()([\d.]+)([KMG])"
        used = re.search(pattern, str(error))
        if used is None:
            return arguments, None, None, None
        total = int(float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[used[2]])
        return arguments, total - arguments, total, None
    stats = program.memory_analysis()
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    total = arguments + temporaries + stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    return arguments, temporaries, total, collectives_of(program.as_text())


def collectives_of(text: str) -> list[Collective]:
    """All collectives of a program (`jax.stages.Compiled.as_text`), those of a loop's body once.

    The TPU compiler repeats a collective that runs beside computations in the text of each of
    them, as links of a chain: it is listed once.
    """
    collectives, chains = [], set()
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        if chain := re.search(r'chain_id="(\d+)"', line):
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        shapes = tuple(
            (dtype, tuple(int(n) for n in dims.split(",") if n))
            for dtype, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", match[1]))
        )
        if match[3] and match[2] != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]  # the first half are the operands
        source = re.search(r'op_name="([^"]*)"', line)
        collectives.append(Collective(match[2], shapes, source[1] if source else ""))
    return collectives


def _bytes_on_one(leaf: jax.ShapeDtypeStruct, place: Any) -> int:
    return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
