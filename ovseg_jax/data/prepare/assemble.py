"""From finished parts to the finished folder: shards, index, entity -> records index."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Bool, Int64

from ovseg_jax.data.manifest import FileInfo, describe_file
from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.parts import WRITER_OPTIONS, PartPaths, read_done, read_facts
from ovseg_jax.data.prepare.places import Place
from ovseg_jax.data.prepare.staging import local, whole
from ovseg_jax.data.prepare.statistics import Statistics, measure
from ovseg_jax.data.prepare.tally import Tally
from ovseg_jax.data.records import ENTITY_INDEX_NAMES, INDEX_NAME, key_digest


@dataclass(frozen=True)
class Duplicates:
    """The records to leave out, [duplicates, 2]: part, position in it; in that order."""

    places: Int64[np.ndarray, "duplicates 2"]

    def of(self, part: int) -> Int64[np.ndarray, "positions"]:
        """The positions within one part."""
        low, high = np.searchsorted(self.places[:, 0], [part, part + 1])
        return self.places[low:high, 1]


def sorted_duplicates(found: list[Int64[np.ndarray, "_ 2"]]) -> Duplicates:
    """Those of all buckets."""
    places = np.concatenate([np.zeros((0, 2), np.int64), *found])
    return Duplicates(places[np.lexsort((places[:, 1], places[:, 0]))])


def finish_shard(
    work: Place, part: int, dropped: Int64[np.ndarray, "positions"], path: Place, entities: int
) -> tuple[FileInfo, Statistics]:
    """Makes the output shard `path` of a part, without the records at the dropped positions.

    The shard appears as a whole, so one that is there was finished by a run before.
    """
    paths = PartPaths(work, part)
    facts = read_facts(paths)
    kept = _mask(len(facts.ends), dropped)
    _, info = read_done(paths)
    if not len(dropped):
        if not path.exists():
            paths.records.replace(path)
        # The sum of a part's file was taken when it was written.
        info = FileInfo(path.name, info.count, info.bytes, info.sha256)
    else:
        if not path.exists():
            with local(paths.records) as old, whole(path, work) as new:
                _copy_without(old, kept, new)
        with local(path) as file:
            info = describe_file(file, int(kept.sum()))
    return info, measure(facts, kept, entities)


def _copy_without(part: Path, kept: Bool[np.ndarray, "n"], path: Path) -> None:
    reader = array_record_module.ArrayRecordReader(str(part))
    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for keep in kept:
        record = reader.read()
        if keep:
            writer.write(record)
    writer.close()
    reader.close()


def write_index(
    out: Place, work: Place, parts: int, duplicates: Duplicates, tally: Tally
) -> tuple[FileInfo, str]:
    """Writes the index of keys and captions; moves duplicates to the dropped ones in `tally`.

    Returns:
      (description of the file, digest of the key list).
    """
    path = out / INDEX_NAME
    count = 0

    def keys(stream) -> Iterator[str]:
        nonlocal count
        for part in range(parts):
            dropped = set(duplicates.of(part).tolist())
            index = PartPaths(work, part).index
            with local(index) as file, file.open(encoding="ascii") as lines:
                for position, line in enumerate(lines):
                    key, captions = json.loads(line)
                    if position in dropped:
                        tally.drop_kept(key, len(captions), causes.DUPLICATE)
                        continue
                    stream.write(line)
                    count += 1
                    yield key

    with whole(path, work) as file:
        with file.open("w", encoding="ascii") as stream:
            digest = key_digest(keys(stream))
        return describe_file(file, count, path.name), digest


def write_entity_index(
    out: Place,
    work: Place,
    parts: list[int],
    duplicates: Duplicates,
    counts: Int64[np.ndarray, "entities"],
) -> tuple[FileInfo, FileInfo]:
    """Writes the arrays of a `PairIndex`, part after part: 8 bytes a mention, on disk.

    Args:
      counts: records of each entity.
    """
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    starts_path, records_path = (out / name for name in ENTITY_INDEX_NAMES)
    with whole(starts_path, work) as file:
        np.save(file, starts)
        starts_info = describe_file(file, len(starts), starts_path.name)
    mentions = int(starts[-1])
    with whole(records_path, work) as file:
        if mentions:
            records = np.lib.format.open_memmap(file, "w+", np.int64, (mentions,))
            _fill(records, starts, work, parts, duplicates)
            records.flush()
        else:
            np.save(file, np.zeros(0, np.int64))
        return starts_info, describe_file(file, mentions, records_path.name)


def _fill(
    records: Int64[np.ndarray, "mentions"],
    starts: Int64[np.ndarray, "entities_and_one"],
    work: Place,
    parts: list[int],
    duplicates: Duplicates,
) -> None:
    free = starts[:-1].copy()  # where the next record of each entity goes
    base = 0
    for part in parts:
        facts = read_facts(PartPaths(work, part))
        kept = _mask(len(facts.ends), duplicates.of(part))
        numbers = base + np.cumsum(kept) - 1
        record, entity = facts.mentions()
        record, entity = record[kept[record]], entity[kept[record]]
        # Stable: records stay ascending within an entity.
        order = np.argsort(entity, kind="stable")
        entity = entity[order]
        uses = np.bincount(entity, minlength=len(free))
        rank = np.arange(len(entity)) - np.repeat(np.cumsum(uses) - uses, uses)
        records[free[entity] + rank] = numbers[record[order]]
        free += uses
        base += int(kept.sum())


def _mask(count: int, dropped: Int64[np.ndarray, "positions"]) -> Bool[np.ndarray, "n"]:
    kept = np.ones(count, bool)
    kept[dropped] = False
    return kept
