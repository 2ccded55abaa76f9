"""Compile for machines one doesn't own: ``python -m ovseg_jax.aot --topology=v5e:4x4``."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from ml_collections import ConfigDict

from ovseg_jax import flags
from ovseg_jax.errors import UserError
from ovseg_jax.progress import table
from ovseg_jax.train import chips, compile_ahead
from ovseg_jax.train.compile_ahead import Measured
from ovseg_jax.train.config import load_config
from ovseg_jax.train.phases import make_phases

ABOUT = """What a train step needs on a TPU, from the real compiler, on any machine without one.

  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 [--config.KEY=VALUE ...]
  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 --search
  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 --pairs=4300000

--search takes a compilation for each phase, mesh and batch size that it prints a line for.
Needs the extra `aot` (libtpu) for v4, v5e, v5p and v6e. For a100, h100 and h200 (--topology=h100:8)
it counts what can be known without a GPU. A compilation takes some minutes.
"""

FLAGS = (
    flags.Flag("config", help="config file, FILE.py or FILE.py:variant", required=True),
    flags.Flag("topology", help="CHIP:GRID, for example v5e:16x16", required=True),
    flags.Flag(
        "text_length",
        int,
        default=0,
        help="tokens that texts are padded to; 0 takes config.data.text_length, or where "
        "the data would decide 77, or less if the model has not as many positions",
    ),
    flags.Flag("batch_size", int, default=0, help="global; 0 takes each phase's"),
    flags.Flag(
        "search",
        bool,
        default=False,
        help="try meshes, and on each double or halve the batch: which fit?",
    ),
    flags.Flag("pairs", int, default=0, help="of the training set: how long is the whole run?"),
    flags.Flag("utilization", float, default=0.4, help="of the chips' peak, for --pairs"),
    flags.Flag("collectives_above", float, default=1.0, help="MiB, of those that are listed"),
)

# CLIP's length, which the released training pads all texts to.
LONGEST = 77

GPU_NOTE = (
    "The GPU compiler chooses its kernels by timing them and needs a GPU: temporaries, collectives "
    "and\nwhether it fits stay unknown here. Arguments, operations and the time at peak are exact."
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code: 1 where a step does not fit."""
    args = flags.parse(argv, FLAGS, ABOUT)
    chips.prepare_compiler()
    config = load_config(args.config, args.overrides)
    if min(args.batch_size, args.text_length, args.pairs) < 0:
        raise UserError("--batch_size, --text_length and --pairs must not be negative")
    if not 0 < args.utilization <= 1:
        raise UserError(f"--utilization={args.utilization} must lie above 0 and not above 1")
    machine, devices = chips.machine_of(args.topology), None
    if machine.chip.platform == "tpu":
        devices = chips.devices_of(machine)
        machine = machine.with_memory(chips.available_memory(devices))
    length = _text_length(args, config)

    def measure(index: int) -> Measured:
        return compile_ahead.measured(config, machine, devices, index, length)

    if args.search:
        if devices is None:
            raise UserError("--search needs a compiler, which there is for TPUs alone")
        return _search(config, machine, measure, args.batch_size)
    if args.batch_size:
        _set_batch_size(config, args.batch_size)
    programs = _programs(config)
    steps = {index: measure(index) for index in dict.fromkeys(programs)}
    print(step_table(config, machine, [*steps.values()]))
    for step in steps.values():
        print(f"\n{collectives_table(step, args.collectives_above)}")
    if args.pairs:
        print(f"\n{_run_table(args, config, machine, [steps[index] for index in programs])}")
    return 1 if any(step.fits is False for step in steps.values()) else 0


def _text_length(args: SimpleNamespace, config: ConfigDict) -> int:
    most = config.model.text.max_positions
    length = args.text_length or config.data.text_length or min(LONGEST, most)
    if length > most:
        raise UserError(
            f"texts of {length} tokens (--text_length, config.data.text_length), but the text "
            f"encoder has positions for {most} (config.model.text.max_positions)"
        )
    return length


def _set_batch_size(config: ConfigDict, batch_size: int) -> None:
    for phase in config.phases:
        phase["batch_size"] = batch_size


def _programs(config: ConfigDict) -> list[int]:
    """For each phase the first one that is the same program."""
    kinds = [
        (
            phase.batch_size,
            phase.mask_weight > 0,
            phase.frozen,
            str(phase.erase),
            phase.transform["size"],
        )
        for phase in make_phases(config, compile_ahead.RECORDS)
    ]
    return [kinds.index(kind) for kind in kinds]


