"""Compile for machines one doesn't own: ``python -m ovseg_jax.aot --topology=v5e:4x4``."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from ovseg_jax import flags, platforms, sharding
from ovseg_jax.data.captions import Masking
from ovseg_jax.data.examples import MOST_NAMES
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.progress import table
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train import checks
from ovseg_jax.train.config import load_config
from ovseg_jax.train.metrics import matmul_flops, model_flops, peak_flops
from ovseg_jax.train.phases import Phase, make_phases
from ovseg_jax.train.step import Program

ABOUT = """What a train step needs on a TPU, from the real compiler, on any machine without one.

  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 [--config.KEY=VALUE ...]
  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 --search

--search takes a compilation for each phase, mesh and batch size that it prints a line for.
Needs the extra `aot` (libtpu), for v4, v5e, v5p and v6e. A compilation takes some minutes.
"""

FLAGS = (
    flags.Flag("config", help="config file, FILE.py or FILE.py:variant", required=True),
    flags.Flag("topology", help="CHIP:GRID, for example v5e:16x16", required=True),
    flags.Flag("search", bool, default=False, help="which meshes and batch sizes fit?"),
)

GIB = 2**30
# Collectives of at least this many bytes are listed.
LISTED_BYTES = 2**20

# Chip: its name in JAX, and its memory in bytes (Google's documentation, "Cloud TPU system
# architecture").
CHIPS = {
    "v4": ("TPU v4", 32 * GIB),
    "v5e": ("TPU v5e", 16 * GIB),
    "v5p": ("TPU v5p", 95 * GIB),
    "v6e": ("TPU v6e", 32 * GIB),
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


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code: 1 where a step does not fit."""
    args = flags.parse(argv, FLAGS, ABOUT)
    # From here on this process compiles for TPUs and computes on its CPU.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    config = load_config(args.config, args.overrides)
    machine = machine_of(args.topology)
    if args.search:
        return search(config, machine)
    steps = [measured(config, machine, index) for index in range(len(config.phases))]
    print(step_table(config, machine, steps))
    for step in steps:
        print(f"\n{collectives_table(step)}")
    return 0 if all(step.fits for step in steps) else 1


# ---- machines


@dataclass(frozen=True)
class Machine:
    """Equal chips, each with bytes of memory and a peak of FLOP/s. Nothing can run on them."""

    name: str
    devices: list[Any]
    memory: int
    peak: float


def machine_of(name: str) -> Machine:
    """The machine CHIP:GRID, as the TPU compiler describes it."""
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if match is None:
        raise UserError(f"--topology={name} is not of the form CHIP:GRID, for example v5e:16x16")
    if match[1] not in CHIPS:
        near = flags.nearest(match[1], list(CHIPS))
        raise UserError(f"--topology={name}: chip {match[1]!r} is none of {', '.join(CHIPS)}{near}")
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError("the TPU compiler is not here: pip install 'ovseg_jax[aot]' (700 MB)")
    # The two cores of a v4 chip work as one in training; JAX counts them as two by default.
    options = {"chip_config_name": "megacore"} if match[1] == "v4" else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        if "lockfile" in str(error) or "already in use" in str(error):
            raise UserError(
                "libtpu thinks that another process uses it. If none does, an ended one left its "
                f"lock: remove /tmp/libtpu_lockfile ({line})"
            ) from None
        raise UserError(f"--topology={name}: the TPU compiler says: {line}") from None
    devices, count = list(topology.devices), math.prod(map(int, match[2].split("x")))
    if len(devices) != count:
        raise UserError(f"--topology={name}: {count} chips are {len(devices)} to the compiler")
    kind, memory = CHIPS[match[1]]
    return Machine(name, devices, memory, peak_flops(kind))


# ---- one step


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, and its results on one, such as ("f32", (2048, 256))."""

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
    """What is known about a step. Bytes are of one chip; None where a step does not fit."""

    phase: str
    batch_size: int  # global
    parameters: int
    flops: int  # of matrix products, on all chips, with what rematerialization repeats
    model_flops: int  # without it
    fits: bool
    arguments: int | None = None  # bytes of state and batch
    temporaries: int | None = None  # bytes of everything made in a step
    total: int | None = None  # bytes of both, of the program, and of what it returns
    collectives: tuple[Collective, ...] = ()  # of one device


def measured(config: ConfigDict, machine: Machine, phase_index: int) -> Measured:
    """Traces and compiles the train step of a phase for the devices of a machine."""
    # Operations are counted in a program on a mesh without devices.
    program = program_of(config, sharding.abstract_mesh(**config.mesh, count=len(machine.devices)))
    phase = program.phases[phase_index]
    length = config.data.text_length or min(TEXT_LENGTH, config.model.text.max_positions)
    checks.check_text_length(config, length)
    batch = batch_shapes(config, phase, phase.batch_size, length)
    state = program.abstract_state(phase.frozen)
    with platforms.traced_for("tpu"):
        flops = matmul_flops(program.step(phase), state, batch)
        without_repetition = model_flops(program, phase, batch)
        program = program_of(config, sharding.make_mesh(**config.mesh, devices=machine.devices))
        state = program.abstract_state(phase.frozen)
        lowered = program.compiled_step(phase).lower(state, batch)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    counts = (phase.batch_size, parameters, flops, without_repetition)
    return Measured(phase.name, *counts, **compiled(lowered))


def program_of(config: ConfigDict, mesh: AnyMesh) -> Program:
    """The program of a config on a mesh, without data or weights."""
    checks.check_losses(config)
    phases = make_phases(config, RECORDS)
    checks.check_phases(config, phases, mesh)
    return Program(config=config, mesh=mesh, model=build_model(config.model), phases=phases)


def batch_shapes(
    config: ConfigDict, phase: Phase, batch_size: int, text_length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `data.examples.Loader` gives in a phase, from the config alone."""
    pairs, size, data = phase.mask_weight > 0, phase.transform["size"], config.data
    images = ("image", "image2")[: 1 + pairs]
    kinds = ("caption", "masked", "prompt", "shared")[: 3 + pairs]
    weights = ("weight", "entity_weight", "pair_weight")[: 2 + pairs]
    batch = {name: ((), np.float32) for name in weights}
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


