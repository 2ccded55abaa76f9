"""Phases as data: what changes in the course of a run, from the config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.data.augment import complete_transform
from ovseg_jax.errors import UserError
from ovseg_jax.flags import filled
from ovseg_jax.optim.optimizer import learning_rate
from ovseg_jax.shapes import Array

# A phase with a smaller share of the summed learning rate is warned of.
LEAST_RATE_SHARE = 0.05
CHOICES = {
    "optimizer": ("continue", "fresh"),
    "teacher": ("keep", "reset"),
    "start_from": ("last", "best"),
}
# Fields of a phase's config, with their defaults.
FIELDS = {
    "name": None,
    "steps": 0,
    "epochs": 0,
    "batch_size": 0,
    "mask_weight": 0.0,
    "frozen": (),
    "transform": None,
    "learning_rate": None,
    **{name: allowed[0] for name, allowed in CHOICES.items()},
}


@dataclass(frozen=True)
class Phase:
    """One stretch of training with its own compiled step."""

    index: int
    name: str  # in messages
    first: int  # global step
    last: int  # global step, exclusive
    before: int  # number of examples in the earlier phases
    batch_size: int  # global
    mask_weight: float  # lambda of Eq. 13; at 0 no second image is read and no teacher runs
    frozen: tuple[str, ...]  # patterns of parameters that do not train
    transform: dict[str, Any]  # of images, see `data.augment.complete_transform`
    schedule: ConfigDict | None  # the phase's learning-rate config; None follows the run's
    optimizer: str  # see `resume.next_phase_state`
    teacher: str  # see `resume.next_phase_state`
    start_from: str  # the "last" state of the phase before, or the "best" one saved

    def position(self, step: int) -> int:
        """Number of examples before a step of this phase."""
        return self.before + (step - self.first) * self.batch_size

    @property
    def erase(self) -> dict[str, Any] | None:
        """Random erasing of the images on the device, None where there is none."""
        erase = self.transform["erase"]
        return erase if erase["probability"] > 0 else None


def make_phases(config: ConfigDict, records: int) -> list[Phase]:
    """The phases of a run.

    Args:
      records: length of the training set, to turn epochs into steps; of a mixture the records of
        all its data sets together.

    Raises:
      UserError: an unknown or missing field, or a value that is not allowed.
    """
    if not config.phases:
        raise UserError("config.phases is empty: give at least one phase")
    phases: list[Phase] = []
    for index, fields in enumerate(config.phases):
        where = f"config.phases[{index}]"
        values = filled(fields, FIELDS, where)
        for key, allowed in CHOICES.items():
            if values[key] not in allowed:
                raise UserError(
                    f"{where}.{key} is {values[key]!r}; it must be {' or '.join(allowed)}"
                )
        size, steps, epochs = (values[name] for name in ("batch_size", "steps", "epochs"))
        if size < 1:
            raise UserError(f"{where}.batch_size must be at least 1")
        if bool(steps) == bool(epochs):
            raise UserError(f"{where} needs either steps or epochs")
        steps = steps or int(epochs * records / size)
        if steps < 1:
            raise UserError(f"{where}: {epochs} epochs of {records} records are no step of {size}")
        transform, origin = values["transform"], f"{where}.transform"
        if transform is None:
            transform, origin = config.data.transform, "config.data.transform"
        schedule = values["learning_rate"]
        if schedule is not None:
            common = config.optimizer.learning_rate.to_dict()
            schedule = ConfigDict(filled(schedule, common, f"{where}.learning_rate"))
        first = phases[-1].last if phases else 0
        phases.append(
            Phase(
                index=index,
                name=values["name"] or f"phase {index}",
                first=first,
                last=first + steps,
                before=phases[-1].position(first) if phases else 0,
                batch_size=size,
                mask_weight=float(values["mask_weight"]),
                frozen=tuple(values["frozen"]),
                transform=complete_transform(ConfigDict(transform).to_dict(), origin),
                schedule=schedule,
                **{name: values[name] for name in CHOICES},
            )
        )
    return phases


def weak_phases(config: ConfigDict, phases: Sequence[Phase]) -> list[str]:
    """A line of warning for each phase that can hardly change the model.

    That is one with a small share of the learning rate summed over the run, unless it has a
    schedule of its own: then somebody decided so.
    """
    total, sums = phases[-1].last, []
    for phase in phases:
        steps = jnp.arange(phase.first, phase.last)
        rates = jax.vmap(lambda step, phase=phase: rate_at(step, config, phase, total))(steps)
        sums.append(float(jnp.sum(rates)))
    shares = [value / (sum(sums) or 1.0) for value in sums]
    return [
        f"warning: phase {phase.name!r} has {100 * share:.2g} % of the learning rate summed over "
        f"the run, too little to show an effect: raise config.optimizer.learning_rate.end, or give "
        f"config.phases[{phase.index}] more steps or a learning_rate of its own"
        for phase, share in zip(phases, shares, strict=True)
        if len(phases) > 1 and phase.schedule is None and share < LEAST_RATE_SHARE
    ]


def rate_at(step: Array, config: ConfigDict, phase: Phase, total: int) -> jax.Array:
    """The learning rate at a global step: of the phase's own schedule or of the whole run's."""
    if phase.schedule is not None:
        length = phase.last - phase.first
        return learning_rate(step, phase.schedule, first=phase.first, total=length)
    return learning_rate(step, config.optimizer.learning_rate, first=0, total=total)
