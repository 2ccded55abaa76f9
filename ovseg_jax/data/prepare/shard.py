"""What an input shard becomes: its records, and what the finished folder needs to know about them.

The output of a shard is four files in the work folder. `shard-00000.json` is written last and says
that the others are whole: a run that was killed repeats the shards that lack it. An output with
records whose keys an earlier record has is written again without them, as `unique-00000`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from array_record.python import array_record_module

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare.inputs import (
    AnyPath,
    Damage,
    InputShard,
    PairSource,
    RawPair,
    local_copy,
    whole_file,
    write_whole,
)
from ovseg_jax.data.prepare.rules import DUPLICATE, Rules, Verdict, clean_captions, judge
from ovseg_jax.data.records import (
    FileInfo,
    Record,
    describe_file,
    index_line,
    pack_record,
    unpack_record,
)
from ovseg_jax.data.words import NounCounts, noun_finder

WORK_LAYOUT = 2  # changes when these files do
# Keys shown for each cause, so that a person can look one up.
_EXAMPLES = 5
# One record a group: reading one record never decodes its neighbors.
_WRITER_OPTIONS = "group_size:1"
# Arrays of a shard with n records.
_FACTS = (
    "digests",  # [n, 2] 128 bits of the hash of each key
    "sides",  # [n] length of each image's shorter side, in pixels
    "words",  # number of words of each caption, of all records in order
    "records",  # for each mention of an entity: the record's number in the shard
    "entities",  # and the entity
)


@dataclass
class Tally:
    """Counts of pairs: `read` = `kept` + all that was dropped.

    Attributes:
      captions: of the pairs that are kept, the captions that are kept.
      captions_dropped: cause -> captions of kept pairs that are dropped.
      dropped: cause -> pairs.
      examples: cause -> the first keys.
      remarks: what was unusual about pairs that passed the rules (duplicates too) -> pairs.
      damage: what was wrong with whole shards, in words.
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
        """Counts a pair that was judged."""
        self.read += 1
        if verdict.record is None:
            self._drop(key, verdict.cause)
            return
        self.kept += 1
        self.captions += len(verdict.record.captions)
        self.captions_dropped.update(verdict.dropped)
        self.remarks.update(verdict.remarks)

    def drop_kept(self, key: str, captions: int, cause: str) -> None:
        """Counts a pair as dropped that was counted as kept with so many captions."""
        self.kept -= 1
        self.captions -= captions
        self._drop(key, cause)

    def _drop(self, key: str, cause: str) -> None:
        self.dropped[cause] += 1
        keys = self.examples.setdefault(cause, [])
        if len(keys) < _EXAMPLES:
            keys.append(_printable(key))

    def add(self, later: "Tally") -> None:
        """Adds the counts of a later shard."""
        for name in (
            "read",
            "kept",
            "captions",
            "captions_dropped",
            "dropped",
            "remarks",
            "damage",
        ):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for cause, keys in later.examples.items():
            self.examples[cause] = (self.examples.get(cause, []) + keys)[:_EXAMPLES]

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Tally":
        """Inverse of `vars`, through JSON."""
        counters = ("captions_dropped", "dropped", "remarks")
        return cls(**document | {name: Counter(document[name]) for name in counters})


def _printable(name: str) -> str:
    """A name of a file or pair whose bytes may not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class ShardOutput:
    """The output of an input shard in the work folder, four files.

    They are `array_record` with the records; `jsonl` with a line [key, [captions]] for each; `npz`
    with the arrays of `_FACTS`; and `json` with counts and a description of the first.
    """

    work: AnyPath
    number: int
    unique: bool = False

    def path(self, ending: str) -> AnyPath:
        """The file with this ending."""
        return self.work / f"{'unique' if self.unique else 'shard'}-{self.number:05d}.{ending}"

    def is_done(self) -> bool:
        """Whether all four files are there."""
        return self.path("json").exists()

    def read_facts(self, *names: str) -> list[np.ndarray]:
        """Some of the arrays of `_FACTS`."""
        with local_copy(self.path("npz")) as file, np.load(file) as stored:
            return [stored[name] for name in names]

    def read_done(self) -> tuple[Tally, FileInfo]:
        """(counts, description of the file of records)."""
        document = json.loads(self.path("json").read_text("utf-8"))
        return Tally.from_json(document["tally"]), FileInfo(**document["records"])


def process_shard(
    source: PairSource,
    shard: InputShard,
    number: int,
    work: AnyPath,
    table: dict[str, list[str]],
    rules: Rules,
) -> None:
    """Writes the output of an input shard, a function of these arguments and of the shard alone.

    `number` names the files in the folder `work`; `table` has the entities (`EntitySet.table`).
    """
    tally = Tally()
    verdicts = judge_all(source.read(shard), shard.name, rules, EntitySet(table), tally)
    _write_output(ShardOutput(work, number), ((v.record, min(v.size)) for v in verdicts), tally)


def judge_all(
    items: Iterable[RawPair | Damage],
    shard: str,
    rules: Rules,
    entities: EntitySet,
    tally: Tally,
) -> Iterator[Verdict]:
    """The verdicts on the pairs of a shard that are kept; `tally` counts all of them."""
    for item in items:
        if isinstance(item, Damage):
            tally.damage.append(_printable(f"{shard}: {item.what}"))
            continue
        verdict = judge(item, rules, entities)
        tally.count(item.key, verdict)
        if verdict.record is not None:
            yield verdict


def write_nouns(source: PairSource, shard: InputShard, path: AnyPath, rules: Rules) -> None:
    """Counts the nouns of one shard's captions into a file, unless it exists."""
    if not path.exists():
        counts = count_nouns(source.read(shard, images=False), rules)
        write_whole(path, json.dumps([counts.uses, counts.evidence]) + "\n")


