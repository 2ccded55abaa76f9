"""Checkpoints of a run: the latest two and the best one, whole or set aside.

``checkpoints/latest`` holds a folder for each step, and ``checkpoints/best.json`` names the best.
Orbax commits a checkpoint by renaming its folder. Disks still lose the ends of files, which fails
deep inside, on one process of many: so each checkpoint also holds a list of its files' sizes.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from ovseg_jax import processes
from ovseg_jax.errors import UserError
from ovseg_jax.files import replace_file

# A tree of arrays: `train.step.TrainState`.
State = Any
# Two, so that there is one before a damaged one.
KEEP_LATEST = 2
FILE_LIST = "files.json"
BEST = "best.json"

_IN_PROGRESS = ".orbax-checkpoint-tmp"
# What errors of Orbax and TensorStore say about unreadable content. Others, such as that of a full
# memory, are no damage.
_DAMAGE = ("DATA_LOSS", "Invalid JSON", "error while reading array", "Error decoding")

# What Orbax's readers of JSON raise where bytes changed.
_MALFORMED = (json.JSONDecodeError, UnicodeDecodeError, LookupError)


class Misfit(UserError):
    """A checkpoint of other shapes than the config asks for."""


class Damaged(UserError):
    """A checkpoint that is there but cannot be read."""


class _LatestAndBest(LatestN):
    """Orbax's preservation policy: the latest ones stay, and the best one however old it is."""

    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        latest = super().should_preserve(checkpoints, context=context)
        return [
            keep or info.step == self.best for keep, info in zip(latest, checkpoints, strict=True)
        ]


