"""Where a state comes from: the beginning, a checkpoint, the phase before; and saved runs."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, init_statistics
from ovseg_jax.optim.ema_teacher import teacher_of
from ovseg_jax.train.checkpoint import Checkpoints, Misfit
from ovseg_jax.train.config import changed_fields, complete, plain
from ovseg_jax.train.phases import Phase
from ovseg_jax.train.step import Program, TrainState, new_state


def position_of(program: Program, phase: Phase, step: int) -> dict[str, Any]:
    """The record that is saved with a state: everything that decides what comes after it.

    Seed and step give the position in the data and the random numbers.
    """
    return {
        "phase": phase.index,
        "phase_step": step - phase.first,
        "seed": program.config.seed,
        **program.data,
        "config": plain(program.config),
    }


def start(
    program: Program, checkpoints: Checkpoints, params: Any, say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The state that the run goes on from, and the number of its phase.

    Where the config differs from the checkpoint's, the changes are listed.

    Args:
      params: where the run begins if nothing was saved.

    Raises:
      UserError: the checkpoint cannot be read, or its shapes or its phase do not fit the config.
    """
    changes: list[str] = []

    def abstract(position: dict[str, Any]) -> TrainState:
        phase, changes[:] = _phase_at(program, position)
        return program.abstract_state(phase.frozen)

    try:
        saved = checkpoints.restore_latest(abstract, say)
    except Misfit as error:
        raise UserError("\n  ".join([f"{error}\nChanged since then:", *changes])) from None
    if saved is not None:
        state, position = saved
        if changes:
            head = f"note: changed since the checkpoint of step {position['step']}:"
            say("\n  ".join([head, *changes]))
        say(f"resuming at step {position['step']} of {program.total}")
        return state, position["phase"]
    frozen = program.phases[0].frozen
    tx = program.optimizer(frozen)
    make = jax.jit(
        lambda p: new_state(p, tx, frozen, init_statistics(program.model)),
        out_shardings=program.shardings(frozen),
    )
    return make(params), 0


def enter(
    program: Program, phase: Phase, state: TrainState, checkpoints: Checkpoints
) -> TrainState:
    """The state at the start of `phase`, from the last one or from the best one saved."""
    if phase.start_from == "best":
        checkpoints.wait()
        best = checkpoints.best()
        if best is None:
            raise UserError(
                f"config.phases[{phase.index}].start_from is 'best', but no evaluation saved one: "
                "set config.eval.every"
            )
        before = program.phases[checkpoints.position(best["step"])["phase"]]
        abstract = program.abstract_state(before.frozen)
        state = checkpoints.restore(abstract, best["step"]).replace(step=state.step)
    tx, options = program.optimizer(phase.frozen), (phase.optimizer, phase.teacher)
    make = jax.jit(
        lambda s: next_phase_state(s, tx, phase.frozen, *options),
        out_shardings=program.shardings(phase.frozen),
    )
    return make(state)


def next_phase_state(
    state: TrainState,
    tx: optax.GradientTransformation,
    frozen: tuple[str, ...],
    optimizer: str,
    teacher: str,
) -> TrainState:
    """The state at the start of a phase (tx, frozen), from that at the end of the one before.

    Args:
      optimizer: "continue" keeps the moments of parameters that stay trainable, "fresh" none.
      teacher: "keep" goes on averaging, "reset" starts at the online model. Parameters that were
        frozen before start there in either case.
    """
    fresh = new_state(state.params, tx, frozen, state.batch_stats)
    known = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(state.opt_state)}

    def carried(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        of_teacher = ".params" in name  # the field of `EmaTeacherState`
        kept = teacher == "keep" if of_teacher else optimizer == "continue"
        return known.get(name, leaf) if kept else leaf

    opt_state = jax.tree_util.tree_map_with_path(carried, fresh.opt_state)
    return fresh.replace(step=state.step, skipped=state.skipped, opt_state=opt_state)


def restored(program: Program, workdir: Path) -> TrainState:
    """The latest state of a run, to evaluate it; refused where more than config.eval changed."""
    with closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"--workdir={workdir} holds no checkpoint: train, or give --model=DIR")
        step = checkpoints.steps()[-1]
        phase, changes = _phase_at(program, checkpoints.position(step))
        other = [x for x in changes if x.startswith("config.") and x[:11] != "config.eval"]
        if other:
            raise UserError(
                f"an evaluation changes config.eval alone, but the run in {workdir} was trained "
                "with other settings (trained -> given now):\n  " + "\n  ".join(other[:20])
            )
        return checkpoints.restore(program.abstract_state(phase.frozen), step)


