"""Running a function over many arguments: in this process, in several, or on Apache Beam."""

import contextlib
import functools
import importlib.util
import io
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ovseg_jax.errors import UserError

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
# (function, its arguments job by job): yields once for each finished job, in order. A function
# leaves its result in a file.
Jobs = Callable[[Callable[..., None], Sequence[tuple[Any, ...]]], Iterator[None]]


def local_jobs(workers: int) -> Jobs:
    """Runs jobs in worker processes; 0 is this process alone.

    Raises:
      UserError: a negative number; later, what a job raises, or that a worker process died.
    """
    if workers < 0:
        raise UserError(f"--workers={workers} must be 0 (this process alone) or more")
    return functools.partial(_run_locally, workers)


def _run_locally(
    workers: int, function: Callable[..., None], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[None]:
    if not workers or not jobs:
        yield from itertools.starmap(function, jobs)
        return
    # Not forked: threads of this process (progress, libraries) would not survive it. Ctrl-C ends
    # workers at once and without a traceback of their own.
    with ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as executor:
        try:
            yield from executor.map(function, *zip(*jobs, strict=True))
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, most likely for want of memory; run the same command "
                "again, with fewer --workers, and it goes on where it was"
            ) from error


def beam_jobs(runner: str, options: Sequence[str] = ()) -> Jobs:
    """Runs jobs as a pipeline of Apache Beam, on this machine or on a cluster.

    All machines must see the input and the output under the same paths, in a bucket or on a shared
    file system.

    Args:
      runner: one of `RUNNERS`.
      options: of the runner, as on its command line ('--flink_master=host:8081').

    Raises:
      UserError: an unknown runner, Beam is not installed, or it refuses the options; later, that
        the pipeline failed.
    """
    if runner not in RUNNERS:
        raise UserError(f"the Beam runner {runner!r} is none of {', '.join(RUNNERS)}")
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(
            f"--runner={runner} needs Apache Beam; install it with: pip install 'ovseg_jax[beam]'"
        )
    return functools.partial(_run_on_beam, runner, _pipeline_options(options))


def _run_on_beam(
    runner: str, options: Any, function: Callable[..., None], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[None]:
    # Imported here: it takes seconds.
    import apache_beam

    try:
        with apache_beam.Pipeline(runner=runner, options=options) as pipeline:
            created = pipeline | "Jobs" >> apache_beam.Create(jobs, reshuffle=True)
            created | "Run" >> apache_beam.MapTuple(function)
    except Exception as error:
        # A runner raises anything, from its own machinery as from ours. Our own messages are in
        # the middle of a remote traceback.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "UserError: " in line), lines[0])
        raise UserError(
            f"the pipeline on {runner} failed ({reason}); run the same command again, and it goes "
            "on where it was"
        ) from error
    yield from (None for _ in jobs)


def _pipeline_options(options: Sequence[str]) -> Any:
    """Beam's form of the options."""
    from apache_beam.options.pipeline_options import PipelineOptions

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = PipelineOptions(list(options))
            parsed.get_all_options()  # parses them
    except SystemExit as error:
        # Beam prints hundreds of lines of usage; the last one says what is wrong.
        reason = said.getvalue().strip().splitlines()[-1]
        raise UserError(f"--beam_options: {reason}") from error
    return parsed