def compiled(lowered: Any) -> dict[str, Any]:
    """The fields of `Measured` that the compiler tells of a `jax.stages.Lowered` step."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # Two of the compiler's passes may run out of memory, each with its message.
        pattern = r"(?:Used |required for HLO temporaries \()([\d.]+)([KMG])"
        used = re.search(pattern, str(error))
        scale = {"K": 2**10, "M": 2**20, "G": GIB}
        return {"fits": False, "total": int(float(used[1]) * scale[used[2]]) if used else None}
    stats = program.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    return dict(
        fits=True,
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        total=total,
        collectives=tuple(collectives_of(program.as_text())),
    )


def collectives_of(text: str) -> list[Collective]:
    """All collectives of a program (`jax.stages.Compiled.as_text`), those of a loop's body once.

    The TPU compiler repeats a collective in the text of each computation that it runs beside, as
    links of a chain: it is listed once.
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


# ---- tables


def step_table(config: ConfigDict, machine: Machine, steps: Sequence[Measured]) -> str:
    """What the train steps need, one column for each phase."""
    sizes = sharding.abstract_mesh(**config.mesh, count=len(machine.devices)).shape.values()
    peak = len(machine.devices) * machine.peak
    columns = [
        {
            machine.name: step.phase,
            "chips": str(len(machine.devices)),
            "global batch": str(step.batch_size),
            "mesh, data x fsdp x tensor": " x ".join(map(str, sizes)),
            "parameters": f"{step.parameters / 1e6:.1f} M",
            "HBM per chip: arguments": _gib(step.arguments),
            "  temporaries": _gib(step.temporaries),
            "  total": _gib(step.total),
            "  of": _gib(machine.memory),
            "fits": "yes" if step.fits else "no",
            "TFLOPs per step": f"{step.flops / 1e12:.3g}",
            "  without rematerialization": f"{step.model_flops / 1e12:.3g}",
            "ms per step at peak": f"{1e3 * step.flops / peak:.3g}",
        }
        for step in steps
    ]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return table(rows)


def collectives_table(step: Measured) -> str:
    """The collectives of a step whose results have `LISTED_BYTES` or more, largest first."""
    listed = [each for each in step.collectives if each.bytes >= LISTED_BYTES]
    if not listed:
        return f"{step.phase}: no collective of 1 MiB or more is known"
    rows = [(f"{step.phase}: collectives (in a loop: of one iteration)", "shapes", "MiB")]
    for each in sorted(listed, key=lambda each: -each.bytes):
        shapes = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in each.shapes)
        rows.append((each.kind, shapes, f"{each.bytes / 2**20:.2f}"))
    return table(rows)


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / GIB:.2f} GiB"


# ---- search


def search(config: ConfigDict, machine: Machine) -> int:
    """Prints the largest batch that fits on each mesh; returns 1 where none does on any.

    The config's batch size is doubled while it fits, or else halved until it does.
    """
    start, count = max(phase["batch_size"] for phase in config.phases), len(machine.devices)
    meshes = [(count, 1, 1), (count // 4, 4, 1), (1, count, 1), (count // 4, 2, 2)]
    rows = [("mesh", "largest batch", "pairs a chip")]
    for mesh in dict.fromkeys(mesh for mesh in meshes if math.prod(mesh) == count):
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
        name = " x ".join(map(str, mesh))
        step = mesh[0] * mesh[1] * config.accumulation.micro_batches
        first = best = -(-start // step) * step
        while best and not _fits(config, machine, best):
            best = best // 2 // step * step
        while best >= first and _fits(config, machine, 2 * best):
            best *= 2
        rows.append((name, str(best or "none"), f"{best / count:g}" if best else "-"))
    print(f"\n{table(rows)}")
    return 0 if any(row[1] != "none" for row in rows[1:]) else 1


def _fits(config: ConfigDict, machine: Machine, batch_size: int) -> bool:
    """Whether all phases fit with a batch size; says so for each."""
    mesh = " x ".join(map(str, config.mesh.values()))
    for phase in config.phases:
        phase["batch_size"] = batch_size
    # The last phase has the most losses: where it does not fit, no other is compiled.
    for index in reversed(range(len(config.phases))):
        step = measured(config, machine, index)
        result = "fits" if step.fits else "does not fit"
        used = f"{_gib(step.total)} a chip of {_gib(machine.memory)}"
        print(f"mesh {mesh}, batch {batch_size}: {step.phase!r} {result}, {used}", flush=True)
        if not step.fits:
            return False
    return True


if __name__ == "__main__":
    flags.run(main)
