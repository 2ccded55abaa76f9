"""Evaluation in the course of training, and the best state so far."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.calibrate import calibrated, tune_split
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.train.checkpoint import Checkpoints
from ovseg_jax.train.report import MetricsWriter
from ovseg_jax.train.run import Run
from ovseg_jax.train.state import TrainState, teacher_of


def check_eval_config(config: ConfigDict) -> None:
    """Refuses a ``config.eval`` that no evaluation could follow, before the first step.

    Raises:
      UserError: a field has none of its values, or images that `every` needs are missing.
    """
    if config.weights not in ("online", "teacher"):
        raise UserError(f"config.eval.weights is {config.weights!r}; it must be online or teacher")
    Protocol.from_config(config.protocol)
    if config.every < 0:
        raise UserError(
            f"config.eval.every is {config.every}; it must be a number of steps, or 0 for no "
            "evaluation before the end"
        )
    if config.every:
        images_to_choose_on(config)


def images_to_choose_on(config: ConfigDict) -> Benchmark:
    """The tune split that evaluations in the course of training measure on.

    Args:
      config: the run's ``config.eval``.

    Raises:
      UserError: there is none; says what is missing.
    """
    if not config.benchmarks:
        raise UserError(
            "config.eval.every needs a benchmark to evaluate on, but config.eval.benchmarks is "
            "empty: name one, or set config.eval.every = 0"
        )
    if not config.calibrate:
        raise UserError(
            "config.eval.every needs images that are not reported: set config.eval.calibrate = "
            "True, or config.eval.every = 0"
        )
    name = config.benchmarks[0]
    tune = tune_split(name, config)
    if tune is None:
        raise UserError(
            f"config.eval.every needs images that are not reported, and benchmark {name} has none: "
            "put another one first in config.eval.benchmarks, or set config.eval.every = 0"
        )
    return tune


def evaluation_params(run: Run, state: TrainState) -> dict[str, Any]:
    """The parameters that evaluation and export use: the online model's or the teacher's."""
    if run.config.eval.weights == "online":
        return state.params
    phase = next(p for p in run.phases if int(state.step) <= p.last)
    return {**state.params, "image_encoder": teacher_of(state, phase.frozen)}


def evaluate_and_keep_best(
    run: Run,
    state: TrainState,
    step: int,
    position: dict[str, Any],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
) -> None:
    """mIoU on the first benchmark's tune split; the best state so far is saved apart."""
    config = run.config.eval
    name, tune = config.benchmarks[0], images_to_choose_on(config)
    protocol = Protocol.from_config(config.protocol)
    segmenter = run.segmenter(evaluation_params(run, state), protocol, state.batch_stats)
    _, miou = calibrated(segmenter, tune, protocol, config.batch_size)
    writer.write(step, {f"eval/{name}_tune/miou": miou})
    run.progress.say(f"step {step}: mIoU on {name} tune {miou:.1f}")
    best = checkpoints.position(best=True)
    if best is None or miou > best["miou"]:
        metric = f"mIoU on the tune split of {name}"
        checkpoints.save(state, {**position, "miou": miou, "metric": metric}, best=True)
