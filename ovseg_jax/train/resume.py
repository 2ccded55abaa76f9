"""Where a state comes from: the beginning, a checkpoint, the phase before; and saved runs."""

import itertools
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.optim import groups
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.checkpoint import Checkpoints, Misfit
from ovseg_jax.train.config import complete
from ovseg_jax.train.phases import Phase
from ovseg_jax.train.run import Run
from ovseg_jax.train.state import (
    TrainState,
    abstract_params,
    abstract_state,
    new_state,
    next_phase_state,
    teacher_of,
)
from ovseg_jax.weights.initialize import init_statistics

_ABSENT = object()


def position_of(run: Run, phase: Phase, step: int) -> dict[str, Any]:
    """The record that is saved with a state: everything that decides what comes after it.

    Seed and step are the position in the data and the state of the random numbers: both depend on
    nothing else.
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
    """The state that the run goes on from, and the number of its phase.

    Where the config differs from the checkpoint's, the changes are listed. It is refused where
    shapes differ, or where the step lies in another phase now.

    Args:
      params: where the run begins if nothing was saved.

    Raises:
      UserError: the checkpoint cannot be read or does not fit.
    """
    changes: list[str] = []

    def abstract(position: dict[str, Any]) -> TrainState:
        changes[:] = _changes(run, position)
        return run.abstract_state(_phase_at(run, position, changes))

    try:
        restored = checkpoints.restore_latest(abstract, run.progress.say)
    except Misfit as error:
        raise UserError("\n  ".join([f"{error}\nChanged since then:", *changes])) from None
    if restored is not None:
        state, position = restored
        if changes:
            step = position["step"]
            run.progress.say(f"note: changed since the checkpoint of step {step}:")
            run.progress.say("\n".join(f"  {line}" for line in changes))
        run.progress.say(f"resuming at step {position['step']} of {run.total}")
        return state, position["phase"]
    phase = run.phases[0]
    tx = run.optimizer(phase)
    make = jax.jit(
        lambda p: new_state(p, tx, phase.frozen, init_statistics(run.model)),
        out_shardings=run.shardings(phase),
    )
    return make(params), 0


def enter(run: Run, phase: Phase, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The state at the start of `phase`, from the last one or from the best one saved.

    Raises:
      UserError: the phase starts from the best state, and none was saved.
    """
    if phase.start_from == "best":
        checkpoints.wait()
        best = checkpoints.best()
        if best is None:
            raise UserError(
                f"config.phases[{phase.index}].start_from is 'best', but no evaluation saved one: "
                "set config.eval.every"
            )
        position = checkpoints.position(best["step"])
        abstract = run.abstract_state(run.phases[position["phase"]])
        state = checkpoints.restore(abstract, best["step"]).replace(step=state.step)
    tx = run.optimizer(phase)
    make = jax.jit(
        lambda s: next_phase_state(
            s, tx, phase.frozen, optimizer=phase.optimizer, teacher=phase.teacher
        ),
        out_shardings=run.shardings(phase),
    )
    return make(state)


def restored(run: Run, workdir: Path) -> TrainState:
    """The latest state of a finished or interrupted run.

    Raises:
      UserError: the work directory holds no checkpoint, or one that does not fit.
    """
    with closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"--workdir={workdir} holds no checkpoint: train first")
        position = checkpoints.position(steps[-1])
        phase = _phase_at(run, position, _changes(run, position))
        return checkpoints.restore(run.abstract_state(phase), steps[-1])


def _changes(run: Run, position: dict[str, Any]) -> list[str]:
    """What differs from the run that wrote a checkpoint; the data's content too."""
    now = position_of(run, run.phases[0], 0)
    saved = complete(position["config"], saved=True) if "config" in position else run.config
    changes = changed_fields(plain(saved), now["config"])
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
    message = (
        f"the checkpoint of step {step} is in config.phases[{index}], {now} by this config: give "
        "the phases that it was trained with, or another --workdir. Changed:"
    )
    raise UserError("\n  ".join([message, *changes]))