# ---- tables


def step_table(config: ConfigDict, machine: chips.Machine, steps: Sequence[Measured]) -> str:
    """What the train steps need, one column for each phase."""
    sizes = compile_ahead.abstract_mesh(**config.mesh, count=machine.count).shape.values()
    rows = [
        (machine.name, *(step.phase for step in steps)),
        ("chips", *[str(machine.count)] * len(steps)),
        ("global batch", *(str(step.batch_size) for step in steps)),
        ("mesh, data x fsdp x tensor", *[" x ".join(map(str, sizes))] * len(steps)),
        ("parameters", *(f"{step.parameters / 1e6:.1f} M" for step in steps)),
        ("HBM per chip: arguments", *(size(step.arguments) for step in steps)),
        ("  temporaries", *(size(step.temporaries) for step in steps)),
        ("  total", *(size(step.total) for step in steps)),
        ("  of", *[size(machine.chip.memory)] * len(steps)),
        ("fits", *({True: "yes", False: "no", None: "-"}[step.fits] for step in steps)),
        ("TFLOPs per step", *(digits(step.flops / 1e12) for step in steps)),
        ("  without rematerialization", *(digits(step.model_flops / 1e12) for step in steps)),
        ("GFLOPs per pair", *(digits(step.flops / step.batch_size / 1e9) for step in steps)),
        ("ms per step at peak", *(digits(1e3 * step.peak_seconds(machine)) for step in steps)),
    ]
    return table(rows) + (f"\n\n{GPU_NOTE}" if machine.chip.platform == "gpu" else "")


def collectives_table(step: Measured, least: float) -> str:
    """The collectives of a step whose results have at least so many MiB, largest first."""
    listed = [one for one in step.collectives or [] if one.bytes >= least * 2**20]
    if not listed:
        return f"{step.phase}: no collective of {least:g} MiB or more is known"
    rows = [(f"{step.phase}: collectives (in a loop: of one iteration)", "shapes", "bytes")]
    for one in sorted(listed, key=lambda one: -one.bytes):
        shapes = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in one.shapes)
        rows.append((one.kind, shapes, size(one.bytes)))
    return table(rows)


def _run_table(
    args: SimpleNamespace, config: ConfigDict, machine: chips.Machine, steps: Sequence[Measured]
) -> str:
    """Steps, hours and chip-hours of each phase and of the whole run."""
    phases = make_phases(config, args.pairs)
    counts = [phase.last - phase.first for phase in phases]
    seconds = [step.peak_seconds(machine) / args.utilization for step in steps]
    hours = [count * each / 3600 for count, each in zip(counts, seconds, strict=True)]
    hours.append(sum(hours))
    rows = [
        (f"at {args.utilization:.0%} of the peak", *(phase.name for phase in phases), "together"),
        ("steps", *map(str, [*counts, sum(counts)])),
        ("seconds per step", *map(digits, seconds), ""),
        ("hours", *map(digits, hours)),
        ("chip-hours", *(digits(machine.count * each) for each in hours)),
    ]
    return table(rows)


def size(count: int | float | None) -> str:
    """Bytes for people: 1.5 GiB; "-" where they are not known."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def digits(value: float) -> str:
    """One decimal, or as many as show two digits of a small number; none for a large one."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


# ---- search


def _search(
    config: ConfigDict, machine: chips.Machine, measure: Callable[[int], Measured], batch_size: int
) -> int:
    """Prints the largest batch that fits on each mesh; returns 1 where none does on any."""
    start = batch_size or max(phase["batch_size"] for phase in config.phases)
    count = machine.count
    meshes = [(count, 1, 1), (count // 4, 4, 1), (1, count, 1), (count // 4, 2, 2)]
    rows = [("mesh", "largest batch", "pairs a chip")]
    for mesh in dict.fromkeys(mesh for mesh in meshes if mesh[0] * mesh[1] * mesh[2] == count):
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
        name = " x ".join(map(str, mesh))

        def fits(batch_size: int, name: str = name) -> bool:
            _set_batch_size(config, batch_size)
            # The last phase has the most losses: where it does not fit, no other is compiled.
            for index in sorted(set(_programs(config)), reverse=True):
                step = measure(index)
                result = "fits" if step.fits else "does not fit"
                used = f"{size(step.total)} a chip of {size(machine.chip.memory)}"
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