def count_nouns(pairs: Iterable[RawPair | Damage], rules: Rules) -> NounCounts:
    """Counts the nouns of captions that pass the rules."""
    counts, finder = NounCounts(), noun_finder()
    for pair in pairs:
        for caption in [] if isinstance(pair, Damage) else clean_captions(pair, rules):
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
    tally, _ = shard.read_done()
    (sides,) = shard.read_facts("sides")

    def kept() -> Iterator[tuple[Record, int]]:
        with local_copy(shard.path("array_record")) as file:
            reader = array_record_module.ArrayRecordReader(str(file))
            for position, side in enumerate(sides.tolist()):
                record = unpack_record(reader.read())
                if position in left_out:
                    tally.drop_kept(record.key, len(record.captions), DUPLICATE)
                else:
                    yield record, side
            reader.close()

    left_out = set(repeated)
    _write_output(unique, kept(), tally)


def _write_output(output: ShardOutput, kept: Iterator[tuple[Record, int]], tally: Tally) -> None:
    """Writes the files of a shard's output.

    `kept` are the records, each with the length of its image's shorter side. `tally` is complete
    when they are exhausted.
    """
    facts: dict[str, list[Any]] = {name: [] for name in _FACTS}
    with (
        whole_file(output.path("array_record")) as records_file,
        whole_file(output.path("jsonl")) as index_file,
        index_file.open("w", encoding="ascii") as index,
    ):
        writer = array_record_module.ArrayRecordWriter(str(records_file), _WRITER_OPTIONS)
        for number, (record, side) in enumerate(kept):
            writer.write(pack_record(record))
            index.write(index_line(record))
            facts["digests"].append(hashlib.blake2b(record.key.encode(), digest_size=16).digest())
            facts["sides"].append(side)
            facts["words"].extend(text.count(" ") + 1 for text in record.captions)
            facts["records"].extend([number] * len(record.entities))
            facts["entities"].extend(record.entities)
        writer.close()
        info = describe_file(records_file, tally.kept, output.path("array_record").name)
    digests = np.frombuffer(b"".join(facts.pop("digests")), np.uint64).reshape(-1, 2)
    arrays = {name: np.asarray(values, np.int64) for name, values in facts.items()}
    with whole_file(output.path("npz")) as facts_file:
        np.savez(facts_file, digests=digests, **arrays)
    document = {"tally": vars(tally), "records": vars(info)}
    write_whole(output.path("json"), json.dumps(document) + "\n")


def find_repeated(work: AnyPath, shards: int) -> list[list[int]]:
    """For each shard, the ascending positions of records whose key an earlier record has.

    The shards 0 to `shards` - 1 are finished. Takes about 60 bytes of memory a record.
    """
    if not shards:
        return []
    digests = [ShardOutput(work, n).read_facts("digests")[0] for n in range(shards)]
    counts = [len(keys) for keys in digests]
    ends = np.cumsum(counts)
    keys = np.concatenate(digests)
    # Stable: equal keys stay in the order of the records.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    repeated = np.sort(order[1:][(keys[1:] == keys[:-1]).all(axis=1)])
    sections = np.split(repeated, np.searchsorted(repeated, ends[:-1]))
    starts = ends - counts
    return [(s - start).tolist() for s, start in zip(sections, starts, strict=True)]
