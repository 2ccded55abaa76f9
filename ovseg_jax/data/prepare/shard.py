"""What an input shard becomes: its records, and what the finished folder needs to know about them.

The output of a shard is four files in the work folder. `shard-00000.json` is written last: a killed
run repeats the shards that lack it. An output with records whose keys an earlier record has is
written again without them, as `unique-00000`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from array_record.python import array_record_module

from ovseg_jax.data import records as stored
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare import pairs
from ovseg_jax.data.prepare.pairs import AnyPath, Damage, InputShard, PairSource, RawPair
from ovseg_jax.data.prepare.rules import DUPLICATE, Rules, Verdict, clean_captions, judge
from ovseg_jax.data.records import FileInfo, Record, describe_file
from ovseg_jax.data.words import NounCounts, noun_finder

WORK_LAYOUT = 3  # changes when these files do
_EXAMPLES = 5  # keys shown for each cause, so that a person can look one up
# One record a group: reading one record never decodes its neighbors.
_WRITER_OPTIONS = "group_size:1"
# Arrays of a shard with n records.
_FACTS = (
    "digests",  # [n, 2] 128 bits of the hash of each key
    "words",  # number of words of each caption, of all records in order
    "records",  # for each mention of an entity: the record's number in the shard
    "entities",  # and the entity
)
_COUNTERS = ("captions_dropped", "dropped", "remarks")


@dataclass
class Tally:
    """Counts of pairs: `read` = `kept` + all `dropped`, by cause, with `examples` of their keys.

    `captions` and `captions_dropped` are of pairs that are kept; `remarks` count pairs that passed
    the rules (duplicates too); `damage` is what was wrong with whole shards.
    """

    read: int = 0
    kept: int = 0
    captions: int = 0
    captions_dropped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)

    def count(self, key: str, verdict: Verdict) -> None:
        self.read += 1
        if verdict.record is None:
            self.drop(key, verdict.cause)
            return
        self.kept += 1
        self.captions += len(verdict.record.captions)
        self.captions_dropped.update(verdict.dropped)
        self.remarks.update(verdict.remarks)

    def drop(self, key: str, cause: str) -> None:
        self.dropped[cause] += 1
        keys = self.examples.setdefault(cause, [])
        if len(keys) < _EXAMPLES:
            keys.append(_printable(key))

    def add(self, later: "Tally") -> None:
        for name in vars(self).keys() - {"examples"}:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for cause, keys in later.examples.items():
            self.examples[cause] = (self.examples.get(cause, []) + keys)[:_EXAMPLES]


def _printable(name: str) -> str:
    """A name of a file or pair whose bytes may not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class ShardOutput:
    """The files of an input shard in the work folder.

    They are `array_record` with the records; `jsonl` with a line [key, [captions]] for each; `npz`
    with the arrays of `_FACTS`; and `json` with counts and a description of the first.
    """

    work: AnyPath
    number: int
    unique: bool = False

    def path(self, ending: str) -> AnyPath:
        return self.work / f"{'unique' if self.unique else 'shard'}-{self.number:05d}.{ending}"

    def is_done(self) -> bool:
        return self.path("json").exists()

    def read_facts(self, *names: str) -> list[np.ndarray]:
        with pairs.local_copy(self.path("npz")) as file, np.load(file) as arrays:
            return [arrays[name] for name in names]

    def read_done(self) -> tuple[Tally, FileInfo]:
        """(counts, description of the file of records)."""
        document = json.loads(self.path("json").read_text("utf-8"))
        counts = document["tally"]
        counts |= {name: Counter(counts[name]) for name in _COUNTERS}
        return Tally(**counts), FileInfo(**document["records"])


def process_shard(
    source: PairSource,
    shard: InputShard,
    number: int,
    work: AnyPath,
    table: dict[str, list[str]],
    rules: Rules,
) -> None:
    """Writes the output of an input shard, a function of these arguments and of the shard alone."""
    tally = Tally()
    records = judge_all(source.read(shard), shard.name, rules, EntitySet(table), tally)
    _write_output(ShardOutput(work, number), records, tally)


