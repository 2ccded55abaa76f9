"""The training loop: phases, steps, logs, checkpoints, interruption."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ovseg_jax import processes, sharding
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.progress import Progress
from ovseg_jax.segmentation.calibrate import calibrated
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.train.checkpoint import Checkpoints
from ovseg_jax.train.checks import check_best_starts, check_loop, images_to_choose_on
from ovseg_jax.train.chips import peak_flops
from ovseg_jax.train.metrics import (
    Meter,
    MetricsWriter,
    Profiler,
    matmul_flops,
    train_line,
    trim_metrics,
    without_repetition,
)
from ovseg_jax.train.phases import Phase
from ovseg_jax.train.resume import enter, position_of, start
from ovseg_jax.train.run import Run, make_run
from ovseg_jax.train.signals import Interrupted, StopSignal, Watchdog
from ovseg_jax.train.state import TrainState, teacher_of
from ovseg_jax.train.step import Program
from ovseg_jax.train.workdir import locked, write_run_files

# Masks that cover more of an image than this share tell its regions apart no longer.
MOST_TARGETS = 0.6


def train(
    config: ConfigDict,
    workdir: Path,
    progress: Progress,
    profile: tuple[int, int] | None = None,
) -> tuple[Run, TrainState]:
    """Trains from the latest checkpoint in the work directory, or from the beginning.

    Args:
      profile: steps to trace, see `metrics.Profiler`.

    Returns:
      The run and its final state.

    Raises:
      UserError: bad config, missing data, a checkpoint that this config does not fit, a work
        directory that cannot be written or that another job trains in, or a loss that stays
        non-finite.
      Interrupted: after Ctrl-C or SIGTERM; everything is saved.
    """
    check_loop(config)
    with locked(workdir):
        run = make_run(config, progress)
        check_best_starts(run.phases, config.eval.every)
        return _train(run, workdir, profile)


def _train(run: Run, workdir: Path, profile: tuple[int, int] | None) -> tuple[Run, TrainState]:
    config, progress = run.config, run.progress
    checkpoints = Checkpoints(workdir / "checkpoints")
    with closing(checkpoints), processes.leaving_at_once():
        params = run.initial_params()
        run.fill_caches(params)
        state, first = start(run, checkpoints, params)
        del params  # the state holds copies; these would stay on the devices to the end
        write_run_files(config, workdir)
        _check_profile(profile, int(state.step), run.total)
        with (
            closing(_metrics_writer(workdir, int(state.step))) as writer,
            closing(Profiler(profile, workdir / "profile", progress.say)) as profiler,
            StopSignal() as stop,
            Watchdog(config.hang_seconds) as watchdog,
        ):
            training = _Training(run, checkpoints, writer, stop, watchdog, profiler)
            # An evaluation that failed or was cut off: the state was saved before it.
            training.evaluate_where_due(state, int(state.step))
            for phase in run.phases[first:]:
                if phase.index > first:
                    watchdog.rest()
                    state = enter(run, phase, state, checkpoints)
                state = training.phase(phase, state)
            watchdog.expect("the last checkpoint to be written")
            checkpoints.wait()
    return run, state


def _metrics_writer(workdir: Path, step: int) -> MetricsWriter:
    if not processes.is_first():
        return MetricsWriter(None)
    trim_metrics(workdir / "metrics.jsonl", step)
    return MetricsWriter(workdir, step)


def _check_profile(profile: tuple[int, int] | None, step: int, total: int) -> None:
    if profile is not None and not step <= profile[0] < total:
        raise UserError(
            f"--profile={profile[0]}:{profile[1]} begins at no step of this run, which goes from "
            f"{step} to {total}"
        )


class TextCuts:
    """Takes the marks of examples whose texts were cut out of the batches, and counts them.

    Attributes:
      read, cut: examples that this process read, and those of them that lost words. Cached texts
        were counted when they were cached, and count as whole here.
    """

    def __init__(self) -> None:
        self.read = self.cut = 0

    def counted(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches without their marks, which no device needs."""
        for batch in batches:
            self.read += len(batch["weight"])
            self.cut += int(batch.pop("truncated", np.zeros(1)).sum())
            yield batch

    def note(self, phase: str, length: int) -> str:
        """What to say at the end of a phase in which texts were cut to `length` tokens."""
        return (
            f"note: {self.cut} of {self.read} examples in {phase} had a text cut to {length} "
            "tokens (config.data.text_length)"
        )


