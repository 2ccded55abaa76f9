"""What one input shard becomes: a part, that is its records and what is known about them.

A part is four files in the work folder. The last to be written, `part-00000.json`, says that the
others are whole: a run that was killed goes on with the first shard that lacks it.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int64, UInt64

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.manifest import FileInfo, describe_file
from ovseg_jax.data.prepare.places import Place
from ovseg_jax.data.prepare.raw import Damage, InputShard, PairSource
from ovseg_jax.data.prepare.rules import Rules, judge
from ovseg_jax.data.prepare.staging import local, whole, write_whole
from ovseg_jax.data.prepare.tally import Tally
from ovseg_jax.data.records import index_line, pack_record

# One record a group: reading one record never decodes its neighbors.
WRITER_OPTIONS = "group_size:1"


@dataclass(frozen=True)
class PartPaths:
    """The files of part `number`."""

    work: Place
    number: int

    def _file(self, ending: str) -> Place:
        return self.work / f"part-{self.number:05d}.{ending}"

    @property
    def records(self) -> Place:
        """The ArrayRecord file."""
        return self._file("array_record")

    @property
    def index(self) -> Place:
        """One [key, [captions]] a line, as in the finished folder."""
        return self._file("jsonl")

    @property
    def facts(self) -> Place:
        """`Facts`, as .npz."""
        return self._file("npz")

    @property
    def done(self) -> Place:
        """Counts, and what the records' file must be."""
        return self._file("json")


@dataclass(frozen=True)
class Facts:
    """What is known about the n records of a part.

    Attributes:
      digests: 128 bits of each key's hash.
      entities: the entity ids of all records, one after another.
      ends: where those of each record end.
      words: blank-separated pieces of each caption, those of all records one after another.
      word_ends: where the captions of each record end in `words`.
      sides: length of each image's shorter side, in pixels.
    """

    digests: UInt64[np.ndarray, "n 2"]
    entities: Int64[np.ndarray, "mentions"]
    ends: Int64[np.ndarray, "n"]
    words: Int64[np.ndarray, "captions"]
    word_ends: Int64[np.ndarray, "n"]
    sides: Int64[np.ndarray, "n"]

    def mentions(self) -> tuple[Int64[np.ndarray, "mentions"], Int64[np.ndarray, "mentions"]]:
        """(record, entity) of every mention, in record order."""
        counts = np.diff(self.ends, prepend=0)
        return np.repeat(np.arange(len(self.ends)), counts), self.entities


def read_facts(paths: PartPaths) -> Facts:
    """The facts of a finished part."""
    with local(paths.facts) as file, np.load(file) as stored:
        return Facts(**stored)


def read_digests(paths: PartPaths) -> UInt64[np.ndarray, "n 2"]:
    """The digests alone of a finished part."""
    with local(paths.facts) as file, np.load(file) as stored:
        return stored["digests"]


def read_done(paths: PartPaths) -> tuple[Tally, FileInfo]:
    """(counts, description of the records' file) of a finished part."""
    document = json.loads(paths.done.read_text("utf-8"))
    return Tally.from_json(document["tally"]), FileInfo(**document["records"])


def make_part(
    source: PairSource,
    shard: InputShard,
    number: int,
    work: Place,
    table: dict[str, list[str]],
    rules: Rules,
) -> int:
    """Makes the part of one input shard: a function of its arguments and of the shard alone.

    Args:
      number: of the shard, which names the part's files.
      work: the folder for them.
      table: the entities (`EntitySet.table`).

    Returns:
      How many pairs were read.
    """
    paths = PartPaths(work, number)
    if paths.done.exists():
        paths.done.unlink()
    entities = EntitySet(table)
    tally = Tally()
    columns: dict[str, list[Any]] = {name: [] for name in Facts.__annotations__}
    with (
        whole(paths.records) as records_file,
        whole(paths.index) as index_file,
        index_file.open("w", encoding="ascii") as index,
    ):
        writer = array_record_module.ArrayRecordWriter(str(records_file), WRITER_OPTIONS)
        for item in source.read(shard):
            if isinstance(item, Damage):
                tally.damaged(shard.name, item.what)
                continue
            verdict = judge(item, rules, entities)
            record = verdict.record
            if record is None:
                tally.drop(item.key, verdict.cause)
                continue
            tally.keep(len(record.captions), verdict.dropped, verdict.remarks)
            writer.write(pack_record(record))
            index.write(index_line(record))
            columns["digests"].append(key_hash(record.key))
            columns["entities"].extend(record.entities)
            columns["ends"].append(len(columns["entities"]))
            columns["words"].extend(text.count(" ") + 1 for text in record.captions)
            columns["word_ends"].append(len(columns["words"]))
            columns["sides"].append(min(verdict.size))
        writer.close()
        records = describe_file(records_file, tally.kept, paths.records.name)
    with whole(paths.facts) as facts_file:
        np.savez(
            facts_file,
            digests=np.frombuffer(b"".join(columns.pop("digests")), np.uint64).reshape(-1, 2),
            **{name: np.asarray(values, np.int64) for name, values in columns.items()},
        )
    document = {"tally": tally.to_json(), "records": vars(records)}
    write_whole(paths.done, json.dumps(document) + "\n")
    return tally.read


def key_hash(key: str) -> bytes:
    """16 bytes that stand for a key."""
    return hashlib.blake2b(key.encode("utf-8"), digest_size=16).digest()
