"""Evaluation in the course of training, and the best state so far."""

from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.report import calibrated, tune_split
from ovseg_jax.train.checkpoint import Checkpoints
from ovseg_jax.train.report import MetricsWriter
from ovseg_jax.train.run import Run
from ovseg_jax.train.state import TrainState, teacher_of


def evaluation_params(run: Run, state: TrainState) -> dict[str, Any]:
    """The parameters that evaluation and export use: the online model's or the teacher's."""
    if run.config.eval.weights == "online":
        return state.params
    if run.config.eval.weights != "teacher":
        raise UserError(
            f"config.eval.weights is {run.config.eval.weights!r}; it must be online or teacher"
        )
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
    name = config.benchmarks[0]
    tune = tune_split(name, config)
    if tune is None:
        raise UserError(
            f"config.eval.every needs a tune split, and benchmark {name} has none: set it to 0"
        )
    protocol = Protocol.from_config(config.protocol)
    segmenter = run.segmenter(evaluation_params(run, state), protocol, state.batch_stats)
    _, miou = calibrated(segmenter, tune, protocol, config.batch_size)
    writer.write(step, {f"eval/{name}_tune/miou": miou})
    run.progress.say(f"step {step}: mIoU on {name} tune {miou:.1f}")
    best = checkpoints.position(best=True)
    if best is None or miou > best["miou"]:
        metric = f"mIoU on the tune split of {name}"
        checkpoints.save(state, {**position, "miou": miou, "metric": metric}, best=True)
