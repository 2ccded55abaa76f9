"""The training loop: phases, steps, logs, checkpoints, interruption."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import ovseg_jax
from ovseg_jax import processes, sharding
from ovseg_jax.errors import RestartError, UserError
from ovseg_jax.optim.ema_teacher import teacher_of
from ovseg_jax.progress import Progress, duration
from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.calibrate import calibrated, tune_split
from ovseg_jax.segmentation.evaluate import write_result
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.train.checkpoint import Checkpoints
from ovseg_jax.train.checks import check_loop
from ovseg_jax.train.config import plain
from ovseg_jax.train.metrics import Meter, MetricsWriter, Profiler, model_flops
from ovseg_jax.train.phases import Phase
from ovseg_jax.train.resume import enter, position_of, start
from ovseg_jax.train.run import Run, make_run
from ovseg_jax.train.signals import Interrupted, StopSignal, Watchdog
from ovseg_jax.train.step import TrainState

# Masks that cover more of an image than this share tell its regions apart no longer.
MOST_TARGETS = 0.6
LOCK = ".in_use"
# Whose versions a run writes down.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def train(
    config: ConfigDict, workdir: Path, progress: Progress, profile: tuple[int, int] | None = None
) -> tuple[Run, TrainState]:
    """Trains from the latest checkpoint in the work directory, or anew, to the final state.

    Args:
      profile: steps to trace, see `metrics.Profiler`.

    Raises:
      UserError: bad config, data, checkpoint or work directory, or a loss that stays non-finite.
      Interrupted: after Ctrl-C or SIGTERM; everything is saved.
    """
    check_loop(config)
    if config.eval.every:
        images_to_choose_on(config.eval)
    with locked(workdir), contextlib.ExitStack() as stack:
        run = make_run(config, progress)
        checkpoints = stack.enter_context(closing(Checkpoints(workdir / "checkpoints")))
        stack.enter_context(processes.leaving_at_once())
        params = run.initial_params()
        run.fill_caches(params)
        state, first = start(run, checkpoints, params, progress.say)
        del params  # the state holds copies; these would stay on the devices to the end
        step = int(state.step)
        if processes.is_first():
            versions = {
                "ovseg_jax": ovseg_jax.__version__,
                "python": platform.python_version(),
                "command": sys.argv,
                "devices": [str(device) for device in jax.devices()],
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            }
            write_result(workdir / "config.json", plain(config))
            write_result(workdir / "versions.json", versions)
        if profile is not None and not step <= profile[0] < run.total:
            raise UserError(
                f"--profile={profile[0]}:{profile[1]} begins at no step of this run, which goes "
                f"from {step} to {run.total}"
            )
        writer = MetricsWriter(workdir if processes.is_first() else None, step)
        training = _Training(
            run,
            checkpoints,
            stack.enter_context(closing(writer)),
            stack.enter_context(StopSignal()),
            stack.enter_context(Watchdog(config.hang_seconds)),
            stack.enter_context(closing(Profiler(profile, workdir / "profile", progress.say))),
        )
        # An evaluation that failed or was cut off: the state was saved before it.
        training.evaluate_where_due(state, step)
        for phase in run.phases[first:]:
            if phase.index > first:
                training.watchdog.rest()
                state = enter(run, phase, state, checkpoints)
            state = training.phase(phase, state)
        training.watchdog.expect("the last checkpoint to be written")
        checkpoints.wait()
    return run, state


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
        compiled, loader = run.compiled_step(phase), run.loader(phase, step)
        meter = Meter(phase.batch_size)
        read = cut = 0  # examples of this process, and those of them whose texts lost words
        metrics: Any = None
        running: Any = None  # metrics of a step that was not waited for
        compiling = True
        self.watchdog.expect(f"the batch of step {step + 1}")
        for batch in meter.timed(loader):
            # No device needs these marks. Cached texts were counted when they were cached.
            read += len(batch["weight"])
            cut += int(batch.pop("truncated", np.zeros(1)).sum())
            self.profiler.before(step, metrics)
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
                if meter.peak is not None:  # nothing to compare with: counting takes seconds
                    meter.flops = model_flops(run, phase, placed)
                meter.restart()
                compiling = False
            else:
                # One step is computed while the next is prepared; without this wait the host would
                # run ahead, and what it measures would be no step times.
                meter.finish(running)
                running = metrics
            stopping = self.stop.reached(step)
            ending = step == phase.last or stopping
            logging, evaluating = ending or step % config.log_every == 0, self._evaluation_due(step)
            if logging or evaluating:
                meter.finish(running)
                running = None
            if logging:
                counts = {"phase": float(phase.index), "truncated_examples": float(cut)}
                self._log(phase, step, metrics, {**meter.lap(), **counts}, len(loader.failures))
            if step == phase.last and cut:
                run.progress.say(
                    f"note: {cut} of {read} examples in {phase.name} had a text cut to "
                    f"{run.text_length} tokens (config.data.text_length)"
                )
            # After its first step a phase no longer needs the best state of before, which may be
            # replaced from then on.
            best_used = phase.start_from == "best" and step == phase.first + 1
            if ending or best_used or evaluating or step % config.checkpoint_every == 0:
                self.watchdog.expect(f"the checkpoint of step {step}")
                self.checkpoints.save(state, position_of(run, phase, step))
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
        """Measures the mIoU of a saved state on a tune split, if due; the best one is kept."""
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

    def _log(
        self,
        phase: Phase,
        step: int,
        metrics: Mapping[str, jax.Array],
        measured: Mapping[str, float],
        unread: int,
    ) -> None:
        values = {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}
        if values["skipped"] >= self.run.config.max_skipped:
            raise UserError(
                f"loss or gradients were not finite in {int(values['skipped'])} steps in a row, up "
                f"to step {step}. Parameters are as they were before. Lower "
                "config.optimizer.learning_rate.peak, or look at the data of these steps"
                + (f"; {unread} records could not be read" if unread else "")
            )
        if values.get("mask_target_fraction", 0.0) > MOST_TARGETS and not self.warned:
            self.warned = True
            self.run.progress.say(
                f"warning: step {step}: {100 * values['mask_target_fraction']:.0f} % of the "
                "patches are positive in the mask targets, so nearly every mask matches every "
                "other: raise config.loss.mask_threshold, or train the groups longer before"
            )
        self.checkpoints.check()
        values |= measured
        self.writer.write(step, {f"train/{key}": value for key, value in values.items()})
        terms = [name for name in ("loss", "contrastive", "entity", "mask") if name in values]
        line = [f"{phase.name} {step}/{phase.last}", *(f"{x} {values[x]:.3f}" for x in terms)]
        if rate := values.get("images_per_second"):
            left = duration((phase.last - step) * phase.batch_size / rate)
            line += [f"{rate:.0f} images/s", f"{left} left"]
        self.run.progress.update("  ".join(line), final=step == phase.last)


def images_to_choose_on(config: ConfigDict) -> Benchmark:
    """The tune split (of ``config.eval``) that evaluations in the course of training measure on."""
    name = config.benchmarks[0] if config.benchmarks else None
    tune = tune_split(name, config) if name and config.calibrate else None
    if tune is not None:
        return tune
    if name is None:
        missing = "a benchmark, but config.eval.benchmarks is empty: name one"
    elif not config.calibrate:
        missing = "images that are not reported: set config.eval.calibrate = True"
    else:
        missing = f"images that are not reported, and benchmark {name} has none: put another first"
    raise UserError(f"config.eval.every needs {missing}, or set config.eval.every = 0")


def evaluation_params(run: Run, state: TrainState) -> dict[str, Any]:
    """The parameters that evaluation and export use: the online model's or the teacher's."""
    if run.config.eval.weights == "online":
        return state.params
    phase = next(p for p in run.phases if int(state.step) <= p.last)
    return {**state.params, "image_encoder": teacher_of(state, phase.frozen)}


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Inside, no other job trains in the work directory: two would mix their steps and checkpoints.

    The system releases the lock however the process ends; some file systems have no locks.
    """
    if not processes.is_first():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from None
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = (workdir / LOCK).read_text(encoding="utf-8", errors="replace")
            raise RestartError(
                f"another job trains in --workdir={workdir} ({who or 'another process'}): wait for "
                "its end, or give another --workdir. A network file system releases the lock of a "
                "machine that is gone after a minute or two"
            ) from None
        except OSError:
            pass  # no locks here
        with contextlib.suppress(OSError):  # a full disk is reported where something is lost by it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