def judge_all(
    items: Iterable[RawPair | Damage], shard: str, rules: Rules, entities: EntitySet, tally: Tally
) -> Iterator[Record]:
    """The records of the pairs of a shard that are kept; `tally` counts all of them."""
    for item in items:
        if isinstance(item, Damage):
            tally.damage.append(_printable(f"{shard}: {item.what}"))
            continue
        verdict = judge(item, rules, entities)
        tally.count(item.key, verdict)
        if verdict.record is not None:
            yield verdict.record


def write_nouns(source: PairSource, shard: InputShard, path: AnyPath, rules: Rules) -> None:
    """Counts the nouns of one shard's captions into a file, unless it exists."""
    if not path.exists():
        counts = count_nouns(source.read(shard, images=False), rules)
        pairs.write_whole(path, json.dumps([counts.uses, counts.evidence]) + "\n")


def count_nouns(items: Iterable[RawPair | Damage], rules: Rules) -> NounCounts:
    """Counts the nouns of captions that pass the rules."""
    counts, finder = NounCounts(), noun_finder()
    for item in items:
        for caption in [] if isinstance(item, Damage) else clean_captions(item, rules):
            counts.add_caption(caption, finder)
    return counts


def read_nouns(paths: Iterable[AnyPath]) -> NounCounts:
    """The sum of the counts in several files."""
    total = NounCounts()
    for path in paths:
        uses, evidence = json.loads(path.read_text("utf-8"))
        total.uses.update(uses)
        total.evidence.update(evidence)
    return total


def drop_repeated(work: AnyPath, number: int, repeated: Sequence[int]) -> None:
    """Writes a shard's output again without the records at `repeated`, counted as duplicates."""
    shard, unique = ShardOutput(work, number), ShardOutput(work, number, unique=True)
    if unique.is_done():
        return
    tally, left_out = shard.read_done()[0], set(repeated)

    def kept() -> Iterator[Record]:
        with pairs.local_copy(shard.path("array_record")) as file:
            reader = array_record_module.ArrayRecordReader(str(file))
            for position in range(tally.kept):
                record = stored.unpack_record(reader.read())
                if position not in left_out:
                    yield record
                    continue
                tally.kept -= 1
                tally.captions -= len(record.captions)
                tally.drop(record.key, DUPLICATE)
            reader.close()

    _write_output(unique, kept(), tally)


def _write_output(output: ShardOutput, kept: Iterator[Record], tally: Tally) -> None:
    """Writes the files of a shard's output; `tally` is complete when the records are exhausted."""
    facts: dict[str, list[Any]] = {name: [] for name in _FACTS}
    with (
        pairs.whole_file(output.path("array_record")) as records_file,
        pairs.whole_file(output.path("jsonl")) as index_file,
        index_file.open("w", encoding="ascii") as index,
    ):
        writer = array_record_module.ArrayRecordWriter(str(records_file), _WRITER_OPTIONS)
        for number, record in enumerate(kept):
            writer.write(stored.pack_record(record))
            index.write(stored.index_line(record))
            facts["digests"].append(hashlib.blake2b(record.key.encode(), digest_size=16).digest())
            facts["words"].extend(text.count(" ") + 1 for text in record.captions)
            facts["records"].extend([number] * len(record.entities))
            facts["entities"].extend(record.entities)
        writer.close()
        info = describe_file(records_file, tally.kept, output.path("array_record").name)
    digests = np.frombuffer(b"".join(facts.pop("digests")), np.uint64).reshape(-1, 2)
    arrays = {name: np.asarray(values, np.int64) for name, values in facts.items()}
    with pairs.whole_file(output.path("npz")) as facts_file:
        np.savez(facts_file, digests=digests, **arrays)
    document = {"tally": vars(tally), "records": vars(info)}
    pairs.write_whole(output.path("json"), json.dumps(document) + "\n")


def find_repeated(work: AnyPath, shards: int) -> list[list[int]]:
    """For each finished shard, positions of records whose key an earlier record has, ascending."""
    if not shards:
        return []
    digests = [ShardOutput(work, n).read_facts("digests")[0] for n in range(shards)]
    starts = np.cumsum([0, *map(len, digests)])
    keys = np.concatenate(digests)
    # Stable: equal keys stay in the order of the records.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    repeated = np.sort(order[1:][(keys[1:] == keys[:-1]).all(axis=1)])
    sections = np.split(repeated, np.searchsorted(repeated, starts[1:-1]))
    return [(s - start).tolist() for s, start in zip(sections, starts[:-1], strict=True)]
