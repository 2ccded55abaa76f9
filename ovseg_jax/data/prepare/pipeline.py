"""A preparation from start to end, and its continuation after it was killed.

The work folder OUT/.work holds the plan and the output of every finished shard, which a run with
the same plan skips. All are functions of the plan and the input, so the result is the same bytes
however often the run was killed.
"""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, starmap
from pathlib import Path
from typing import Any

import numpy as np

import ovseg_jax
from ovseg_jax.data import records as stored
from ovseg_jax.data.entities import EntitySet, with_names
from ovseg_jax.data.prepare import pairs as files
from ovseg_jax.data.prepare import shard as work_files
from ovseg_jax.data.prepare.pairs import AnyPath, PairSource, whole_file, write_whole
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.shard import ShardOutput, Tally
from ovseg_jax.data.prepare.summary import MOST_WORDS, make_report, page, report_counts, summary
from ovseg_jax.data.records import FileInfo, describe_file, manifest_text
from ovseg_jax.data.scenes import scene_entity_table
from ovseg_jax.data.words import NounCounts, choose_entities, noun_finder
from ovseg_jax.errors import UserError

# (function, its arguments job by job): yields once for each finished job, in order. A function
# leaves its result in a file.
Jobs = Callable[[Callable[..., None], Sequence[tuple[Any, ...]]], Iterator[None]]
WORK_NAME = ".work"
ENTITIES_NAME = "entities.json"
REPORT_NAMES = ("report.json", "report.html")
# A dry run reads so many pairs, of so many shards.
_SAMPLE_PAIRS, _SAMPLE_SHARDS = 2000, 8


@dataclass(frozen=True)
class EntityChoice:
    """The entities of a preparation, and in words where they come from.

    Where `table` (`EntitySet.table`) is None, `top` entities are still to be built from the
    captions; then `counts` has the mentions of each noun.
    """

    table: dict[str, list[str]] | None
    source: str
    top: int = 0
    counts: dict[str, int] | None = None


def parse_choice(text: str) -> EntityChoice:
    """'published', 'scenes', 'auto:N', or a file that `EntitySet.from_json` reads."""
    if text == "published":
        return EntityChoice(EntitySet.published().table, "the published list")
    if text == "scenes":
        return EntityChoice(scene_entity_table(), "the classes of scenes that captions name")
    kind, _, number = text.partition(":")
    if kind == "auto":
        if not number.isdecimal() or not int(number):
            raise UserError(f"--entities={text} must say how many, for example --entities=auto:100")
        source = f"the {number} most frequent nouns of the captions, by {noun_finder().name}"
        return EntityChoice(None, source, int(number))
    if not text.endswith(".json") and not Path(text).is_file():
        raise UserError(f"--entities={text} is none of: published, scenes, auto:100, a .json file")
    return EntityChoice(EntitySet.from_json(text).table, f"the file {Path(text).name}")


def build_entities(
    choice: EntityChoice, nouns: NounCounts | None, class_names: Sequence[str]
) -> EntityChoice:
    """A choice with its table, with class names added that are no form of an entity in it.

    `nouns` of the captions are needed where `choice` has no table.
    """
    source = choice.source + (" and the names of the classes" if class_names else "")
    counts = None if nouns is None else choose_entities(nouns, choice.top)
    table = choice.table if counts is None else {noun: [noun] for noun in counts}
    return replace(choice, table=with_names(table, class_names), source=source, counts=counts)