class Checkpoints:
    """Saves and restores train states with a small record of the run's position.

    Args:
      read_only: of a run that may be under way. Otherwise the folders are made, and what a killed
        process left half written is removed.

    Raises:
      UserError: the folders cannot be made. Every method that writes: a save failed, now or before.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._directory = directory.absolute()
        self._steps_folder = self._directory / "latest"
        self._saving = 0
        self._policy = _LatestAndBest(KEEP_LATEST)
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        else:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
            )
        # Without its handlers, a manager that has not saved yet cannot read what another one did.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(
                self._steps_folder, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise UserError(f"{directory} cannot be written: {error}") from None
        try:
            self._best = json.loads((self._directory / BEST).read_text(encoding="utf-8"))
            self._policy.best = self._best["step"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            self._best = None

    # ---- saving

    def save(self, state: State, position: dict[str, Any]) -> None:
        """Starts saving, with a record of plain values; returns while files are being written."""
        step = int(state.step)
        if self._manager.latest_step() == step:
            return
        # Only one save is under way, so that a crash loses no more than that one.
        self.wait()
        folder, needed = self._steps_folder, sum(x.nbytes for x in jax.tree.leaves(state))
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:  # the folder has been taken away
            raise UserError(f"{folder} cannot be written: {error.strerror}") from None
        if free < needed:
            raise UserError(
                f"no room for the checkpoint of step {step}: {folder} has {free / 1e6:.1f} MB "
                f"left, the checkpoint takes {needed / 1e6:.1f} MB. {self._kept()}"
            )
        self._saving = step
        args = {"state": ocp.args.StandardSave(state), "position": ocp.args.JsonSave(position)}
        self._reporting(lambda: self._manager.save(step, args=ocp.args.Composite(**args)))

    def _list_files(self) -> None:
        """Called by Orbax when all files are written and the folder has its temporary name."""
        # Files beside the items' folders are Orbax's notes about the commit, which still change.
        if processes.is_first():
            folder = self._steps_folder / f"{self._saving}{_IN_PROGRESS}"
            paths = [path for path in folder.rglob("*/*") if path.is_file()]
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
            text = json.dumps(sizes, indent=1, sort_keys=True)
            (folder / FILE_LIST).write_text(text, encoding="utf-8")

    def check(self) -> None:
        """Reports a save that failed in the background."""
        self._reporting(self._manager.check_for_errors)

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        self._reporting(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self.wait()
        self._manager.close()

    def _reporting(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # TensorStore's come as ValueError, Orbax's as anything
            raise UserError(
                f"a checkpoint could not be written to {self._directory}: {_first_line(error)}. "
                f"{self._kept()}"
            ) from error

    def _kept(self) -> str:
        steps = self.steps()
        if not steps:
            return "None was saved before"
        return f"That of step {steps[-1]} is complete: the same command goes on from there"

    # ---- the best

    def best(self) -> dict[str, Any] | None:
        """The record of the best checkpoint: "step", "miou", "metric"; None where there is none."""
        return self._best if self._best and self._best["step"] in self.steps() else None

    def mark_best(self, step: int, miou: float, metric: str) -> None:
        """Keeps a saved step until another one is better. Every process calls it."""
        self._best = {"step": step, "miou": miou, "metric": metric}
        self._policy.best = step
        if processes.is_first():
            replace_file(self._directory / BEST, json.dumps(self._best, indent=2) + "\n")

    # ---- reading

    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist, in order; the best may be older than the others."""
        return sorted(self._manager.all_steps())

    def position(self, step: int) -> dict[str, Any]:
        """The record saved with a checkpoint, and its "step"; Damaged where it cannot be read."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        restored = self._read(step, lambda: self._manager.restore(step, args=args))
        return {**restored.position, "step": step}

    def restore(self, abstract: State, step: int) -> State:
        """A state, laid out as the abstract state of its phase says.

        Raises:
          Misfit: its tree or shapes are others (Orbax would fill a missing leaf with None).
          Damaged: it cannot be read.
        """
        saved = self._read(step, lambda: self._manager.item_metadata(step).state)
        needed, present = map(_shapes, (abstract, saved.tree if hasattr(saved, "tree") else saved))
        faults = [
            f"{name}: saved {present.get(name, 'not at all')}, needed {needed.get(name, 'no')}"
            for name in sorted({*needed, *present})
            if needed.get(name) != present.get(name)
        ]
        if faults:
            raise Misfit(
                f"the checkpoint of step {step} in {self._directory} does not fit this config "
                "(was it written with another one?):\n  " + "\n  ".join(faults[:20])
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._read(step, lambda: self._manager.restore(step, args=args)).state

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            why = self._fault(step)
            damage = any(words in str(error) for words in _DAMAGE)
            if not why and not damage and not isinstance(error, _MALFORMED):
                raise
            raise Damaged(
                f"the checkpoint of step {step} in {self._directory} cannot be read: "
                f"{why or _first_line(error)}"
            ) from None

    def _fault(self, step: int) -> str:
        """What is wrong with the files of a checkpoint, in words; "" where nothing is."""
        folder = self._steps_folder / str(step)
        try:
            sizes = dict(json.loads((folder / FILE_LIST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return f"its list of files, {FILE_LIST}, is missing or damaged"
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
        return ""

    def restore_latest(
        self, abstract: Callable[[dict[str, Any]], State], say: Callable[[str], None]
    ) -> tuple[State, dict[str, Any]] | None:
        """The latest state that can be read, with its record; None where none was saved.

        A damaged one is moved to ``checkpoints/damaged``, and the one before is tried; if none is
        whole, that is a UserError. All processes take the same one.

        Args:
          abstract: from a record to what `restore` takes; may refuse the record.
        """
        damaged = self._directory / "damaged"
        steps = self.steps()
        for step in reversed(steps):
            why, restored = self._fault(step), None
            if not why:
                try:
                    position = self.position(step)
                    restored = self.restore(abstract(position), step), position
                except Damaged as error:
                    why = str(error)
            if not processes.any_process(bool(why)):
                return restored
            if processes.is_first():
                shutil.rmtree(damaged / str(step), ignore_errors=True)
                damaged.mkdir(exist_ok=True)
                (self._steps_folder / str(step)).rename(damaged / str(step))
            processes.any_process(False)  # no process looks again before it is moved
            self._manager.reload()
            say(
                f"warning: the checkpoint of step {step} is damaged "
                f"({why or 'another process cannot read it'}); moved to {damaged / str(step)}"
            )
        if steps:
            raise UserError(
                f"no checkpoint in {self._directory} can be read; the damaged ones are in "
                f"{damaged}. Give another --workdir to begin anew"
            )
        return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path, the same where what is saved has dicts and lists for the state's classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs each failure several times, with tracebacks; here an error reports it once.
    return "orbax" not in record.pathname


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    # TensorStore's go from the outermost to the innermost operation: the cause is at the end.
    return line if len(line) <= 300 else f"{line[:80]} ... {line[-200:]}"
