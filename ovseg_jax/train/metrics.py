"""What a run measures of itself: speed, memory, FLOPs, traces, and the files that hold it."""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from ovseg_jax.errors import UserError
from ovseg_jax.files import replace_file
from ovseg_jax.models.build import build_model
from ovseg_jax.train.phases import Phase
from ovseg_jax.train.step import Program

# Dense bfloat16 FLOP/s by a part of the name that JAX gives the device; the first match counts.
# (Google, "Cloud TPU system architecture"; NVIDIA's data sheets of the SXM modules.)
PEAKS = (
    ("PCIe", None),  # slower than the modules
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("A100", 312e12),
    ("H100", 989e12),
    ("H200", 989e12),
)
PERCENTILES = (50, 90, 99)
# TensorBoard's files are forced to the disk that often; on buckets that takes a moment.
FLUSH_SECONDS = 60.0

# ---- speed and memory


def peak_flops(kind: str) -> float | None:
    """FLOP/s of a device by the name that JAX gives it; None where no table has it (CPUs)."""
    return next((peak for name, peak in PEAKS if name in kind), None)


def memory_in_use() -> dict[str, float]:
    """Bytes in use and at the peak so far on this process's fullest device; {} on CPUs."""
    stats = [each for device in jax.local_devices() if (each := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: float(max(each[key] for each in stats))
        for name, key in names.items()
        if stats and all(key in each for each in stats)
    }


class Meter:
    """Rates, step times and waiting since the last lap.

    Attributes:
      peak: FLOP/s of a device, where known. flops: of one step; None leaves out the utilization.
    """

    def __init__(self, batch_size: int):
        self.flops: float | None = None
        self._batch = batch_size
        self.peak = peak_flops(jax.devices()[0].device_kind)
        self.restart()

    def restart(self) -> None:
        """Begins a lap: nothing before it counts."""
        self._start = self._last = time.monotonic()
        self._times: list[float] = []
        self._waited = 0.0

    def timed(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; counts the time that is spent waiting for them."""
        iterator, done = iter(loader), object()
        while True:
            before = time.monotonic()
            batch = next(iterator, done)
            self._waited += time.monotonic() - before
            if batch is done:
                return
            yield batch

    def finish(self, results: Any) -> None:
        """Waits for what a step computes (None for no step), and takes its time."""
        if results is not None:
            jax.block_until_ready(results)
            now = time.monotonic()
            self._times.append(now - self._last)
            self._last = now

    def lap(self) -> dict[str, float]:
        """What was measured since the last lap (launch/README.md); {} if that was no whole step."""
        if not self._times:
            return {}
        spent = max(time.monotonic() - self._start, 1e-9)
        rate = len(self._times) / spent
        values = {
            "images_per_second": rate * self._batch,
            "images_per_second_per_device": rate * self._batch / jax.device_count(),
            "waiting_for_data": min(1.0, self._waited / spent),
        }
        for name in PERCENTILES:
            values[f"step_seconds_p{name}"] = float(np.percentile(self._times, name))
        if self.flops is not None and self.peak is not None:
            values["flops_utilization"] = rate * self.flops / (self.peak * jax.device_count())
        self.restart()
        return values | memory_in_use()


# ---- operations


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of all matrix products of `function(*arguments)`, on all devices together.

    A product [n, k] x [k, m] counts 2 n k m, again where rematerialization repeats it. (XLA's own
    count takes the body of a loop once, and the layers here are loops.)
    """
    return _count(jax.make_jaxpr(function)(*arguments))


def _count(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        leaves = jax.tree.leaves(parameters)
        inner = [_count(value) for value in leaves if isinstance(value, ClosedJaxpr | Jaxpr)]
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[axis] for axis in contracted)
        elif name == "cond":
            total += max(inner)
        elif name == "scan":
            total += parameters["length"] * sum(inner)
        elif name == "shard_map":  # inside, shapes are those of one device
            total += parameters["mesh"].size * sum(inner)
        else:
            total += sum(inner)
    return total


def model_flops(program: Program, phase: Phase, batch: Mapping[str, Any]) -> int:
    """Of one step, without what rematerialization or accumulation repeats."""
    config = program.config.copy_and_resolve_references()
    config.model.image.remat = config.model.text.remat = "none"
    config.accumulation.micro_batches = 1
    once = dataclasses.replace(program, config=config, model=build_model(config.model))
    return matmul_flops(once.step(phase), once.abstract_state(phase.frozen), dict(batch))


# ---- traces


def step_range(text: str) -> tuple[int, int]:
    """'100:105' -> (100, 105), the steps from the first to before the last; a flag type."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(text)
    return int(match[1]), int(match[2])


class Profiler:
    """Traces the steps of a range (first, end) on the first process, into a directory."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path, say: Callable[[str], None]):
        self._steps = steps if jax.process_index() == 0 else None
        self._directory, self._say = directory, say
        self._running = False

    def before(self, step: int, results: Any) -> None:
        """Called with the number of steps taken, and what the last one computes."""
        if self._steps and self._steps[0] <= step < self._steps[1] and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and step >= self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._steps = False, None
            self._say(f"trace: {self._directory} (tensorboard --logdir, or ui.perfetto.dev)")


# ---- files


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl`` and TensorBoard files of a work directory.

    Args:
      workdir: of the run. None writes nothing (processes other than the first).
      step: where a run begins or resumes: what an earlier process wrote about later steps, and
        evaluations of this one, goes. None keeps everything.
    """

    def __init__(self, workdir: Path | None, step: int | None = None):
        self._file = self._board = None
        self._flushed = time.monotonic()
        if workdir is None:
            return
        try:
            folder, lines = workdir / "tensorboard", workdir / "metrics.jsonl"
            folder.mkdir(parents=True, exist_ok=True)
            if step is not None and lines.exists():
                _trim(lines, step)
            self._file = lines.open("a", encoding="utf-8")
            # Not `SummaryWriter(purge_step=...)`: it writes in a thread, in which a full disk is a
            # traceback and no error of the run. File names have whole seconds, in which a run may
            # end and begin again.
            suffix = f".{os.getpid()}.{len(list(folder.iterdir()))}"
            self._board = EventsWriter(str(folder / "events"), suffix)
            if step is not None:
                self._event(step + 1, session_log={"status": "START"})
        except OSError as error:
            self.close()
            raise UserError(f"the metrics in {workdir} cannot be written: {error}") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: ``{"step": step, name: value, ...}``; UserError where the disk is full."""
        if self._file is None:
            return
        plain = {name: float(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
            scalars = [{"tag": tag, "simple_value": value} for tag, value in plain.items()]
            self._event(step, summary={"value": scalars})
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._board.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise UserError(f"{self._file.name} cannot be written: {error.strerror}") from None

    def _event(self, step: int, **content: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Flushes and closes both files; on a full disk, without what no longer fits."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._file = self._board = None


def _trim(path: Path, step: int) -> None:
    """Drops lines after `step` and evaluations of it, which a run that resumes writes again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            evaluation = any(name.startswith("eval/") for name in values)
            if values["step"] < step + (not evaluation):
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a line that was being written when the run was killed
    replace_file(path, "".join(line + "\n" for line in kept))
