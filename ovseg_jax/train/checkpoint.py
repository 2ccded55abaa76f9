"""Checkpoints of a run: the latest ones and the best one, kept apart.

One Orbax manager with a `best_fn` deletes the *latest* checkpoint when it is not among the best,
so there are two: ``checkpoints/latest`` and ``checkpoints/best``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ovseg_jax.errors import UserError
from ovseg_jax.train.state import TrainState

KEEP_LATEST = 2


class Checkpoints:
    """Saves and restores `TrainState`s with a small record of where the run stood.

    Args:
      directory: ``WORKDIR/checkpoints``.
    """

    def __init__(self, directory: Path):
        directory = directory.absolute()
        self._latest = self._manager(directory / "latest", KEEP_LATEST)
        self._best = self._manager(directory / "best", 1)

    @staticmethod
    def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        # Without its handlers, a manager that has not saved yet cannot read what another one did.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def save(self, state: TrainState, position: dict[str, Any], *, best: bool = False) -> None:
        """Starts saving; returns while the files are still being written.

        Args:
          position: plain values; "phase" (the phase that the state belongs to) at least.
        """
        manager = self._best if best else self._latest
        step = int(state.step)
        if manager.latest_step() == step:
            return
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            ),
        )

    def steps(self, *, best: bool = False) -> list[int]:
        """Steps of the checkpoints that exist, in order."""
        return sorted((self._best if best else self._latest).all_steps())

    def position(self, *, best: bool = False, step: int | None = None) -> dict[str, Any] | None:
        """The record saved with a checkpoint, by default the latest (or best); None without any."""
        manager = self._best if best else self._latest
        step = manager.latest_step() if step is None else step
        if step is None:
            return None
        restored = manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))
        return {**restored.position, "step": step}

    def restore(
        self, abstract: TrainState, *, best: bool = False, step: int | None = None
    ) -> TrainState:
        """A state, by default the latest (or best), laid out as `abstract` says.

        Args:
          abstract: shapes, dtypes and shardings of the phase that the state was saved in. Another
            tree is refused: Orbax would fill a missing leaf with None and say nothing.

        Raises:
          UserError: the checkpoint does not fit; lists the leaves that differ.
        """
        manager = self._best if best else self._latest
        step = manager.latest_step() if step is None else step
        saved = manager.item_metadata(step).state
        wanted = _shapes(abstract)
        found = _shapes(saved.tree if hasattr(saved, "tree") else saved)
        if wanted != found:
            names = sorted(set(wanted) | set(found))
            faults = [
                f"{name}: saved {found.get(name, 'not at all')}, needed {wanted.get(name, 'no')}"
                for name in names
                if wanted.get(name) != found.get(name)
            ]
            raise UserError(
                f"the checkpoint of step {step} in {manager.directory} does not fit this config "
                "(was it written with another one?):\n  " + "\n  ".join(faults[:20])
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return manager.restore(step, args=args).state

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the directories."""
        self.wait()
        self._latest.close()
        self._best.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    # A saved tree comes back as dicts and lists: only the words of the path count, not their kind.
    read: Callable[[Any], str] = lambda key: str(  # noqa: E731
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
    )
    return "/".join(read(key) for key in path)


def abstract_state(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state (or its `eval_shape`) with where each leaf shall lie."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
