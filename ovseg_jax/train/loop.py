"""The training loop: phases, steps, logs, checkpoints, interruption."""

import logging
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from ml_collections import ConfigDict

from ovseg_jax import processes, sharding
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.report import calibrated, tune_split
from ovseg_jax.train.checkpoint import Checkpoints, abstract_state
from ovseg_jax.train.phases import Phase
from ovseg_jax.train.report import MetricsWriter, Progress, train_line, trim_metrics
from ovseg_jax.train.run import Run, make_run
from ovseg_jax.train.state import TrainState, new_state, next_phase_state, teacher_of
from ovseg_jax.weights.initialize import init_statistics

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is on disk."""


class StopSignal:
    """Turns Ctrl-C into a flag, so that a step is never cut in half. A second one is immediate."""

    def __init__(self) -> None:
        self.set = False
        self._before: Any = None

    def __enter__(self) -> "StopSignal":
        try:
            self._before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:
            self._before = None  # not the main thread: signals stay as they are
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.set:
            raise KeyboardInterrupt
        self.set = True


def train(config: ConfigDict, workdir: Path, progress: Progress) -> tuple[Run, TrainState]:
    """Trains from where the work directory stands (its latest checkpoint, else the beginning).

    Returns:
      The run and its final state.

    Raises:
      UserError: bad config, missing data, a checkpoint of another config, or a loss that stays
        non-finite.
      Interrupted: after Ctrl-C; everything is saved.
    """
    run = make_run(config, progress)
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        params = run.initial_params()
        run.fill_caches(params)
        state, phase_index = _start(run, checkpoints, params)
        if processes.is_first():
            trim_metrics(workdir / "metrics.jsonl", int(state.step))
        writer = MetricsWriter(workdir if processes.is_first() else None)
        with StopSignal() as stop:
            try:
                for phase in run.phases[phase_index:]:
                    if phase.index > phase_index:
                        state = _enter(run, phase, state, checkpoints)
                    state = _run_phase(run, phase, state, checkpoints, writer, stop)
            finally:
                writer.close()
    finally:
        checkpoints.close()
    return run, state


def restored(run: Run, workdir: Path) -> TrainState:
    """The latest state of a finished or interrupted run.

    Raises:
      UserError: the work directory holds no checkpoint.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        position = checkpoints.position()
        if position is None:
            raise UserError(f"--workdir={workdir} holds no checkpoint: train first")
        return checkpoints.restore(_abstract(run, run.phases[position["phase"]]))
    finally:
        checkpoints.close()


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


def _abstract(run: Run, phase: Phase) -> Any:
    return abstract_state(*run.state_layout(phase))


def _start(run: Run, checkpoints: Checkpoints, params: Any) -> tuple[TrainState, int]:
    position = checkpoints.position()
    if position is not None:
        index = position["phase"]
        if index >= len(run.phases):
            raise UserError(
                f"the checkpoint is in phase {index}, the config has only {len(run.phases)} phases"
            )
        state = checkpoints.restore(_abstract(run, run.phases[index]))
        run.progress.say(f"resuming at step {int(state.step)} of {run.total}")
        return state, index
    phase = run.phases[0]
    tx = run.optimizer(phase, params)
    _, shardings = run.state_layout(phase)
    make = jax.jit(
        lambda p: new_state(p, tx, phase.frozen, init_statistics(run.model)),
        out_shardings=shardings,
    )
    return make(params), 0


