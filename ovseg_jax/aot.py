"""Compile for machines one doesn't own: ``python -m ovseg_jax.aot --topology=v5e:4x4``."""

from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax import flags
from ovseg_jax.errors import UserError
from ovseg_jax.train.aot import chips, cost, devices, measure, search, tables

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
    flags.Flag("pairs", int, default=0, help="of the training set: what does the whole run take?"),
    flags.Flag("utilization", float, default=0.4, help="of the chips' peak, for --pairs"),
    flags.Flag("gathers", bool, default=False, help="also list every all-gather"),
)

# CLIP's length, which the released training pads all texts to.
LONGEST = 77


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code: 1 where a step does not fit."""
    args = flags.parse(argv, FLAGS, ABOUT)
    devices.prepare()
    config = flags.config_from(args)
    if min(args.batch_size, args.text_length, args.pairs) < 0:
        raise UserError("--batch_size, --text_length and --pairs must not be negative")
    if not 0 < args.utilization <= 1:
        raise UserError(f"--utilization={args.utilization} must lie above 0 and not above 1")
    machine = chips.machine_of(args.topology)
    present = None
    if machine.chip.platform == "tpu":
        present = devices.devices_of(machine)
        machine = machine.with_memory(devices.available_memory(present))
    if args.search:
        if present is None:
            raise UserError("--search needs a compiler, which there is for TPUs alone")
        return _search(args, config, machine, present)
    if args.batch_size:
        _set_batch_size(config, args.batch_size)
    programs = _programs(config)
    found = {i: _measured(args, config, machine, present, i) for i in dict.fromkeys(programs)}
    print(tables.step_table(config, machine, [*found.values()]))
    if args.gathers:
        for one in found.values():
            print(f"\n{tables.gather_table(one)}")
    if args.pairs:
        phases = measure.make_phases(config, args.pairs)
        steps = [phase.last - phase.first for phase in phases]
        run = cost.Estimate([found[i] for i in programs], steps, machine, args.utilization)
        print(f"\n{cost.cost_table(run, [phase.name for phase in phases])}")
    return 1 if any(one.fits is False for one in found.values()) else 0


def _set_batch_size(config: ConfigDict, batch_size: int) -> None:
    for phase in config.phases:
        phase["batch_size"] = batch_size


def _programs(config: ConfigDict) -> list[int]:
    """For each phase the first one that is the same program."""
    kinds = [
        (phase.batch_size, phase.mask_weight > 0, phase.frozen, str(phase.erase))
        for phase in measure.make_phases(config, measure.RECORDS)
    ]
    return [kinds.index(kind) for kind in kinds]


def _measured(
    args: SimpleNamespace,
    config: ConfigDict,
    machine: chips.Machine,
    present: list[Any] | None,
    index: int,
) -> measure.Measured:
    return measure.measured(config, machine, present, index, _text_length(args, config))


def _text_length(args: SimpleNamespace, config: ConfigDict) -> int:
    most = config.model.text.max_positions
    length = args.text_length or config.data.text_length or min(LONGEST, most)
    if length > most:
        raise UserError(
            f"texts of {length} tokens (--text_length, config.data.text_length), but the text "
            f"encoder has positions for {most} (config.model.text.max_positions)"
        )
    return length


def _search(
    args: SimpleNamespace, config: ConfigDict, machine: chips.Machine, present: list[Any]
) -> int:
    """The largest batch that fits on each mesh; returns 1 where none does on any."""
    start = args.batch_size or max(phase["batch_size"] for phase in config.phases)
    tried = []
    for mesh in tables.meshes_to_try(machine.count):
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))

        def attempt(batch_size: int, mesh: tables.Mesh = mesh) -> bool:
            _set_batch_size(config, batch_size)
            found = []
            # The last phase has the most losses: where it does not fit, no other is compiled.
            for index in sorted(set(_programs(config)), reverse=True):
                found.append(_measured(args, config, machine, present, index))
                if not found[-1].fits:
                    break
            tried.append((mesh, batch_size, found))
            print(tables.search_line(*tried[-1]), flush=True)
            return bool(found[-1].fits)

        search.largest(attempt, start, step=mesh[0] * mesh[1])
    print(f"\n{tables.search_table(tried, machine)}")
    return 0 if any(all(one.fits for one in found) for _, _, found in tried) else 1


if __name__ == "__main__":
    flags.run(main)
