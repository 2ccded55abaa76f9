"""From captioned images to training records."""

import contextlib
import functools
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
from ovseg_jax.data.prepare.pairs import PairSource, parse_path
from ovseg_jax.data.prepare.pipeline import Jobs, dry_run, parse_choice, prepare
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.data.prepare.source_sets import FolderSource, ScenePairs, TfdsSource
from ovseg_jax.data.prepare.source_table import FileSource
from ovseg_jax.data.prepare.summary import summary
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
_ENTITIES = "published, scenes, a .json file, or auto:100 (built from the captions)"
_HYPERNYMS = "for folders:, wider words from NLTK's WordNet as further names: sorrel, horse"
_RUNNER = "local processes, or an Apache Beam runner, whose machines must see the same paths"
FLAGS = (
    flags.Flag("source", help="where the pairs are"),
    flags.Flag("out", help="folder to write"),
    flags.Flag("entities", default="published", help=_ENTITIES),
    flags.Flag("images", help="folder of image files, for files:; default that of the table"),
    flags.Flag("hypernyms", bool, False, _HYPERNYMS),
    flags.Flag("verify", help="folder of finished records to check; then nothing else is done"),
    flags.Flag("dry-run", bool, False, "only say what would happen to a sample"),
    flags.Flag("workers", int, help="processes; 0 for this one alone; default one a CPU"),
    flags.Flag("runner", default="local", help=_RUNNER, choices=("local", *RUNNERS)),
    flags.Flag("beam_options", default="", help='in one: "--flink_master=host:8081 ..."'),
    flags.Flag("min_side", int, Rules.min_side, "least pixels of an image's shorter side"),
    flags.Flag("max_caption", int, Rules.max_caption, "most characters of a caption"),
    flags.Flag("keep_without_entities", bool, False, "keep captions that name no entity"),
)
_SHOWN = 20  # entities that a dry run names
_AGAIN = "the same command goes on where it was"
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
        if len(argv) > 1:
            raise UserError("--verify checks a finished folder and goes with no other flag")
        records = ArrayRecordSource(args.verify)
        records.verify()
        files = records.manifest.everything()
        size = sum(info.bytes for info in files) / 1e9
        found = f"{len(records)} records, {len(files)} files, {size:.2f} GB as they were written"
        print(f"{args.verify}: {found}")
        return 0
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
    say = functools.partial(print, file=sys.stderr, flush=True)
    try:
        report = prepare(source, out, choice, rules, run_jobs=run_jobs, say=say)
    except (OSError, RuntimeError) as error:
        # ArrayRecord raises a RuntimeError where the disk is full.
        if isinstance(error, RuntimeError) and "write() failed" not in str(error):
            raise
        unfinished = f"{args.out} cannot be finished ({error})"
        raise UserError(f"{unfinished}; mend that, and {_AGAIN}") from error
    print(summary(report))
    print(f"records: {args.out}, report: {out / 'report.html'}")
    return 0


def open_source(text: str, images: str | None = None, hypernyms: bool = False) -> PairSource:
    """The source that 'KIND:WHERE' names.

    `images` is the folder of image files, for 'files'; `hypernyms` adds wider words, for 'folders'.
    """
    kind, _, where = text.partition(":")
    if kind not in SOURCES or not where:
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
            raise UserError("--beam_options goes with a Beam --runner, not with local")
        return local_jobs((os.cpu_count() or 1) if args.workers is None else args.workers)
    if args.workers is not None:
        raise UserError("--workers is for --runner=local; a Beam runner has --beam_options")
    for flag, where in (("source", args.source), ("out", args.out or "")):
        if args.runner == "DataflowRunner" and "gs://" not in where:
            needs = f"--runner=DataflowRunner needs --{flag} in a bucket, gs://..."
            raise UserError(f"{needs}: its machines see no disk of this one")
    return beam_jobs(args.runner, shlex.split(args.beam_options))


def local_jobs(workers: int) -> Jobs:
    """Runs jobs in worker processes; 0 is this process alone."""
    if workers < 0:
        raise UserError(f"--workers={workers} must be 0 (this process alone) or more")

    def run(function: Callable[..., None], jobs: Sequence[tuple[Any, ...]]) -> Iterator[None]:
        if not workers or not jobs:
            yield from itertools.starmap(function, jobs)
            return
        # Not forked: threads of this process (progress, libraries) would not survive it. Ctrl-C
        # ends workers at once and without a traceback of their own.
        with ProcessPoolExecutor(
            min(workers, len(jobs)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_DFL),
        ) as executor:
            try:
                yield from executor.map(function, *zip(*jobs, strict=True))
            except BrokenProcessPool as error:
                cause = "a worker process died, most likely for want of memory"
                raise UserError(f"{cause}; with fewer --workers, {_AGAIN}") from error

    return run


def beam_jobs(runner: str, options: Sequence[str] = ()) -> Jobs:
    """Runs jobs as a pipeline of Apache Beam, on this machine or on a cluster.

    All machines must see input and output under the same paths. `options` are those of the
    runner's command line ('--flink_master=host:8081').
    """
    try:  # imported here: it takes seconds
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        needed = "Apache Beam; install it with: pip install 'ovseg_jax[beam]'"
        raise UserError(f"--runner={runner} needs {needed}") from error
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = PipelineOptions(list(options))
            parsed.get_all_options()  # parses them
    except SystemExit as error:
        # Beam prints hundreds of lines of usage; the last one says what is wrong.
        raise UserError(f"--beam_options: {said.getvalue().strip().splitlines()[-1]}") from error

    def run(function: Callable[..., None], jobs: Sequence[tuple[Any, ...]]) -> Iterator[None]:
        try:
            with apache_beam.Pipeline(runner=runner, options=parsed) as pipeline:
                created = pipeline | "Jobs" >> apache_beam.Create(jobs, reshuffle=True)
                created | "Run" >> apache_beam.MapTuple(function)
        except Exception as error:
            # A runner raises anything, from its own machinery as from ours. Our own messages are
            # in the middle of a remote traceback.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "UserError: " in line), lines[0])
            raise UserError(f"the pipeline on {runner} failed ({reason}); {_AGAIN}") from error
        yield from (None for _ in jobs)

    return run


def _sample_text(sample: dict[str, Any]) -> str:
    """The result of a dry run for a terminal."""
    named = sorted(sample["entities"].items(), key=lambda item: (-item[1], item[0]))
    entities = ", ".join(f"{name} {count}" for name, count in named[:_SHOWN] if count)
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    kept = sample["kept"] / sample["read"] * 1e6
    size = sample["bytes"] / sample["read"] / 1e3
    shards = f"{sample['shards_read']} of {sample['input_shards']} shards"
    return f"""dry run: {sample["read"]} pairs of {shards}; nothing is written
{summary(sample)}
entities named: {entities or "none"}{more}
of a million pairs about {kept:,.0f} would be kept, {size:,.1f} GB of images, duplicates included"""


if __name__ == "__main__":
    flags.run(main)