def _enter(run: Run, phase: Phase, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The state at the start of `phase`, from the last one or from the best one saved."""
    if phase.start_from == "best":
        checkpoints.wait()
        position = checkpoints.position(best=True)
        if position is None:
            raise UserError(
                f"config.phases[{phase.index}].start_from is 'best', but no evaluation saved one: "
                "set config.eval.every"
            )
        step = state.step
        best = checkpoints.restore(_abstract(run, run.phases[position["phase"]]), best=True)
        state = best.replace(step=step)
    tx = run.optimizer(phase, state.params)
    _, shardings = run.state_layout(phase)
    enter = jax.jit(
        lambda s: next_phase_state(
            s, tx, phase.frozen, optimizer=phase.optimizer, teacher=phase.teacher
        ),
        out_shardings=shardings,
    )
    return enter(state)


def _run_phase(
    run: Run,
    phase: Phase,
    state: TrainState,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    stop: StopSignal,
) -> TrainState:
    config, step = run.config, int(state.step)
    if step >= phase.last:
        return state
    run.progress.say(
        f"{phase.name}: steps {step} to {phase.last}, batch {phase.batch_size}, "
        f"lambda {phase.mask_weight:g}"
    )
    compiled = run.compiled_step(phase)
    loader = run.loader(phase, step)
    meter = _Meter(phase.batch_size)
    position = {"phase": phase.index, "text_length": run.text_length}
    for batch in meter.timed(loader):
        state, metrics = compiled(state, sharding.put_batch(batch, run.mesh))
        step += 1
        if meter.compiling:
            jax.block_until_ready(metrics)
            meter.restart(step)
        if step % config.log_every == 0 or step == phase.last or stop.set:
            values = _to_host(metrics)
            _refuse_stuck(values, step, config.max_skipped, loader.failures)
            speed = meter.lap(step)
            writer.write(step, {f"train/{key}": v for key, v in {**values, **speed}.items()})
            rate = speed["images_per_second"]
            left = (phase.last - step) * phase.batch_size / rate if rate else 0.0
            run.progress.update(
                train_line(phase.name, step, phase.last, values, rate, left),
                final=step == phase.last,
            )
        if config.eval.every and step % config.eval.every == 0:
            _evaluate_and_keep_best(run, state, step, position, checkpoints, writer)
            meter.restart(step)
        if step == phase.last or stop.set or step % config.checkpoint_every == 0:
            checkpoints.save(state, position)
        if stop.set and step < run.total:
            checkpoints.wait()
            raise Interrupted(
                f"stopped at step {step} of {run.total}; the same command goes on from there"
            )
    return state


def _to_host(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    return {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}


def _refuse_stuck(
    values: Mapping[str, float], step: int, limit: int, failures: Mapping[str, str]
) -> None:
    if values["skipped"] >= limit:
        raise UserError(
            f"loss or gradients were not finite in {int(values['skipped'])} steps in a row, up to "
            f"step {step}. Parameters are as they were before. Lower "
            "config.optimizer.learning_rate.peak, or look at the data of these steps"
            + (f"; {len(failures)} records could not be read" if failures else "")
        )


def _evaluate_and_keep_best(
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


class _Meter:
    """Images a second, and the share of time spent waiting for data."""

    def __init__(self, batch_size: int):
        self._batch = batch_size
        self.restart(None)

    @property
    def compiling(self) -> bool:
        """Whether the first step is still under way: its compilation is not counted."""
        return self._step is None

    def restart(self, step: int | None) -> None:
        """Begins a lap at `step`; None before the first step."""
        self._start, self._step, self._waited = time.monotonic(), step, 0.0

    def timed(self, loader: Any) -> Any:
        """The loader's batches, with the waiting counted."""
        iterator, done = iter(loader), object()
        while True:
            before = time.monotonic()
            batch = next(iterator, done)
            self._waited += time.monotonic() - before
            if batch is done:
                return
            yield batch

    def lap(self, step: int) -> dict[str, float]:
        """Rates since the last lap."""
        spent = max(time.monotonic() - self._start, 1e-9)
        rate = (step - self._step) * self._batch / spent
        values = {
            "images_per_second": rate,
            "images_per_second_per_device": rate / jax.device_count(),
            "waiting_for_data": min(1.0, self._waited / spent),
        }
        self.restart(step)
        return values
