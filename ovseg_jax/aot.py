"""Compile for machines one doesn't own: ``python -m ovseg_jax.aot --topology=v5e:4x4``."""

from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax import flags
from ovseg_jax.errors import UserError
from ovseg_jax.train.aot import chips, devices, measure, tables

ABOUT = """What a train step needs on a TPU, from the real compiler, on any machine without one.

  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 [--config.KEY=VALUE ...]
  python -m ovseg_jax.aot --config=configs/vitb.py --topology=v5e:4x4 --search

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
        help="tokens that texts are padded to; 0 takes config.data.text_length, or 77 where the "
        "data would decide",
    ),
    flags.Flag("batch_size", int, default=0, help="global; 0 takes each phase's"),
    flags.Flag("search", bool, default=False, help="try batch sizes and meshes: which fit?"),
    flags.Flag("gathers", bool, default=False, help="also list every all-gather"),
)

# CLIP's length, which the released training pads all texts to.
LONGEST = 77


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code: 1 where a step does not fit."""
    args = flags.parse(argv, FLAGS, ABOUT)
    devices.prepare()
    config = flags.config_from(args)
    if args.batch_size < 0 or args.text_length < 0:
        raise UserError("--batch_size and --text_length must not be negative")
    machine = chips.machine_of(args.topology)
    present = devices.devices_of(machine) if machine.chip.platform == "tpu" else None
    if args.search:
        if present is None:
            raise UserError("--search needs a compiler, which there is for TPUs alone")
        return _search(args, config, machine, present)
    found = _phases(args, config, machine, present, args.batch_size)
    print(tables.step_table(config, machine, found))
    if args.gathers:
        for one in found:
            print(f"\n{tables.gather_table(one)}")
    return 1 if any(one.fits is False for one in found) else 0


def _phases(
    args: SimpleNamespace,
    config: ConfigDict,
    machine: chips.Machine,
    present: list[Any] | None,
    batch_size: int,
) -> list[measure.Measured]:
    """Each phase that is not the same program as one before it."""
    length = args.text_length or config.data.text_length or LONGEST
    found, seen = [], set()
    for index, phase in enumerate(measure.make_phases(config, measure.RECORDS)):
        size = batch_size or phase.batch_size
        kind = (size, phase.mask_weight > 0, phase.frozen, str(phase.erase))
        if kind not in seen:
            seen.add(kind)
            found.append(measure.measured(config, machine, present, index, size, length))
    return found


def _search(
    args: SimpleNamespace, config: ConfigDict, machine: chips.Machine, present: list[Any]
) -> int:
    """Doubles the batch on every mesh until it no longer fits."""
    rows = []
    start = args.batch_size or max(phase["batch_size"] for phase in config.phases)
    for mesh in tables.meshes_to_try(machine.count):
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
        batch_size, fits = start, True
        while fits:
            found = _phases(args, config, machine, present, batch_size)
            rows.append((mesh, batch_size, found))
            print(f"{mesh}, batch {batch_size}: {found[-1].fits}", flush=True)
            fits = all(one.fits for one in found)
            batch_size *= 2
    print(tables.search_table(rows))
    return 0


if __name__ == "__main__":
    flags.run(main)
