"""From captioned images to training records.

``python -m ovseg_jax.prepare --source=img2dataset:DIR --out=DIR --entities=published``
"""

import contextlib
import functools
import importlib.util
import io
import itertools
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

from ovseg_jax import flags
from ovseg_jax.data.prepare.inputs import PairSource, parse_path
from ovseg_jax.data.prepare.report import summary
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.run import Jobs, dry_run, parse_choice, prepare
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.data.prepare.source_sets import FolderSource, ScenePairs, TfdsSource
from ovseg_jax.data.prepare.source_table import FileSource
from ovseg_jax.data.records import ArrayRecordSource
from ovseg_jax.errors import UserError

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
ABOUT = """Make training records of captioned images: filter, check every image, report.

  --source=img2dataset:DIR       shards of img2dataset (webdataset: .tar and .parquet)
  --source=files:FILE.tsv        rows of image and caption (.tsv, .csv), with --images=FOLDER
  --source=folders:DIR           class-named folders, DIR/CLASS/file, as torchvision has them
  --source=tfds:NAME,split=train a TFDS set prepared with file_format='array_record'
  --source=scenes:N,size=224     the embedded data set

DIR, FILE, FOLDER and --out may be in a bucket, gs:// or s3:// (with the package gcsfs or s3fs).
Training reads records from a disk: copy them there, or mount the bucket.

An image may have several captions: rows of files: that name the same image, a list in the JSON of
img2dataset, a TFDS feature of several texts. It is stored once with all that pass the rules, and
training draws one of them each epoch. The captions of folders: are the names of the classes, put
into --config.data.name_templates (default: CLIP's 80) when they are drawn. These names are entities
beside those of --entities. Sets with different entities can be mixed.

--verify=DIR compares every byte of finished records with their manifest, say after copying them.

A run that was killed goes on where it was with the same command. Then train with
--config.data.source=records --config.data.records.dir=OUT.
"""
FLAGS = (
    flags.Flag("source", help="where the pairs are"),
    flags.Flag("out", help="folder to write"),
    flags.Flag(
        "entities",
        default="published",
        help="published, scenes, a .json file, or auto:100 (built from the captions)",
    ),
    flags.Flag("images", help="folder of image files, for files:; default that of the table"),
    flags.Flag(
        "hypernyms",
        bool,
        default=False,
        help="for folders:, wider words from NLTK's WordNet as further names: sorrel, horse",
    ),
    flags.Flag("verify", help="folder of finished records to check; then nothing else is done"),
    flags.Flag("dry-run", bool, default=False, help="only say what would happen to a sample"),
    flags.Flag("workers", int, help="processes; 0 for this one alone; default one a CPU"),
    flags.Flag(
        "runner",
        default="local",
        choices=("local", *RUNNERS),
        help="local processes, or an Apache Beam runner; a cluster's machines must see the input "
        "and --out under the same paths",
    ),
    flags.Flag(
        "beam_options", default="", help='of the runner, in one: "--flink_master=host:8081 ..."'
    ),
    flags.Flag(
        "min_side", int, default=Rules.min_side, help="least pixels of an image's shorter side"
    ),
    flags.Flag("max_caption", int, default=Rules.max_caption, help="most characters of a caption"),
    flags.Flag(
        "keep_without_entities", bool, default=False, help="keep captions that name no entity"
    ),
)
_SHOWN = 20
# KIND of --source -> what opens the text behind the colon. Add a source here.
SOURCES: dict[str, Callable[..., PairSource]] = {
    "img2dataset": Img2DatasetSource,
    "files": FileSource,
    "folders": FolderSource,
    "tfds": TfdsSource,
    "scenes": ScenePairs,
}
# Flag -> the kind of source that takes it, as an argument of the same name.
_SOURCE_FLAGS = {"images": "files", "hypernyms": "folders"}


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    if args.verify:
        return _verify(args.verify, argv)
    if not args.source:
        raise UserError("missing --source (or --verify, which checks finished records)")
    rules = Rules(args.min_side, args.max_caption, args.keep_without_entities)
    if not args.out and not args.dry_run:
        raise UserError("missing --out (or --dry-run, which writes nothing)")
    run_jobs = _jobs(args)
    choice = parse_choice(args.entities)
    source = open_source(args.source, args.images, args.hypernyms)
    if args.dry_run:
        print(_sample_text(dry_run(source, choice, rules)))
        return 0
    out = parse_path(args.out)
    try:
        report = prepare(source, out, choice, rules, run_jobs=run_jobs, say=_say)
    except (OSError, RuntimeError) as error:
        # ArrayRecord raises a RuntimeError where the disk is full.
        if isinstance(error, RuntimeError) and "write() failed" not in str(error):
            raise
        raise UserError(
            f"{args.out} cannot be finished ({error}); make room, or mend what it says; the same "
            "command goes on where it was"
        ) from error
    print(summary(report))
    print(f"records: {args.out}, report: {out / 'report.html'}")
    return 0


