"""Running a pure function over many arguments, in this process or in several."""

import collections
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, runtime_checkable

from ovseg_jax.errors import UserError

# Calls handed over before their turn, a process: enough to keep it busy, few results to hold.
_AHEAD = 2


@runtime_checkable
class Pool(Protocol):
    """Something that runs a pure function over many arguments."""

    def map(
        self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """The results in the order of the arguments."""
        ...


class LocalPool:
    """Worker processes; a context manager.

    Args:
      workers: how many; 0 runs everything in this process.

    Raises:
      UserError: a negative number.
    """

    def __init__(self, workers: int):
        if workers < 0:
            raise UserError(f"--workers={workers} must be 0 (this process alone) or more")
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "LocalPool":
        if self._workers:
            # Not forked: threads of this process (progress, libraries) would not survive it.
            context = multiprocessing.get_context("spawn")
            # Ctrl-C ends workers at once and without a traceback of their own.
            default = (signal.SIGINT, signal.SIG_DFL)
            self._executor = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=signal.signal, initargs=default
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """The results in the order of the arguments.

        Raises:
          UserError: a worker process died, or what the function raises.
        """
        if self._executor is None:
            for given in arguments:
                yield function(*given)
            return
        waiting: collections.deque[Future[Any]] = collections.deque()
        try:
            for given in arguments:
                waiting.append(self._executor.submit(function, *given))
                if len(waiting) >= _AHEAD * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, most likely for want of memory; run the same command "
                "again, with fewer --workers, and it goes on where it was"
            ) from error
