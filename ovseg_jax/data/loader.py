"""Batches of NumPy arrays, through Grain: the same on any number of processes and workers."""

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from ovseg_jax.data.examples import Examples
from ovseg_jax.errors import RestartError

Batch = dict[str, np.ndarray]
_BATCHES_AHEAD = 2  # that wait ready for every reading thread


def make_loader(*data: Any, workers: int = 0, threads: int = 4, **settings: Any) -> "Loader":
    """The batches of a range of steps.

    Args:
      data, settings: of `Examples`, which says what a batch holds.
      workers: worker processes; 0 reads in threads of this process.
      threads: reading threads (of each worker), at most one where images and texts are cached; 0
        reads a batch when it is asked for.
    """
    if settings.get("image_store") is not None and settings.get("text_store") is not None:
        # Nothing is decoded or tokenized, only copied: several threads, which mostly wait for
        # Python's lock, are slower than one (tests/bench/loader.py).
        threads = min(threads, 1)
    return Loader(Examples(*data, **settings), workers, threads)


class _Batches:
    """The batches of `examples` at random access.

    Stacked here and not by Grain, which measures every element that passes through it: for small
    cached features that took longer than making them.
    """

    def __init__(self, examples: Examples):
        self._examples, self._slots = examples, len(examples.slots)

    def __len__(self) -> int:
        return len(self._examples) // self._slots

    def __getitem__(self, step: int) -> Batch:
        first = int(step) * self._slots
        rows = [self._examples[index] for index in range(first, first + self._slots)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Loader:
    """An iterable of batches, one a step. Every `iter` begins again at the first step.

    Iterating raises RestartError when a worker process dies.

    Attributes:
      failures: those of `Examples`, of this process only: worker processes log theirs as warnings,
        and `weight` shows them in the batch.
    """

    def __init__(self, examples: Examples, workers: int, threads: int):
        batches = _Batches(examples)
        self._steps = len(batches)
        self.failures: Mapping[str, str] = examples.failures
        # Whole batches before the split among workers, who read them in turn; an IterDataset
        # batched after it would lose the ends of each worker's share.
        options = grain.ReadOptions(threads, prefetch_buffer_size=_BATCHES_AHEAD * threads)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads its absl flags when it starts a worker, also in programs and notebooks
                # that parse none.
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(processes)
        self._dataset = dataset

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        if not self._steps:
            return
        iterator = iter(self._dataset)
        try:
            yield from iterator
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            cause = "a worker process that reads data was killed, perhaps for want of memory"
            raise RestartError(f"{cause} (see config.data.workers): {error}") from None
        finally:
            # Stops worker processes at once, not when the garbage collector runs.
            iterator.close()