def prepare(
    source: PairSource,
    out: AnyPath,
    choice: EntityChoice,
    rules: Rules,
    *,
    run_jobs: Jobs,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes a folder of records (`records.ArrayRecordSource`); returns the report, as a dict.

    `out` is absent, empty, or begun by a run with the same arguments. Where `run_jobs` does the
    work changes nothing in the result; `say` gets a line now and then. Raises UserError where the
    folder holds something else, or no pair is left.
    """
    shards = source.shards()
    plan = {
        "tool": f"ovseg_jax {ovseg_jax.__version__}",
        "source": source.name,
        "input": files.source_fingerprint(source, shards),
        "entities": choice.source,
        "listed": choice.table,
        "rules": asdict(rules),
        "work_layout": work_files.WORK_LAYOUT,
    }
    names = getattr(source, "class_names", [])
    with _work_folder(out, plan) as work:
        nouns = None
        if choice.table is None:
            counts = [work / f"nouns-{n:05d}.json" for n in range(len(shards))]
            jobs = [(source, *job, rules) for job in zip(shards, counts, strict=True)]
            for done, _ in enumerate(run_jobs(work_files.write_nouns, jobs), 1):
                say(f"counted the nouns of {done} of {len(shards)} shards")
            nouns = work_files.read_nouns(counts)
        choice = build_entities(choice, nouns, names)
        missing = [n for n in range(len(shards)) if not ShardOutput(work, n).is_done()]
        if len(missing) < len(shards):
            say(f"{len(shards) - len(missing)} of {len(shards)} shards were finished before")
        jobs = [(source, shards[n], n, work, choice.table, rules) for n in missing]
        for done, _ in enumerate(run_jobs(work_files.process_shard, jobs), 1):
            tally, _ = ShardOutput(work, missing[done - 1]).read_done()
            say(f"shard {done} of {len(missing)}: {tally.read} pairs")
        repeated = dict(enumerate(work_files.find_repeated(work, len(shards))))
        jobs = [(work, n, positions) for n, positions in repeated.items() if positions]
        list(run_jobs(work_files.drop_repeated, jobs))
        outputs = [ShardOutput(work, n, unique=bool(where)) for n, where in repeated.items()]
        captions = stored.CLASS_NAMES if names else stored.TEXTS
        report = _finish(out, work, outputs, choice, plan, captions, run_jobs)
    files.remove_folder(work)
    return report


@contextlib.contextmanager
def _work_folder(out: AnyPath, plan: dict[str, Any]) -> Iterator[AnyPath]:
    """OUT/.work, locked against a second run, with this plan and no other."""
    work = out / WORK_NAME
    if (out / stored.MANIFEST_NAME).exists():
        files.remove_folder(work)  # of a run that was killed at its very end
        raise UserError(f"{out} already holds records; choose another folder, or empty it")
    if out.is_dir() and any(out.iterdir()) and not work.is_dir():
        raise UserError(f"{out} is not empty; choose another folder, or empty it")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); choose another folder") from error
    with contextlib.ExitStack() as stack:
        if isinstance(work, Path):  # buckets have no locks: two runs write the same bytes twice
            lock = stack.enter_context((work / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"another run is preparing {out}; wait, or end it") from error
        path = work / "plan.json"
        begun = json.loads(path.read_text("utf-8")) if path.exists() else plan
        changed = [name for name in plan if begun.get(name) != plan[name]]
        if changed:
            raise UserError(
                f"{out} was begun with other arguments, or its input has changed "
                f"({', '.join(changed)}); run the same command again, or delete {out}"
            )
        write_whole(path, json.dumps(plan) + "\n")
        yield work


def _finish(
    out: AnyPath,
    work: AnyPath,
    outputs: list[ShardOutput],
    choice: EntityChoice,
    plan: dict[str, Any],
    captions: str,
    run_jobs: Jobs,
) -> dict[str, Any]:
    """From finished shards to the finished folder; the manifest comes last."""
    tally, full, infos, size = Tally(), [], [], len(choice.table)
    together, lengths = np.zeros((size, size), np.int64), np.zeros(MOST_WORDS + 1, np.int64)
    mentions = [(np.zeros(0, np.int64), np.zeros(0, np.int32))]  # of entities: records, entities
    for shard in outputs:
        words, records, entities = shard.read_facts("words", "records", "entities")
        counts, info = shard.read_done()
        named = np.zeros((info.count, size), np.float32)
        named[records, entities] = 1
        # Exact: a shard has far fewer than 2^24 records.
        together += np.rint(named.T @ named).astype(np.int64)
        lengths += np.bincount(np.minimum(words, MOST_WORDS), minlength=len(lengths))
        mentions.append((tally.kept + records, entities.astype(np.int32)))
        tally.add(counts)
        if info.count:
            full.append(shard)
            infos.append(info)
    targets = [f"records-{n:05d}-of-{len(full):05d}.array_record" for n in range(len(full))]
    moves = [(s.path("array_record"), out / name) for s, name in zip(full, targets, strict=True)]
    # A move is a copy in a bucket.
    list(starmap(move_file, moves) if isinstance(out, Path) else run_jobs(move_file, moves))
    index, keys_sha256 = _write_index(out, work, full, tally.kept)
    records, entities = map(np.concatenate, zip(*mentions, strict=True))
    entity_index = _write_entity_index(out, work, records, entities, size)
    with whole_file(out / ENTITIES_NAME, work) as file:
        EntitySet(choice.table).to_json(file, source=choice.source, counts=choice.counts)
    manifest = stored.Manifest(
        count=tally.kept,
        shards=tuple(replace(info, file=name) for info, name in zip(infos, targets, strict=True)),
        index=index,
        entities=choice.table,
        source=plan["source"],
        source_fingerprint=plan["input"],
        keys_sha256=keys_sha256,
        tool=plan["tool"],
        files=entity_index,
        captions=captions,
    )
    shards = len(outputs)
    report = make_report(manifest, choice.source, tally, together, lengths, plan["rules"], shards)
    write_whole(out / REPORT_NAMES[0], json.dumps(report, indent=1) + "\n", work)
    write_whole(out / REPORT_NAMES[1], page(report), work)
    if not manifest.count:
        raise UserError(f"no pair is left; {out / REPORT_NAMES[1]} says why\n{summary(report)}")
    # Last: a folder without a manifest is unfinished.
    write_whole(out / stored.MANIFEST_NAME, manifest_text(manifest), work)
    return report


def move_file(path: AnyPath, target: AnyPath) -> None:
    """Moves a file, unless a run before this one has."""
    if not target.exists():
        path.replace(target)


def _write_index(
    out: AnyPath, work: AnyPath, outputs: list[ShardOutput], records: int
) -> tuple[FileInfo, str]:
    """Writes the index of keys and captions; returns its description and the keys' digest."""

    def keys(stream: Any) -> Iterator[str]:
        for shard in outputs:
            with files.local_copy(shard.path("jsonl")) as file, file.open("rb") as lines:
                for line in lines:
                    stream.write(line)
                    yield json.loads(line)[0]

    with whole_file(out / stored.INDEX_NAME, work) as file:
        with file.open("wb") as stream:
            digest = stored.key_digest(keys(stream))
        return describe_file(file, records, stored.INDEX_NAME), digest


def _write_entity_index(
    out: AnyPath, work: AnyPath, records: np.ndarray, entities: np.ndarray, count: int
) -> tuple[FileInfo, ...]:
    """Writes the arrays of a `PairIndex`; each mention has a record, ascending, and an entity."""
    # Stable: records stay ascending within an entity.
    order = np.argsort(entities, kind="stable")
    starts = np.searchsorted(entities[order], np.arange(count + 1)).astype(np.int64)
    infos = []
    for name, array in zip(stored.ENTITY_INDEX_NAMES, (starts, records[order]), strict=True):
        with whole_file(out / name, work) as file:
            np.save(file, array)
            infos.append(describe_file(file, len(array), name))
    return tuple(infos)


def dry_run(source: PairSource, choice: EntityChoice, rules: Rules) -> dict[str, Any]:
    """Applies every rule to the first pairs of shards spread over the input; writes nothing.

    Entities are built from the sample, and duplicates not looked for. Returns what
    `summary.report_counts` does, with `entities` (name -> records that name it), `bytes` of the
    images that are kept, `shards_read` and `input_shards`.
    """
    shards = source.shards()
    sample = shards[:: max(1, -(-len(shards) // _SAMPLE_SHARDS))]
    most = _SAMPLE_PAIRS // max(1, len(sample))
    nouns = None
    if choice.table is None:
        pairs = (p for s in sample for p in islice(source.read(s, images=False), most))
        nouns = work_files.count_nouns(pairs, rules)
    names = getattr(source, "class_names", [])
    entities = EntitySet(build_entities(choice, nouns, names).table)
    named = dict.fromkeys(entities.names, 0)
    tally, size = Tally(), 0
    for shard in sample:
        pairs = islice(source.read(shard), most)
        for record in work_files.judge_all(pairs, shard.name, rules, entities, tally):
            size += len(record.image)
            for entity in record.entities:
                named[entities.names[entity]] += 1
    if not tally.read:
        raise UserError("the sample of the input has no pair; check --source")
    counts = {"bytes": size, "shards_read": len(sample), "input_shards": len(shards)}
    return {**report_counts(tally), "entities": named, **counts}
