"""What one input shard becomes: a part, that is its records and what is known about them.

A part is four files in the work folder. The last to be written, `part-00000.json`, says that the
others are whole: a run that was killed makes the parts that lack it. A part with records whose
keys an earlier record has is written again without them, as `unique-00000`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_record.python import array_record_module

from ovseg_jax.data.caption_filter import CaptionFilter
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.manifest import FileInfo, describe_file
from ovseg_jax.data.prepare.inputs import DUPLICATE, Damage, InputShard, PairSource, RawPair
from ovseg_jax.data.prepare.paths import AnyPath, local_copy, whole_file, write_whole
from ovseg_jax.data.prepare.report import Tally
from ovseg_jax.data.prepare.rules import Rules, Verdict, judge
from ovseg_jax.data.records import Record, index_line, pack_record, unpack_record

PART_LAYOUT = 2  # changes when the files of a part do
# One record a group: reading one record never decodes its neighbors.
_WRITER_OPTIONS = "group_size:1"
# Arrays over the n records of a part -> shape and type.
_FACTS = {
    "digests": ((-1, 2), np.uint64),  # 128 bits of the hash of each key
    "sides": ((-1,), np.int64),  # length of each image's shorter side, in pixels
    "words": ((-1,), np.int64),  # number of words of each caption, of all records in order
    "records": ((-1,), np.int64),  # for each mention of an entity: the record's number in the part
    "entities": ((-1,), np.int64),  # and the entity
}


@dataclass(frozen=True)
class Part:
    """A part in the work folder.

    Its files are `array_record` with the records; `jsonl` with a line [key, [captions]] for each;
    `npz` with the arrays of `_FACTS`; and `json` with counts and a description of the first.
    """

    work: AnyPath
    number: int
    unique: bool = False

    def path(self, ending: str) -> AnyPath:
        """The file with this ending."""
        return self.work / f"{'unique' if self.unique else 'part'}-{self.number:05d}.{ending}"

    def is_done(self) -> bool:
        """Whether all files of the part are there."""
        return self.path("json").exists()

    def read_facts(self, *names: str) -> list[np.ndarray]:
        """Some of the arrays of `_FACTS`."""
        with local_copy(self.path("npz")) as file, np.load(file) as stored:
            return [stored[name] for name in names]

    def read_done(self) -> tuple[Tally, FileInfo]:
        """(counts, description of the file of records)."""
        document = json.loads(self.path("json").read_text("utf-8"))
        return Tally.from_json(document["tally"]), FileInfo(**document["records"])


def make_part(
    source: PairSource,
    shard: InputShard,
    number: int,
    work: AnyPath,
    table: dict[str, list[str]],
    rules: Rules,
) -> None:
    """Makes the part of one input shard: a function of its arguments and of the shard alone.

    Args:
      source: of the shard.
      shard: the input.
      number: of the shard; it names the part's files.
      work: the folder for them.
      table: the entities (`EntitySet.table`).
      rules: what a pair must pass.
    """
    tally = Tally()
    entities = CaptionFilter(EntitySet(table))
    verdicts = judge_all(source.read(shard), shard.name, rules, entities, tally)
    _write_part(Part(work, number), ((v.record, min(v.size)) for v in verdicts), tally)


def judge_all(
    items: Iterable[RawPair | Damage],
    shard: str,
    rules: Rules,
    entities: CaptionFilter,
    tally: Tally,
) -> Iterator[Verdict]:
    """The verdicts on the pairs of a shard that are kept; `tally` counts all of them."""
    for item in items:
        if isinstance(item, Damage):
            tally.damaged(shard, item.what)
            continue
        verdict = judge(item, rules, entities)
        tally.count(item.key, verdict)
        if verdict.record is not None:
            yield verdict


def make_unique(work: AnyPath, number: int, repeated: Sequence[int]) -> None:
    """Writes a part again without some of its records, which count as duplicates.

    Args:
      work: the folder with the part.
      number: of the part.
      repeated: positions of the records to leave out.
    """
    part, unique = Part(work, number), Part(work, number, unique=True)
    if unique.is_done():
        return
    tally, _ = part.read_done()
    (sides,) = part.read_facts("sides")

    def kept() -> Iterator[tuple[Record, int]]:
        with local_copy(part.path("array_record")) as file:
            reader = array_record_module.ArrayRecordReader(str(file))
            for position, side in enumerate(sides.tolist()):
                record = unpack_record(reader.read())
                if position in left_out:
                    tally.drop_kept(record.key, len(record.captions), DUPLICATE)
                else:
                    yield record, side
            reader.close()

    left_out = set(repeated)
    _write_part(unique, kept(), tally)


def _write_part(part: Part, kept: Iterator[tuple[Record, int]], tally: Tally) -> None:
    """Writes the files of a part.

    Args:
      part: which files.
      kept: the records, each with the length of its image's shorter side.
      tally: complete when `kept` is exhausted.
    """
    facts: dict[str, list[Any]] = {name: [] for name in _FACTS}
    with (
        whole_file(part.path("array_record")) as records_file,
        whole_file(part.path("jsonl")) as index_file,
        index_file.open("w", encoding="ascii") as index,
    ):
        writer = array_record_module.ArrayRecordWriter(str(records_file), _WRITER_OPTIONS)
        for number, (record, side) in enumerate(kept):
            writer.write(pack_record(record))
            index.write(index_line(record))
            facts["digests"].append(key_hash(record.key))
            facts["sides"].append(side)
            facts["words"].extend(text.count(" ") + 1 for text in record.captions)
            facts["records"].extend([number] * len(record.entities))
            facts["entities"].extend(record.entities)
        writer.close()
        info = describe_file(records_file, tally.kept, part.path("array_record").name)
    facts["digests"] = np.frombuffer(b"".join(facts["digests"]), np.uint64)
    with whole_file(part.path("npz")) as facts_file:
        arrays = {k: np.asarray(facts[k], d).reshape(s) for k, (s, d) in _FACTS.items()}
        np.savez(facts_file, **arrays)
    document = {"tally": tally.to_json(), "records": vars(info)}
    write_whole(part.path("json"), json.dumps(document) + "\n")


def key_hash(key: str) -> bytes:
    """16 bytes that stand for a key."""
    return hashlib.blake2b(key.encode("utf-8"), digest_size=16).digest()


def find_repeated(work: AnyPath, parts: int) -> list[list[int]]:
    """The records whose key an earlier record has.

    Takes about 60 bytes of memory a record.

    Args:
      work: the folder with the parts 0 to `parts` - 1, all finished.

    Returns:
      For each part, the positions of such records, ascending.
    """
    if not parts:
        return []
    digests = [Part(work, number).read_facts("digests")[0] for number in range(parts)]
    ends = np.cumsum([len(keys) for keys in digests])
    keys = np.concatenate(digests)
    # Stable: equal keys stay in the order of the records.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    repeated = np.sort(order[1:][(keys[1:] == keys[:-1]).all(axis=1)])
    sections = np.split(repeated, np.searchsorted(repeated, ends[:-1]))
    starts = ends - [len(part) for part in digests]
    return [(s - start).tolist() for s, start in zip(sections, starts, strict=True)]
