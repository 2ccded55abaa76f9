"""One phase's train step on a machine that is not here: memory, operations, communication.

A machine is a chip and a grid of them: "v5e:16x16".
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from ovseg_jax import platforms, sharding
from ovseg_jax.data.captions import Masking
from ovseg_jax.data.examples import MOST_NAMES
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.models.build import build_model
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.checks import check_losses, check_phases, check_text_length
from ovseg_jax.train.metrics import matmul_flops, peak_flops, without_repetition
from ovseg_jax.train.phases import Phase, make_phases
from ovseg_jax.train.step import Program

GIB = 2**30

# Chip: its name in JAX, and its memory in bytes (Google's documentation, "Cloud TPU system
# architecture"; NVIDIA's data sheets of the SXM modules).
CHIPS = {
    "v4": ("TPU v4", 32 * GIB),
    "v5e": ("TPU v5e", 16 * GIB),
    "v5p": ("TPU v5p", 95 * GIB),
    "v6e": ("TPU v6e", 32 * GIB),
    "a100": ("A100", 80 * 10**9),
    "h100": ("H100", 80 * 10**9),
    "h200": ("H200", 141 * 10**9),
}

# libtpu reads these when it is loaded.
ENVIRONMENT = {
    # Otherwise it asks Google's metadata server which TPU this machine has.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Describes this machine, which has no TPU; without it libtpu warns. The topology decides.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # Compiling needs no chip, so another process may compile too.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Stands in for the length of the training set: epochs become steps of the schedule, which change
# nothing in the program but a number.
RECORDS = 1_000_000
# Texts are padded to so many tokens where config.data.text_length follows the data: CLIP's length.
TEXT_LENGTH = 77

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Machine:
    """A grid of equal chips.

    Attributes:
      name: as the user gave it. count: number of chips.
      platform: "tpu" or "gpu".
      memory: bytes of one chip.
      peak: FLOP/s of one chip, see `metrics.peak_flops`.
    """

    name: str
    count: int
    platform: str
    memory: int
    peak: float


def machine_of(name: str) -> Machine:
    """The machine that `name` describes.

    Raises:
      UserError: the name does not have the form CHIP:GRID, or the chip is not known.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if match is None:
        raise UserError(f"--topology={name} is not of the form CHIP:GRID, for example v5e:16x16")
    if match[1] not in CHIPS:
        raise UserError(
            f"--topology={name}: chip {match[1]!r} is none of {', '.join(CHIPS)}"
            + nearest(match[1], list(CHIPS))
        )
    kind, memory = CHIPS[match[1]]
    count = math.prod(map(int, match[2].split("x")))
    return Machine(name, count, "tpu" if "TPU" in kind else "gpu", memory, peak_flops(kind))