# ---- what changed


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: dicts, lists, strings, numbers."""
    return json.loads(config.to_json_best_effort(sort_keys=True))


def changed_fields(before: Any, now: Any, path: str = "config") -> list[str]:
    """One line for each field that differs: ``config.a.b: 1 -> 2``, sorted by path.

    Args:
      before, now: plain values (`plain`). path: their name.
    """
    if before == now:
        return []
    fields: list[tuple[str, Any, Any]] = []
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            fields.append((f".{key}", before.get(key, _ABSENT), now.get(key, _ABSENT)))
    elif _has_fields(before) and _has_fields(now):
        pairs = itertools.zip_longest(before, now, fillvalue=_ABSENT)
        fields = [(f"[{index}]", *pair) for index, pair in enumerate(pairs)]
    else:
        first, second = ("absent" if x is _ABSENT else json.dumps(x) for x in (before, now))
        return [f"{path}: {first} -> {second}"]
    return [line for name, *pair in fields for line in changed_fields(*pair, f"{path}{name}")]


def _has_fields(value: Any) -> bool:
    """Whether a list holds things with fields, as phases do."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


# ---- saved runs, read from their work directory, without data or weights


@dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run.

    Attributes:
      config: of the run.
      state: on one device.
      frozen: patterns of the parameters that did not train in its phase.
      position: the record saved with the checkpoint: "step", "phase" and, where it is the best
        one, the "metric" and its value "miou".
    """

    config: ConfigDict
    state: TrainState
    frozen: tuple[str, ...]
    position: dict[str, Any]

    def params(self, weights: str) -> dict[str, Any]:
        """The parameters: "online", or "ema" for the teacher's visual encoder with the rest."""
        if weights == "online":
            return self.state.params
        return {**self.state.params, "image_encoder": teacher_of(self.state, self.frozen)}


def read_run(workdir: Path, step: str) -> SavedRun:
    """Reads a checkpoint.

    Args:
      step: "latest", "best", or a number.

    Raises:
      UserError: the directory is no run, or has no such checkpoint; says which there are.
    """
    config = _config_of(workdir)
    with closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        number, best = _choose(checkpoints, step, workdir), checkpoints.best()
        position = checkpoints.position(number)
        if best is not None and best["step"] == number:
            position |= best
        phases = config.phases
        if position["phase"] >= len(phases):
            raise UserError(
                f"the checkpoint of step {number} is in phase {position['phase']}, "
                f"{workdir / 'config.json'} has only {len(phases)} phases"
            )
        frozen = tuple(phases[position["phase"]].get("frozen") or ())
        state = checkpoints.restore(saved_state(config, frozen), number)
    return SavedRun(config, state, frozen, position)


def saved_state(config: ConfigDict, frozen: tuple[str, ...]) -> TrainState:
    """Shapes and dtypes of a run's state, for one device of this process."""
    model, mesh = build_model(config.model), sharding.make_mesh(devices=jax.local_devices()[:1])
    params = abstract_params(model, mesh)
    tx = make_optimizer(config.optimizer, *groups.split(params, frozen))
    return abstract_state(model, params, tx, frozen, mesh)


def _config_of(workdir: Path) -> ConfigDict:
    path = workdir / "config.json"
    if not path.is_file() or not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir} is no run: it has no config.json with checkpoints/")
    try:
        config = complete(_with_tuples(json.loads(path.read_text(encoding="utf-8"))), saved=True)
        assert config.phases
    except (ValueError, TypeError, AttributeError, AssertionError, UserError) as error:
        raise UserError(f"{path} is damaged or no config of a run: {error!r}") from None
    return config


def _with_tuples(value: Any) -> Any:
    """What JSON gives, with tuples for lists, as config files have them."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _choose(checkpoints: Checkpoints, step: str, workdir: Path) -> int:
    """The number of the step that is meant by "latest", "best" or a number."""
    steps, best = checkpoints.steps(), checkpoints.best()
    numbers = {str(number): number for number in steps}
    if steps:
        numbers["latest"] = steps[-1]
    if best:
        numbers["best"] = best["step"]
    if step in numbers:
        return numbers[step]
    have = ", ".join(map(str, steps)) or "none"
    have += f"; best: {best['step']}" if best else "; no best (config.eval.every is 0)"
    raise UserError(
        f"--step is latest, best or a number that {workdir} has a checkpoint of, not {step!r}; it "
        f"has: {have}"
    )
