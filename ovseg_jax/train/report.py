"""What a run says while it works: metrics.jsonl, TensorBoard files, its progress line."""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from ovseg_jax.errors import UserError
from ovseg_jax.progress import duration

# TensorBoard's files are forced to the disk that often; on buckets that takes a moment.
FLUSH_SECONDS = 60.0


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl`` and TensorBoard files of a work directory.

    Args:
      workdir: of the run. None writes nothing (processes other than the first).
      step: where the run goes on; TensorBoard forgets what an earlier life wrote of later steps.

    Raises:
      UserError: the files cannot be made.
    """

    def __init__(self, workdir: Path | None, step: int | None = None):
        self._file = self._board = None
        self._flushed = time.monotonic()
        if workdir is None:
            return
        try:
            folder = workdir / "tensorboard"
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
            # Its writer without the thread around it, in which a full disk would be a traceback.
            # Its names have whole seconds, in which a run may end and begin.
            suffix = f".{os.getpid()}.{len(list(folder.iterdir()))}"
            self._board = EventsWriter(str(folder / "events"), suffix)
            if step is not None:
                self._event(step + 1, session_log={"status": "START"})
        except OSError as error:
            self.close()
            raise UserError(f"the metrics in {workdir} cannot be written: {error}") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: ``{"step": step, name: value, ...}``.

        Raises:
          UserError: a file cannot be written, as when the disk is full.
        """
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
        """Flushes and closes both; on a full disk without what no longer fits."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._file = self._board = None


def trim_metrics(path: Path, step: int) -> None:
    """Drops lines after `step` and evaluations of it: a run that resumes there writes them again.

    Raises:
      UserError: the file cannot be read or written.
    """
    try:
        _trim(path, step)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def _trim(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            evaluation = any(name.startswith("eval/") for name in values)
            if values["step"] < step or (values["step"] == step and not evaluation):
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the line that was being written when the run was killed
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def train_line(
    name: str, step: int, last: int, metrics: Mapping[str, float], batch_size: int
) -> str:
    """The progress line of training: phase, step, losses, images a second, time left."""
    parts = [f"{name} {step}/{last}", f"loss {metrics['loss']:.3f}"]
    parts += [
        f"{key} {metrics[key]:.3f}" for key in ("contrastive", "entity", "mask") if key in metrics
    ]
    if rate := metrics.get("images_per_second"):
        left = (last - step) * batch_size / rate
        parts += [f"{rate:.0f} images/s", f"{duration(left)} left"]
    return "  ".join(parts)