def prepare_compiler() -> None:
    """Lets this process compile for TPUs and compute on its CPU. Call it before JAX starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def devices_of(machine: Machine) -> list[Any]:
    """The TPU devices of a machine, as its compiler describes them; nothing can run on them.

    Raises:
      UserError: the compiler is missing or in use, or knows no such machine.
    """
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError(
            "the TPU compiler is not installed: pip install 'ovseg_jax[aot]' (libtpu, 700 MB)"
        )
    # The two cores of a v4 chip work as one in training; JAX counts them as two by default.
    options = {"chip_config_name": "megacore"} if machine.name.startswith("v4:") else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.name, **options
        ).devices
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        if "lockfile" in str(error) or "already in use" in str(error):
            raise UserError(
                "libtpu thinks that another process uses it. If none does, an ended one left its "
                f"lock: remove /tmp/libtpu_lockfile ({line})"
            ) from None
        raise UserError(f"--topology={machine.name}: the TPU compiler says: {line}") from None
    if len(devices) != machine.count:
        raise UserError(
            f"--topology={machine.name}: {machine.count} chips are {len(devices)} devices to the "
            "compiler; is the grid one that is sold?"
        )
    return list(devices)


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      shapes: of its results on one device, such as ("f32", (2048, 256)).
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        """Size of its results on one device. In the body of a loop it happens once an iteration."""
        return sum(
            math.prod(shape) * (_BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])) // 8
            for dtype, shape in self.shapes
        )


@dataclass(frozen=True)
class Measured:
    """What is known about a step. Bytes are those of one chip.

    Attributes:
      phase: its name. batch_size: global. parameters: of the model.
      flops: of the matrix products of a step on all chips, with what rematerialization repeats.
      model_flops: without these repetitions.
      arguments: bytes of state and batch.
      temporaries: bytes of everything made in a step.
      total: both, and the program and what it returns in memory of its own.
      fits: whether the compiler found room for it.
      collectives: of one device.
      The last four are None where nothing was compiled, all but `fits` perhaps also where the
      step does not fit.
    """

    phase: str
    batch_size: int
    parameters: int
    flops: int
    model_flops: int
    arguments: int
    temporaries: int | None = None
    total: int | None = None
    fits: bool | None = None
    collectives: list[Collective] | None = None


def measured(
    config: ConfigDict, machine: Machine, devices: list[Any] | None, phase_index: int
) -> Measured:
    """Traces the train step of a phase, and compiles it where there are devices.

    Args:
      devices: of the machine, see `devices_of`; None to compile nothing.

    Raises:
      UserError: the config is wrong, or the batch does not divide over the mesh.
    """
    flat = sharding.abstract_mesh(**config.mesh, count=machine.count)
    mesh = flat if devices is None else sharding.make_mesh(**config.mesh, devices=devices)
    program = program_of(config, mesh)
    phase = program.phases[phase_index]
    length = config.data.text_length or min(TEXT_LENGTH, config.model.text.max_positions)
    check_text_length(config, length)
    batch = batch_shapes(config, phase, phase.batch_size, length)
    state, split = program.abstract_state(phase), sharding.batch_sharding(mesh)
    arguments = sum(_bytes_on_one(leaf, leaf.sharding) for leaf in jax.tree.leaves(state))
    arguments += sum(_bytes_on_one(leaf, split) for leaf in batch.values())
    memory = {"arguments": arguments}
    with platforms.traced_for(machine.platform):
        flops, model_flops = (
            matmul_flops(counted.step(phase), counted.abstract_state(phase), batch)
            for counted in (
                program if mesh is flat else program_of(config, flat),
                program_of(without_repetition(config), flat),
            )
        )
        if devices is not None:
            memory |= compiled(program.compiled_step(phase).lower(state, batch), arguments)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    return Measured(phase.name, phase.batch_size, parameters, flops, model_flops, **memory)


def program_of(config: ConfigDict, mesh: AnyMesh) -> Program:
    """The program of a config on a mesh, without data or weights.

    Raises:
      UserError: the config is wrong.
    """
    check_losses(config)
    phases = make_phases(config, RECORDS)
    check_phases(config, phases, mesh)
    return Program(config, mesh, build_model(config.model), phases)


def batch_shapes(
    config: ConfigDict, phase: Phase, batch_size: int, text_length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `data.loader.make_loader` gives in a phase, from the config alone.

    Args:
      batch_size: B. text_length: M.
    """
    pairs, size, data = phase.mask_weight > 0, phase.transform["size"], config.data
    images = ("image", "image2")[: 1 + pairs]
    kinds = ("caption", "masked", "prompt", "shared")[: 3 + pairs]
    batch = {"weight": ((), np.float32), "entity_weight": ((), np.float32)}
    if pairs:
        batch["pair_weight"] = ((), np.float32)
    batch |= {name: ((), np.int32) for name in ("entity_set", "record", "data_set")}
    batch["caption_set"] = ((MOST_NAMES,), np.int32)
    if data.cache_images:
        encoder = build_model(config.model).image_encoder
        features = (encoder.feature_tokens(size), encoder.feature_width)
        batch |= {f"{name}_features": (features, np.float16) for name in images}
    else:
        batch |= {name: ((size, size, 3), np.uint8) for name in images}
    if data.nouns:
        batch["noun_ids"] = ((data.nouns, text_length), np.int32)
        batch["noun_present"] = ((data.nouns,), np.bool_)
    if Masking(config.loss.masking).classifies:
        batch["masked_targets"] = ((text_length,), np.int32)
    if data.cache_texts:
        width = config.model.text.width
        pooled = [kind for kind in kinds if kind != "masked"]
        batch |= {f"{kind}_pooled": ((width,), np.float16) for kind in pooled}
        batch["masked_tokens"] = ((text_length, width), np.float16)
        batch["masked_mask"] = ((text_length,), np.bool_)
    else:
        batch |= {f"{kind}_ids": ((text_length,), np.int32) for kind in kinds}
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        for name, (shape, dtype) in batch.items()
    }


def compiled(lowered: Any, arguments: int) -> dict[str, Any]:
    """The fields of `Measured` that the compiler tells of a lowered step (`jax.stages.Lowered`).

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
            return {"arguments": arguments, "fits": False}
        total = int(float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[used[2]])
        temporaries = total - arguments
        return dict(arguments=arguments, temporaries=temporaries, total=total, fits=False)
    stats = program.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "total": total,
        "fits": True,
        "collectives": collectives_of(program.as_text()),
    }


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
        collectives.append(Collective(match[2], shapes))
    return collectives


def _bytes_on_one(leaf: jax.ShapeDtypeStruct, placement: Any) -> int:
    return math.prod(placement.shard_shape(leaf.shape)) * leaf.dtype.itemsize
