"""The same pure functions on an Apache Beam runner: on this machine, or on a cluster.

All machines must see the input and the output under the same paths, in a bucket or on a shared file
system: a part is written where a local process would write it, and so is a call's result.
"""

import contextlib
import importlib.util
import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ovseg_jax.data.prepare.places import Place
from ovseg_jax.data.prepare.staging import remove_folder, write_whole
from ovseg_jax.errors import UserError

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")


@dataclass(frozen=True)
class Beam:
    """Which runner, and its options as on a command line ('--flink_master=host:8081').

    Raises:
      UserError: an unknown runner, or Beam is not installed.
    """

    runner: str
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.runner not in RUNNERS:
            raise UserError(f"the Beam runner {self.runner!r} is none of {', '.join(RUNNERS)}")
        if importlib.util.find_spec("apache_beam") is None:
            raise UserError(
                f"--runner={self.runner} needs Apache Beam; install it with: "
                "pip install 'ovseg_jax[beam]'"
            )


class BeamPool:
    """Runs a function over many arguments as a pipeline; as `pool.LocalPool`.

    Args:
      beam: the runner.
      folder: a work folder that all machines see.
    """

    def __init__(self, beam: Beam, folder: Place):
        self._beam = beam
        self._results = folder / "results"

    def __enter__(self) -> "BeamPool":
        return self

    def __exit__(self, *_: object) -> None:
        remove_folder(self._results)

    def map(
        self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """The results in the order of the arguments, after all of them are there.

        Raises:
          UserError: what the function raises, or the pipeline failed.
        """
        # Imported here: it takes seconds.
        import apache_beam

        jobs = list(enumerate(arguments))
        remove_folder(self._results)
        self._results.mkdir(parents=True)
        options = _pipeline_options(self._beam)
        try:
            with apache_beam.Pipeline(runner=self._beam.runner, options=options) as pipeline:
                jobs_there = pipeline | "Jobs" >> apache_beam.Create(jobs, reshuffle=True)
                jobs_there | "Run" >> apache_beam.Map(_call, function, self._results)
        except Exception as error:
            # A runner raises anything, from its own machinery as from ours.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the pipeline on {self._beam.runner} failed ({reason}); run the same command "
                "again, and it goes on where it was"
            ) from error
        for number, _ in jobs:
            result = pickle.loads((self._results / str(number)).read_bytes())
            if isinstance(result, UserError):
                raise result
            yield result


def _pipeline_options(beam: Beam) -> Any:
    """Beam's own form of the options."""
    from apache_beam.options.pipeline_options import PipelineOptions

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = PipelineOptions(list(beam.options))
            options.get_all_options()  # parses them
    except SystemExit as error:
        # Beam prints hundreds of lines of usage; the last one says what is wrong.
        reason = said.getvalue().strip().splitlines()[-1]
        raise UserError(f"--beam_options: {reason}") from error
    return options


def _call(job: tuple[int, tuple[Any, ...]], function: Callable[..., Any], results: Place) -> None:
    """One call, its result into a file: runners have no other way back that all share."""
    number, given = job
    try:
        result = function(*given)
    except UserError as error:
        result = error
    write_whole(results / str(number), pickle.dumps(result))
