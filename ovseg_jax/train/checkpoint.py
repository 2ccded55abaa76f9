"""Checkpoints of a run: the latest ones and the best one, kept apart.

One Orbax manager with a `best_fn` deletes the *latest* checkpoint when it is not among the best,
so there are two: ``checkpoints/latest`` and ``checkpoints/best``.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ovseg_jax import processes
from ovseg_jax.errors import UserError
from ovseg_jax.train import intact
from ovseg_jax.train.state import TrainState
from ovseg_jax.train.state_shapes import misfits

# Two, so that there is one before a damaged one.
KEEP_LATEST = 2

_IN_PROGRESS = ".orbax-checkpoint-tmp"


class Misfit(UserError):
    """A checkpoint of other shapes than the config asks for."""


class Damaged(UserError):
    """A checkpoint that is there but cannot be read."""


class Checkpoints:
    """Saves and restores `TrainState`s with a small record of where the run stood.

    Args:
      directory: ``WORKDIR/checkpoints``.
      read_only: of a run that may be under way. Otherwise the folders are made, and what a killed
        process left half written is removed.

    Attributes:
      directory: absolute.

    Raises:
      UserError: the folders cannot be made.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self.directory = directory.absolute()
        self._saving: dict[bool, int] = {}
        try:
            self._latest = self._manager(best=False, keep=KEEP_LATEST, read_only=read_only)
            self._best = self._manager(best=True, keep=1, read_only=read_only)
        except OSError as error:
            raise UserError(f"{directory} cannot be written: {error}") from None

    def _manager(self, *, best: bool, keep: int, read_only: bool) -> ocp.CheckpointManager:
        directory = self.directory / ("best" if best else "latest")
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        else:
            note_files = ocp.AsyncOptions(post_finalization_callback=lambda: self._note_files(best))
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, async_options=note_files
            )
        # Without its handlers, a manager that has not saved yet cannot read what another one did.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def _note_files(self, best: bool) -> None:
        """Called by Orbax when all files are written and the directory has its temporary name."""
        if processes.is_first():
            directory = self._of(best).directory / f"{self._saving[best]}{_IN_PROGRESS}"
            intact.write_list(Path(directory))

    def _of(self, best: bool) -> ocp.CheckpointManager:
        return self._best if best else self._latest

    def save(self, state: TrainState, position: dict[str, Any], *, best: bool = False) -> None:
        """Starts saving; returns while the files are still being written.

        Args:
          position: plain values; "phase" (the phase that the state belongs to) at least.

        Raises:
          UserError: there is no room, or an earlier save failed.
        """
        manager, step = self._of(best), int(state.step)
        if manager.latest_step() == step:
            return
        # One after the other, the best and the latest too: what is on disk is always what a run had
        # come to. (Orbax waits for the save before as well, but is told of this one first.)
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            why = intact.refused_space(Path(manager.directory), needed)
        except OSError as error:  # the folder has been taken away
            raise UserError(f"{manager.directory} cannot be written: {error.strerror}") from None
        if why:
            raise UserError(f"no room for the checkpoint of step {step}: {why}. {self._kept()}")
        self._saving[best] = step
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        )
        self._reporting(lambda: manager.save(step, args=args))

    def check(self) -> None:
        """Reports a save that failed in the background.

        Raises:
          UserError: it did.
        """
        self._reporting(self._latest.check_for_errors)
        self._reporting(self._best.check_for_errors)

    def _reporting(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # TensorStore's come as ValueError, Orbax's as anything
            where = self.directory
            raise UserError(
                f"a checkpoint could not be written to {where}: {_first_line(error)}. "
                f"{self._kept()}"
            ) from error

    def _kept(self) -> str:
        steps = self.steps()
        if not steps:
            return "None was saved before"
        return f"That of step {steps[-1]} is complete: the same command goes on from there"

    def steps(self, *, best: bool = False) -> list[int]:
        """Steps of the checkpoints that exist, in order."""
        return sorted(self._of(best).all_steps())

    def position(self, *, best: bool = False, step: int | None = None) -> dict[str, Any] | None:
        """The record saved with a checkpoint, by default the latest (or best); None without any.

        Raises:
          Damaged: it cannot be read.
        """
        manager = self._of(best)
        step = manager.latest_step() if step is None else step
        if step is None:
            return None
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        restored = self._read(manager, step, lambda: manager.restore(step, args=args))
        return {**restored.position, "step": step}

    def restore(
        self, abstract: TrainState, *, best: bool = False, step: int | None = None
    ) -> TrainState:
        """A state, by default the latest (or best), laid out as `abstract` says.

        Args:
          abstract: shapes, dtypes and shardings of the phase that the state was saved in. Another
            tree is refused: Orbax would fill a missing leaf with None and say nothing.

        Raises:
          Misfit: the checkpoint does not fit; lists the leaves that differ.
          Damaged: it cannot be read.
        """
        manager = self._of(best)
        step = manager.latest_step() if step is None else step
        saved = self._read(manager, step, lambda: manager.item_metadata(step).state)
        if faults := misfits(abstract, saved.tree if hasattr(saved, "tree") else saved):
            raise Misfit(
                f"the checkpoint of step {step} in {manager.directory} does not fit this config "
                "(was it written with another one?):\n  " + "\n  ".join(faults[:20])
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._read(manager, step, lambda: manager.restore(step, args=args)).state

    def _read(self, manager: ocp.CheckpointManager, step: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            why = intact.fault(Path(manager.directory) / str(step)) or _damage(error)
            if not why:
                raise
            raise Damaged(
                f"the checkpoint of step {step} in {manager.directory} cannot be read: {why}"
            ) from None

    def set_aside(self, step: int) -> Path:
        """Moves one of the latest checkpoints to ``checkpoints/damaged``; returns where it is.

        Every process calls it; the first one moves.
        """
        target = self.directory / "damaged" / str(step)
        if processes.is_first():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            (Path(self._latest.directory) / str(step)).rename(target)
        any_process(False)  # nobody looks again before it is moved
        self._latest.reload()
        return target

    def fault(self, step: int) -> str:
        """What is wrong with the files of one of the latest checkpoints; "" where nothing is."""
        return intact.fault(Path(self._latest.directory) / str(step))

    def wait(self) -> None:
        """Blocks until everything is on disk.

        Raises:
          UserError: a save failed.
        """
        self._reporting(self._latest.wait_until_finished)
        self._reporting(self._best.wait_until_finished)

    def close(self) -> None:
        """Waits and lets go of the directories.

        Raises:
          UserError: a save failed.
        """
        self.wait()
        self._latest.close()
        self._best.close()


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs each failure several times, with tracebacks; here it is told once, by an error.
    return "orbax" not in record.pathname


def any_process(value: bool) -> bool:
    """Whether `value` holds in any process of the job. Every process asks."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def _damage(error: Exception) -> str:
    """The error where it speaks of unreadable content; "" for any other, such as a full memory."""
    content = isinstance(error, json.JSONDecodeError) or any(
        words in str(error) for words in ("DATA_LOSS", "Invalid JSON", "error while reading array")
    )
    return _first_line(error) if content else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    # TensorStore's go from the outermost to the innermost operation: the cause is at the end.
    return line if len(line) <= 300 else f"{line[:80]} ... {line[-200:]}"
