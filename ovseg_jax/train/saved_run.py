"""What a run has saved, read back from its work directory alone: without data, without weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.optim import groups
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.checkpoint import Checkpoints
from ovseg_jax.train.state import TrainState, new_state, teacher_of
from ovseg_jax.train.state_shapes import abstract_state
from ovseg_jax.weights.initialize import init_params, init_statistics


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
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        best, number = _choose(checkpoints, step, workdir)
        position = checkpoints.position(best=best, step=number)
        phases = config.phases
        if position["phase"] >= len(phases):
            raise UserError(
                f"the checkpoint of step {number} is in phase {position['phase']}, "
                f"{workdir / 'config.json'} has only {len(phases)} phases"
            )
        frozen = tuple(phases[position["phase"]].get("frozen") or ())
        state = checkpoints.restore(abstract_run_state(config, frozen), best=best, step=number)
    finally:
        checkpoints.close()
    return SavedRun(config, state, frozen, position)


def _config_of(workdir: Path) -> ConfigDict:
    path = workdir / "config.json"
    if not path.is_file() or not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir} is no run: it has no config.json with checkpoints/")
    try:
        config = ConfigDict(_with_tuples(json.loads(path.read_text(encoding="utf-8"))))
        assert isinstance(config.model, Mapping | ConfigDict) and config.phases
    except (ValueError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is damaged or no config of a run: {error!r}") from None
    return config


def _with_tuples(value: Any) -> Any:
    """What JSON gives, with tuples for lists, as config files have them."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _choose(checkpoints: Checkpoints, step: str, workdir: Path) -> tuple[bool, int]:
    """(among the best, step number)."""
    latest, best = checkpoints.steps(), checkpoints.steps(best=True)
    have = ", ".join(map(str, latest)) or "none"
    have += f"; best: {best[-1]}" if best else "; no best (config.eval.every is 0)"
    if step == "latest" and latest:
        return False, latest[-1]
    if step == "best" and best:
        return True, best[-1]
    if step.isdigit() and int(step) in latest:
        return False, int(step)
    if step.isdigit() and int(step) in best:
        return True, int(step)
    if step in ("latest", "best") or step.isdigit():
        raise UserError(f"{workdir} has no checkpoint --step={step}; it has: {have}")
    raise UserError(f"--step is latest, best or a number, not {step!r}; there are: {have}")


def abstract_run_state(config: ConfigDict, frozen: tuple[str, ...]) -> TrainState:
    """Shapes and dtypes of a run's state, for one device.

    Args:
      frozen: patterns of the parameters that do not train in the phase of the state.
    """
    model = build_model(config.model)
    params = nn.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    tx = make_optimizer(config.optimizer, *groups.split(params, frozen))
    state = jax.eval_shape(lambda p: new_state(p, tx, frozen, init_statistics(model)), params)
    here = SingleDeviceSharding(jax.local_devices()[0])
    return abstract_state(state, jax.tree.map(lambda _: here, state))