@dataclasses.dataclass
class _Training:
    """What the steps of a run need besides the state."""

    run: Run
    checkpoints: Checkpoints
    writer: MetricsWriter
    stop: StopSignal
    watchdog: Watchdog
    profiler: Profiler
    warned: bool = False  # of mask targets that are positive nearly everywhere

    def phase(self, phase: Phase, state: TrainState) -> TrainState:
        """Takes the steps of a phase that are left."""
        run, config, step = self.run, self.run.config, int(state.step)
        if step >= phase.last:
            return state
        run.progress.say(
            f"{phase.name}: steps {step} to {phase.last}, batch {phase.batch_size}, "
            f"lambda {phase.mask_weight:g}"
        )
        compiled = run.compiled_step(phase)
        loader = run.loader(phase, step)
        meter, cuts = Meter(phase.batch_size), TextCuts()
        running: Any = None  # metrics of a step that was not waited for
        compiling = True
        self.watchdog.expect(f"the batch of step {step + 1}")
        for batch in cuts.counted(meter.timed(loader)):
            self.profiler.before(step)
            if compiling:
                self.watchdog.rest()
            else:
                self.watchdog.expect(f"step {step + 1}")
            placed = sharding.put_batch(batch, run.mesh)
            state, metrics = compiled(state, placed)
            step += 1
            if compiling:
                self.watchdog.expect(f"step {step}")
                jax.block_until_ready(metrics)
                self.watchdog.rest()
                meter.count_flops(step_flops(run, phase, placed))
                meter.restart()
                compiling = False
            else:
                # One step is computed while the next is prepared; without this wait the host would
                # run ahead, and what it measures would be no step times.
                self._finish(running, meter)
                running = metrics
            self.profiler.after(step, metrics)
            stopping = self.stop.reached(step)
            logging = step % config.log_every == 0 or step == phase.last or stopping
            evaluating = self._evaluation_due(step)
            if logging or evaluating:
                self._finish(running, meter)
                running = None
            if logging:
                self._log(phase, step, metrics, meter, cuts, len(loader.failures))
            if step == phase.last and cuts.cut:
                run.progress.say(cuts.note(phase.name, run.text_length))
            # After its first step a phase no longer needs the best state of before, which may be
            # replaced from then on.
            best_used = phase.start_from == "best" and step == phase.first + 1
            at_an_end = step == phase.last or stopping
            if at_an_end or best_used or evaluating or step % config.checkpoint_every == 0:
                self._save(phase, state, step)
            if stopping:
                self.checkpoints.wait()
                raise Interrupted(
                    f"stopped at step {step} of {run.total}; the same command goes on from there",
                    self.stop.exit_code,
                )
            if evaluating:
                self.evaluate_where_due(state, step)
                meter.restart()
            self.watchdog.expect(f"the batch of step {step + 1}")
        return state

    def _evaluation_due(self, step: int) -> bool:
        every = self.run.config.eval.every
        return bool(every) and step > 0 and step % every == 0

    def evaluate_where_due(self, state: TrainState, step: int) -> None:
        """Measures the mIoU of a saved state on the first benchmark's tune split, if it is due.

        The best state so far is kept. Where a step was evaluated before, the result is the same.
        """
        if not self._evaluation_due(step):
            return
        # An error, or the end of the process, must not take the state with it.
        self.checkpoints.wait()
        self.watchdog.rest()
        run, config = self.run, self.run.config.eval
        name, tune = config.benchmarks[0], images_to_choose_on(config)
        protocol = Protocol.from_config(config.protocol)
        segmenter = run.segmenter(evaluation_params(run, state), protocol, state.batch_stats)
        _, miou = calibrated(segmenter, tune, protocol, config.batch_size)
        self.writer.write(step, {f"eval/{name}_tune/miou": miou})
        run.progress.say(f"step {step}: mIoU on {name} tune {miou:.1f}")
        best = self.checkpoints.best()
        if best is None or miou > best["miou"]:
            self.checkpoints.mark_best(step, miou, f"mIoU on the tune split of {name}")

    def _save(self, phase: Phase, state: TrainState, step: int) -> None:
        self.watchdog.expect(f"the checkpoint of step {step}")
        self.checkpoints.save(state, position_of(self.run, phase, step))

    def _finish(self, metrics: Any, meter: Meter) -> None:
        if metrics is not None:
            jax.block_until_ready(metrics)
            meter.stepped()

    def _log(
        self,
        phase: Phase,
        step: int,
        metrics: Mapping[str, jax.Array],
        meter: Meter,
        cuts: TextCuts,
        unread: int,
    ) -> None:
        values = {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}
        if values.get("mask_target_fraction", 0.0) > MOST_TARGETS and not self.warned:
            self.warned = True
            self.run.progress.say(
                f"warning: step {step}: {100 * values['mask_target_fraction']:.0f} % of the "
                "patches are positive in the mask targets, so nearly every mask matches every "
                "other: raise config.loss.mask_threshold, or train the groups longer before"
            )
        _refuse_stuck(values, step, self.run.config.max_skipped, unread)
        self.checkpoints.check()
        speed = meter.lap()
        counts = {"phase": float(phase.index), "truncated_examples": float(cuts.cut)}
        values = {**values, **speed, **counts}
        self.writer.write(step, {f"train/{key}": value for key, value in values.items()})
        self.run.progress.update(
            train_line(phase.name, step, phase.last, values, phase.batch_size),
            final=step == phase.last,
        )


def evaluation_params(run: Run, state: TrainState) -> dict[str, Any]:
    """The parameters that evaluation and export use: the online model's or the teacher's."""
    if run.config.eval.weights == "online":
        return state.params
    phase = next(p for p in run.phases if int(state.step) <= p.last)
    return {**state.params, "image_encoder": teacher_of(state, phase.frozen)}


def step_flops(program: Program, phase: Phase, batch: Mapping[str, Any]) -> float | None:
    """Of one step, without what rematerialization or accumulation repeats.

    None where no peak of the devices is known to compare with: counting takes seconds.
    """
    if peak_flops(jax.devices()[0].device_kind) is None:
        return None
    config = without_repetition(program.config)
    plain = dataclasses.replace(program, config=config, model=build_model(config.model))
    return float(matmul_flops(plain.step(phase), plain.abstract_state(phase), dict(batch)))


def _refuse_stuck(values: Mapping[str, float], step: int, limit: int, unread: int) -> None:
    if values["skipped"] >= limit:
        raise UserError(
            f"loss or gradients were not finite in {int(values['skipped'])} steps in a row, up to "
            f"step {step}. Parameters are as they were before. Lower "
            "config.optimizer.learning_rate.peak, or look at the data of these steps"
            + (f"; {unread} records could not be read" if unread else "")
        )
