"""Where a run goes on: its latest checkpoint that can be read."""

from collections.abc import Callable
from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.train.checkpoint import Checkpoints, Damaged, any_process
from ovseg_jax.train.state import TrainState


def restore_latest(
    checkpoints: Checkpoints,
    abstract: Callable[[dict[str, Any]], TrainState],
    say: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any]] | None:
    """The latest state that can be read, with its record; None where none was saved.

    One that is damaged is moved to ``checkpoints/damaged``, and the one before is tried. All
    processes take the same one.

    Args:
      abstract: from a record to what `Checkpoints.restore` takes; may refuse the record.
      say: is told about damage.

    Raises:
      UserError: no checkpoint is whole, or the one that is does not fit.
    """
    steps = checkpoints.steps()
    for step in reversed(steps):
        why, found = checkpoints.fault(step), None
        if not why:
            try:
                position = checkpoints.position(step=step)
                found = checkpoints.restore(abstract(position), step=step), position
            except Damaged as error:
                why = str(error)
        if not any_process(bool(why)):
            return found
        target = checkpoints.set_aside(step)
        say(
            f"warning: the checkpoint of step {step} is damaged "
            f"({why or 'another process cannot read it'}); moved to {target}"
        )
    if steps:
        raise UserError(
            f"no checkpoint in {checkpoints.directory} can be read; the damaged ones are in "
            f"{checkpoints.directory / 'damaged'}. Give another --workdir to begin anew"
        )
    return None
