"""A preparation from start to end, and its going on after it was killed.

The work folder OUT/.work holds the plan and every finished part. A run with the same plan skips
what is finished; parts and everything made of them are functions of the plan and the input, so the
result is the same bytes however often it was cut off.
"""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ovseg_jax
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.manifest import (
    CLASS_NAMES,
    MANIFEST_NAME,
    TEXTS,
    Manifest,
    manifest_text,
)
from ovseg_jax.data.prepare import assemble, duplicates, entity_choice
from ovseg_jax.data.prepare.beam_pool import Beam, BeamPool
from ovseg_jax.data.prepare.entity_choice import Entities, EntityChoice
from ovseg_jax.data.prepare.page import page
from ovseg_jax.data.prepare.parts import PartPaths, make_part, read_done
from ovseg_jax.data.prepare.places import Place
from ovseg_jax.data.prepare.pool import LocalPool, Pool
from ovseg_jax.data.prepare.raw import InputShard, PairSource, source_fingerprint
from ovseg_jax.data.prepare.report import make_report, summary
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.source_folders import class_names
from ovseg_jax.data.prepare.staging import remove_folder, whole, write_whole
from ovseg_jax.data.prepare.statistics import no_statistics
from ovseg_jax.data.prepare.tally import Tally
from ovseg_jax.errors import UserError

WORK_NAME = ".work"
ENTITIES_NAME = "entities.json"
REPORT_NAMES = ("report.json", "report.html")


