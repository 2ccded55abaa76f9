"""Where a state comes from: the beginning, a checkpoint, or the phase before."""

from pathlib import Path
from typing import Any

import jax

from ovseg_jax.errors import UserError
from ovseg_jax.train.checkpoint import Checkpoints, Misfit
from ovseg_jax.train.config_changes import changed_fields, plain
from ovseg_jax.train.phases import Phase
from ovseg_jax.train.recovery import restore_latest
from ovseg_jax.train.run import Run
from ovseg_jax.train.state import TrainState, new_state, next_phase_state
from ovseg_jax.train.state_shapes import abstract_state
from ovseg_jax.weights.initialize import init_statistics


def position_of(run: Run, phase: Phase, step: int) -> dict[str, Any]:
    """The record that is saved with a state: all that decides what comes after it.

    The data of a step and its random numbers are functions of the seed and the step alone, so that
    these are the position in the data and the state of the random numbers.
    """
    return {
        "phase": phase.index,
        "phase_step": step - phase.first,
        "seed": run.config.seed,
        "records": len(run.source),
        "data": run.source.fingerprint(),
        "text_length": run.text_length,
        "config": plain(run.config),
    }


def start(run: Run, checkpoints: Checkpoints, params: Any) -> tuple[TrainState, int]:
    """The state that the run goes on from and the number of its phase.

    A config that is another one than the checkpoint's is shown as a list of changes. It is refused
    where shapes differ, or where the step lies in another phase now.

    Args:
      params: where the run begins if nothing was saved.

    Raises:
      UserError: the checkpoint cannot be read or does not fit.
    """
    changes: list[str] = []

    def abstract(position: dict[str, Any]) -> TrainState:
        changes[:] = _changes(run, position)
        return abstract_of(run, _phase_at(run, position, changes))

    try:
        found = restore_latest(checkpoints, abstract, run.progress.say)
    except Misfit as error:
        raise UserError(f"{error}{_listed('Changed since then:', changes)}") from None
    if found is not None:
        state, position = found
        if changes:
            step = position["step"]
            run.progress.say(f"note: changed since the checkpoint of step {step}:")
            run.progress.say("\n".join(f"  {line}" for line in changes))
        run.progress.say(f"resuming at step {position['step']} of {run.total}")
        return state, position["phase"]
    phase = run.phases[0]
    tx = run.optimizer(phase, params)
    _, shardings = run.state_layout(phase)
    make = jax.jit(
        lambda p: new_state(p, tx, phase.frozen, init_statistics(run.model)),
        out_shardings=shardings,
    )
    return make(params), 0


def enter(run: Run, phase: Phase, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The state at the start of `phase`, from the last one or from the best one saved.

    Raises:
      UserError: the phase starts from the best state, and none was saved.
    """
    if phase.start_from == "best":
        checkpoints.wait()
        position = checkpoints.position(best=True)
        if position is None:
            raise UserError(
                f"config.phases[{phase.index}].start_from is 'best', but no evaluation saved one: "
                "set config.eval.every"
            )
        step = state.step
        best = checkpoints.restore(abstract_of(run, run.phases[position["phase"]]), best=True)
        state = best.replace(step=step)
    tx = run.optimizer(phase, state.params)
    _, shardings = run.state_layout(phase)
    make = jax.jit(
        lambda s: next_phase_state(
            s, tx, phase.frozen, optimizer=phase.optimizer, teacher=phase.teacher
        ),
        out_shardings=shardings,
    )
    return make(state)


def restored(run: Run, workdir: Path) -> TrainState:
    """The latest state of a finished or interrupted run.

    Raises:
      UserError: the work directory holds no checkpoint, or one that does not fit.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        position = checkpoints.position()
        if position is None:
            raise UserError(f"--workdir={workdir} holds no checkpoint: train first")
        phase = _phase_at(run, position, _changes(run, position))
        return checkpoints.restore(abstract_of(run, phase))
    finally:
        checkpoints.close()


def abstract_of(run: Run, phase: Phase) -> TrainState:
    """Shapes, dtypes and shardings of a phase's state."""
    return abstract_state(*run.state_layout(phase))


def _changes(run: Run, position: dict[str, Any]) -> list[str]:
    """What differs from the run that wrote a checkpoint; the data's content too."""
    now = position_of(run, run.phases[0], 0)
    changes = changed_fields(position.get("config", now["config"]), now["config"])
    for key, name in (("records", "number of records"), ("data", "fingerprint of the data")):
        changes += changed_fields(position.get(key, now[key]), now[key], name)
    return changes


def _phase_at(run: Run, position: dict[str, Any], changes: list[str]) -> Phase:
    """The phase of a record, which must still be the one that its step lies in."""
    index, step = position["phase"], position["step"]
    if index < len(run.phases):
        phase = run.phases[index]
        if phase.first <= step <= phase.last:
            return phase
        now = f"which takes steps {phase.first} to {phase.last}"
    else:
        now = f"but there are only {len(run.phases)} phases"
    raise UserError(
        f"the checkpoint of step {step} is in config.phases[{index}], {now} by this config: give "
        f"the phases that it was trained with, or another --workdir{_listed('. Changed:', changes)}"
    )


def _listed(head: str, changes: list[str]) -> str:
    return "\n  ".join([f"\n{head}" if head[0].isupper() else head, *changes]) if changes else ""