def _phase_at(program: Program, position: dict[str, Any]) -> tuple[Phase, list[str]]:
    """The phase of a record, which must still be the one that its step lies in, and what differs.

    That is from the run that wrote the checkpoint, in its config and in its data.
    """
    saved, data = position.get("config"), program.data
    before = plain(complete(saved, saved=True) if saved else program.config)
    changes = changed_fields(before, plain(program.config))
    for key, name in (("records", "number of records"), ("data", "fingerprint of the data")):
        changes += changed_fields(position.get(key, data[key]), data[key], name)
    index, step = position["phase"], position["step"]
    now = f"but there are only {len(program.phases)} phases"
    if index < len(program.phases):
        phase = program.phases[index]
        if phase.first <= step <= phase.last:
            return phase, changes
        now = f"which takes steps {phase.first} to {phase.last}"
    message = (
        f"the checkpoint of step {step} is in config.phases[{index}], {now} by this config: give "
        "the phases that it was trained with, or another --workdir. Changed:"
    )
    raise UserError("\n  ".join([message, *changes]))


# ---- saved runs, read from their work directory, without data or weights


@dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run."""

    config: ConfigDict
    state: TrainState  # on one device
    frozen: tuple[str, ...]  # patterns of the parameters that did not train in its phase
    # The record saved with the checkpoint: "step", "phase" and, of the best, "metric" and "miou".
    position: dict[str, Any]

    def params(self, weights: str) -> dict[str, Any]:
        """The parameters: "online", or "ema" for the teacher's visual encoder with the rest."""
        if weights == "online":
            return self.state.params
        return {**self.state.params, "image_encoder": teacher_of(self.state, self.frozen)}


def read_run(workdir: Path, step: str) -> SavedRun:
    """Reads a checkpoint: of the step "latest", "best", or a number; else says which there are."""
    path = workdir / "config.json"
    if not path.is_file() or not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir} is no run: it has no config.json with checkpoints/")
    try:
        config = complete(_with_tuples(json.loads(path.read_text(encoding="utf-8"))), saved=True)
        assert config.phases
    except (ValueError, TypeError, AttributeError, AssertionError, UserError) as error:
        raise UserError(f"{path} is damaged or no config of a run: {error!r}") from None
    with closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        steps, best = checkpoints.steps(), checkpoints.best()
        numbers = {str(number): number for number in steps} | {"latest": max(steps, default=None)}
        number = best["step"] if best and step == "best" else numbers.get(step)
        if number is None:
            have = ", ".join(map(str, steps)) or "none"
            have += f"; best: {best['step']}" if best else "; no best (config.eval.every is 0)"
            raise UserError(
                f"--step is latest, best or a number that {workdir} has a checkpoint of, not "
                f"{step!r}; it has: {have}"
            )
        position = checkpoints.position(number)
        if best is not None and best["step"] == number:
            position |= best
        index, count = position["phase"], len(config.phases)
        if index >= count:
            where = f"the checkpoint of step {number} is in phase {index}"
            raise UserError(f"{where}, {path} has only {count} phases")
        frozen = tuple(config.phases[index].get("frozen") or ())
        state = checkpoints.restore(saved_state(config, frozen), number)
    return SavedRun(config, state, frozen, position)


def saved_state(config: ConfigDict, frozen: tuple[str, ...]) -> TrainState:
    """Shapes and dtypes of a run's state, for one device of this process."""
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    program = Program(config=config, mesh=mesh, model=build_model(config.model))
    return program.abstract_state(frozen)


def _with_tuples(value: Any) -> Any:
    """What JSON gives, with tuples for lists, as config files have them."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