def prepare(
    source: PairSource,
    out: Place,
    choice: EntityChoice,
    rules: Rules,
    *,
    workers: int = 0,
    beam: Beam | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes a folder of records (`records.ArrayRecordSource`) with its report.

    Args:
      source: the pairs.
      out: the folder to write: absent, empty, or begun by a run with the same arguments.
      choice: the entities (`entity_choice.parse_choice`).
      workers: processes besides this one; 0 for none. Changes nothing in the result.
      beam: run on Apache Beam, in place of processes. Changes nothing either.
      say: gets a line now and then.

    Returns:
      The report, as in report.json.

    Raises:
      UserError: the folder holds something else, or no pair is left.
    """
    processes = LocalPool(workers)
    shards = source.shards()
    plan = _plan(source, shards, choice, rules)
    with _work_folder(out, plan) as work, BeamPool(beam, work) if beam else processes as pool:
        entities = _entities(source, shards, choice, rules, work, pool, say)
        tally = _make_parts(source, shards, entities, rules, work, pool, say)
        found = _find_duplicates(work, len(shards), tally.kept, pool)
        captions = CLASS_NAMES if class_names(source) else TEXTS
        report = _finish(out, work, len(shards), found, entities, tally, plan, captions, pool)
    remove_folder(work)
    return report


def _plan(
    source: PairSource, shards: list[InputShard], choice: EntityChoice, rules: Rules
) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "tool": f"ovseg_jax {ovseg_jax.__version__}",
        "source": source.name,
        "input": source_fingerprint(source, shards),
        "entities": choice.source,
        "listed": choice.listed,
        "rules": dataclasses.asdict(rules),
    }


@contextlib.contextmanager
def _work_folder(out: Place, plan: dict[str, Any]) -> Iterator[Place]:
    """OUT/.work, held against a second run, with this plan and no other."""
    work = out / WORK_NAME
    if (out / MANIFEST_NAME).exists():
        remove_folder(work)  # of a run that was killed at its very end
        raise UserError(f"{out} already holds records; choose another folder, or empty it")
    if out.is_dir() and any(out.iterdir()) and not work.is_dir():
        raise UserError(f"{out} is not empty; choose another folder, or empty it")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); choose another folder") from error
    with _held(work, out):
        path = work / "plan.json"
        if path.exists():
            begun = json.loads(path.read_text("utf-8"))
            changed = [name for name in plan if begun.get(name) != plan[name]]
            if changed:
                raise UserError(
                    f"{out} was begun with other arguments, or its input has changed "
                    f"({', '.join(changed)}); run the same command again, or delete {out}"
                )
        write_whole(path, json.dumps(plan) + "\n")
        yield work


@contextlib.contextmanager
def _held(work: Place, out: Place) -> Iterator[None]:
    """Keeps a second run away. Buckets have no locks: two runs there write the same bytes twice."""
    if not isinstance(work, Path):
        yield
        return
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is preparing {out}; wait for it, or end it") from error
        yield


def _entities(
    source: PairSource,
    shards: list[InputShard],
    choice: EntityChoice,
    rules: Rules,
    work: Place,
    pool: Pool,
    say: Callable[[str], None],
) -> Entities:
    if choice.listed is not None:
        return entity_choice.build(choice, [], class_names(source))
    jobs = ((source, shard, number, work, rules) for number, shard in enumerate(shards))
    files = []
    for path in pool.map(entity_choice.count_nouns, jobs):
        files.append(path)
        say(f"counted the nouns of {len(files)} of {len(shards)} shards")
    return entity_choice.build(choice, files, class_names(source))


def _make_parts(
    source: PairSource,
    shards: list[InputShard],
    entities: Entities,
    rules: Rules,
    work: Place,
    pool: Pool,
    say: Callable[[str], None],
) -> Tally:
    """Makes the parts that are not there yet; returns the counts of all."""
    missing = [n for n in range(len(shards)) if not PartPaths(work, n).done.exists()]
    if len(missing) < len(shards):
        say(f"{len(shards) - len(missing)} of {len(shards)} shards were finished before")
    jobs = ((source, shards[n], n, work, entities.table, rules) for n in missing)
    for done, read in enumerate(pool.map(make_part, jobs), 1):
        say(f"shard {done} of {len(missing)}: {read} pairs")
    tally = Tally()
    for number in range(len(shards)):
        tally.add(read_done(PartPaths(work, number))[0])
    return tally


def _find_duplicates(work: Place, parts: int, records: int, pool: Pool) -> assemble.Duplicates:
    buckets = duplicates.bucket_count(records)
    jobs = ((work, parts, bucket, buckets) for bucket in range(buckets))
    return assemble.sorted_duplicates(list(pool.map(duplicates.duplicates_in_bucket, jobs)))


def _finish(
    out: Place,
    work: Place,
    parts: int,
    found: assemble.Duplicates,
    entities: Entities,
    tally: Tally,
    plan: dict[str, Any],
    captions: str,
    pool: Pool,
) -> dict[str, Any]:
    kept = [read_done(PartPaths(work, n))[1].count - len(found.of(n)) for n in range(parts)]
    full = [number for number in range(parts) if kept[number]]
    jobs = (
        (
            work,
            part,
            found.of(part),
            out / f"records-{number:05d}-of-{len(full):05d}.array_record",
            len(entities.table),
        )
        for number, part in enumerate(full)
    )
    statistics = no_statistics(len(entities.table))
    infos = []
    for info, counts in pool.map(assemble.finish_shard, jobs):
        infos.append(info)
        statistics += counts
    index, keys_sha256 = assemble.write_index(out, work, parts, found, tally)
    files = assemble.write_entity_index(out, work, full, found, statistics.entities)
    with whole(out / ENTITIES_NAME, work) as file:
        EntitySet(entities.table).to_json(file, source=entities.source, counts=entities.counts)
    manifest = Manifest(
        count=sum(info.count for info in infos),
        shards=tuple(infos),
        index=index,
        entities=entities.table,
        source=plan["source"],
        source_fingerprint=plan["input"],
        keys_sha256=keys_sha256,
        tool=plan["tool"],
        files=files,
        captions=captions,
    )
    report = make_report(manifest, entities, tally, statistics, plan["rules"], parts)
    write_whole(out / REPORT_NAMES[0], json.dumps(report, indent=1) + "\n", work)
    write_whole(out / REPORT_NAMES[1], page(report), work)
    if not manifest.count:
        raise UserError(f"no pair is left; {out / REPORT_NAMES[1]} says why\n{summary(report)}")
    # Last: a folder without a manifest is unfinished.
    write_whole(out / MANIFEST_NAME, manifest_text(manifest), work)
    return report