def open_source(text: str, images: str | None = None, hypernyms: bool = False) -> PairSource:
    """The source that 'KIND:WHERE' names.

    Args:
      text: what --source says.
      images: the folder of image files, for 'files'.
      hypernyms: add wider words to class names, for 'folders'.

    Raises:
      UserError: an unknown kind, or what the source itself refuses.
    """
    kind, colon, where = text.partition(":")
    if kind not in SOURCES or not colon or not where:
        forms = "img2dataset:DIR, files:FILE.tsv, folders:DIR, tfds:NAME, scenes:N"
        raise UserError(f"--source={text} is none of: {forms}")
    options = {"images": images, "hypernyms": hypernyms}
    given = {flag: value for flag, value in options.items() if value}
    for flag in given:
        if _SOURCE_FLAGS[flag] != kind:
            raise UserError(f"--{flag} goes with --source={_SOURCE_FLAGS[flag]}:, not with {kind}")
    return SOURCES[kind](where, **given)


def _jobs(args: SimpleNamespace) -> Jobs:
    """Where the flags let the work be done."""
    if args.runner == "local":
        if args.beam_options:
            raise UserError(
                f"--beam_options goes with --runner={'|'.join(RUNNERS)}, not with local"
            )
        return local_jobs((os.cpu_count() or 1) if args.workers is None else args.workers)
    if args.workers is not None:
        raise UserError("--workers is for --runner=local; a Beam runner has --beam_options")
    if args.runner == "DataflowRunner":
        # Its machines see no disk of this machine.
        for flag, where in (("source", args.source), ("out", args.out or "")):
            if "gs://" not in where:
                raise UserError(
                    f"--runner=DataflowRunner needs --{flag} in a bucket, gs://...; it is {where!r}"
                )
    return beam_jobs(args.runner, shlex.split(args.beam_options))


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


def _verify(directory: str, argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError("--verify checks a finished folder and goes with no other flag")
    source = ArrayRecordSource(directory)
    source.verify()
    files = source.manifest.everything()
    print(
        f"{directory}: {len(source)} records, {len(files)} files, "
        f"{sum(info.bytes for info in files) / 1e9:.2f} GB as they were written"
    )
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sample_text(sample: dict[str, Any]) -> str:
    """The result of a dry run for a terminal."""
    named = sorted(sample["entities"].items(), key=lambda item: (-item[1], item[0]))
    entities = ", ".join(f"{name} {count}" for name, count in named[:_SHOWN] if count)
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    share = sample["kept"] / sample["read"]
    return "\n".join(
        [
            f"dry run: {sample['read']} pairs of {sample['shards_read']} of "
            f"{sample['input_shards']} shards; nothing is written",
            summary(sample),
            f"entities named: {entities or 'none'}{more}",
            f"of a million pairs about {share * 1e6:,.0f} would be kept, "
            f"{sample['bytes'] / sample['read'] / 1e3:,.1f} GB of images; duplicates come off that",
        ]
    )


if __name__ == "__main__":
    flags.run(main)
