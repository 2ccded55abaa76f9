"""Compile for machines one doesn't own: ``python -m ovseg_jax.aot --topology=v5e:4x4``."""

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax import flags, sharding
from ovseg_jax.errors import UserError
from ovseg_jax.progress import table
from ovseg_jax.train import compile_ahead
from ovseg_jax.train.compile_ahead import Machine, Measured
from ovseg_jax.train.config import load_config

ABOUT = """What a train step needs on a TPU, from the real compiler, on any machine without one.

  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 [--config.KEY=VALUE ...]
  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 --search

--search takes a compilation for each phase, mesh and batch size that it prints a line for.
Needs the extra `aot` (libtpu) for v4, v5e, v5p and v6e. For a100, h100 and h200 (--topology=h100:8)
it counts what can be known without a GPU. A compilation takes some minutes.
"""

FLAGS = (
    flags.Flag("config", help="config file, FILE.py or FILE.py:variant", required=True),
    flags.Flag("topology", help="CHIP:GRID, for example v5e:16x16", required=True),
    flags.Flag(
        "search",
        bool,
        default=False,
        help="try meshes, and on each double or halve the batch: which fit?",
    ),
)

# Collectives of at least this many bytes are listed.
LISTED_BYTES = 2**20

GPU_NOTE = (
    "The GPU compiler chooses its kernels by timing them and needs a GPU: temporaries, collectives "
    "and\nwhether it fits stay unknown here. Arguments, operations and the time at peak are exact."
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code: 1 where a step does not fit."""
    args = flags.parse(argv, FLAGS, ABOUT)
    compile_ahead.prepare_compiler()
    config = load_config(args.config, args.overrides)
    machine, devices = compile_ahead.machine_of(args.topology), None
    if machine.platform == "tpu":
        devices = compile_ahead.devices_of(machine)
    if args.search:
        if devices is None:
            raise UserError("--search needs a compiler, which there is for TPUs alone")
        return search(config, machine, devices)
    steps = [
        compile_ahead.measured(config, machine, devices, index)
        for index in range(len(config.phases))
    ]
    print(step_table(config, machine, steps))
    for step in steps:
        print(f"\n{collectives_table(step)}")
    return 1 if any(step.fits is False for step in steps) else 0


# ---- tables


def step_table(config: ConfigDict, machine: Machine, steps: Sequence[Measured]) -> str:
    """What the train steps need, one column for each phase."""
    sizes = sharding.abstract_mesh(**config.mesh, count=machine.count).shape.values()
    peak = machine.count * machine.peak
    rows = [
        (machine.name, *(step.phase for step in steps)),
        ("chips", *[str(machine.count)] * len(steps)),
        ("global batch", *(str(step.batch_size) for step in steps)),
        ("mesh, data x fsdp x tensor", *[" x ".join(map(str, sizes))] * len(steps)),
        ("parameters", *(f"{step.parameters / 1e6:.1f} M" for step in steps)),
        ("HBM per chip: arguments", *(size(step.arguments) for step in steps)),
        ("  temporaries", *(size(step.temporaries) for step in steps)),
        ("  total", *(size(step.total) for step in steps)),
        ("  of", *[size(machine.memory)] * len(steps)),
        ("fits", *({True: "yes", False: "no", None: "-"}[step.fits] for step in steps)),
        ("TFLOPs per step", *(f"{step.flops / 1e12:.3g}" for step in steps)),
        ("  without rematerialization", *(f"{step.model_flops / 1e12:.3g}" for step in steps)),
        ("ms per step at peak", *(f"{1e3 * step.flops / peak:.3g}" for step in steps)),
    ]
    return table(rows) + (f"\n\n{GPU_NOTE}" if machine.platform == "gpu" else "")


def collectives_table(step: Measured) -> str:
    """The collectives of a step whose results have `LISTED_BYTES` or more, largest first."""
    listed = [each for each in step.collectives or [] if each.bytes >= LISTED_BYTES]
    if not listed:
        return f"{step.phase}: no collective of {size(LISTED_BYTES)} or more is known"
    rows = [(f"{step.phase}: collectives (in a loop: of one iteration)", "shapes", "bytes")]
    for each in sorted(listed, key=lambda each: -each.bytes):
        shapes = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in each.shapes)
        rows.append((each.kind, shapes, size(each.bytes)))
    return table(rows)


def size(count: int | None) -> str:
    """Bytes for people: 1.50 GiB; "-" where they are not known."""
    if count is None:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


# ---- search


def search(config: ConfigDict, machine: Machine, devices: list[Any]) -> int:
    """Prints the largest batch that fits on each mesh; returns 1 where none does on any."""
    start, count = max(phase["batch_size"] for phase in config.phases), machine.count
    meshes = [(count, 1, 1), (count // 4, 4, 1), (1, count, 1), (count // 4, 2, 2)]
    rows = [("mesh", "largest batch", "pairs a chip")]
    for mesh in dict.fromkeys(mesh for mesh in meshes if mesh[0] * mesh[1] * mesh[2] == count):
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
        name = " x ".join(map(str, mesh))

        def fits(batch_size: int, name: str = name) -> bool:
            for phase in config.phases:
                phase["batch_size"] = batch_size
            # The last phase has the most losses: where it does not fit, no other is compiled.
            for index in reversed(range(len(config.phases))):
                step = compile_ahead.measured(config, machine, devices, index)
                result = "fits" if step.fits else "does not fit"
                used = f"{size(step.total)} a chip of {size(machine.memory)}"
                print(
                    f"mesh {name}, batch {batch_size}: {step.phase!r} {result}, {used}", flush=True
                )
                if not step.fits:
                    return False
            return True

        best = largest(fits, start, step=mesh[0] * mesh[1] * config.accumulation.micro_batches)
        rows.append((name, str(best or "none"), f"{best / count:g}" if best else "-"))
    print(f"\n{table(rows)}")
    return 0 if any(row[1] != "none" for row in rows[1:]) else 1


def largest(fits: Callable[[int], bool], start: int, step: int) -> int | None:
    """The largest batch size, of `start` times powers of two, that fits.

    Args:
      fits: asked once for each size tried.
      start: tried first; sizes are doubled while they fit, or else halved until one does.
      step: sizes are multiples of it; `start` is rounded up to one.

    Returns:
      None where not even a batch of less than two steps fits.
    """
    size = -(-start // step) * step
    if fits(size):
        while fits(2 * size):
            size *= 2
        return size
    while size // 2 >= step:
        size = size // 2 // step * step
        if fits(size):
            return size
    return None


if __name__ == "__main__":
    flags.run(main)
