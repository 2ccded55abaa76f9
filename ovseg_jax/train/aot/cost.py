"""What a whole run takes, from the operations of its steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from ovseg_jax.progress import table
from ovseg_jax.train.aot.chips import Machine
from ovseg_jax.train.aot.measure import Measured, peak_seconds
from ovseg_jax.train.aot.tables import digits


@dataclass(frozen=True)
class Estimate:
    """A run on a machine.

    Attributes:
      found: each phase's step. steps: each phase's number of them.
      utilization: of the chips' peak while it trains, with what rematerialization repeats.
    """

    found: Sequence[Measured]
    steps: Sequence[int]
    machine: Machine
    utilization: float

    def seconds(self, phase: int) -> float:
        """Of one step."""
        return peak_seconds(self.found[phase], self.machine) / self.utilization

    def hours(self, phase: int) -> float:
        """Of all steps of a phase."""
        return self.steps[phase] * self.seconds(phase) / 3600


def cost_table(run: Estimate, names: Sequence[str]) -> str:
    """Steps, hours and chip-hours of each phase and of the whole run."""
    hours = [run.hours(phase) for phase in range(len(names))]
    steps = [*run.steps, sum(run.steps)]
    seconds = [*(digits(run.seconds(phase)) for phase in range(len(names))), ""]
    rows = [
        (f"at {run.utilization:.0%} of the peak", *names, "together"),
        ("steps", *map(str, steps)),
        ("seconds per step", *seconds),
    ]
    for label, factor in (("hours", 1), ("chip-hours", run.machine.count)):
        rows.append((label, *(digits(factor * each) for each in [*hours, sum(hours)])))
    return table(rows)
