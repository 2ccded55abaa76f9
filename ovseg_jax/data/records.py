"""What one training example is on disk and in memory, and where records come from.

A *record source* is anything with the members of `RecordSource`. On disk, a folder of records
holds ArrayRecord shards, an index of keys and captions (`index.jsonl`), and `manifest.json`; one
that `ovseg_jax.prepare` wrote also an entity -> records index.
One stored record is the msgpack array `[1, key, caption, image, [entity ids]]`: a layout
version, two strings, bytes, and integers. Nothing in a folder is a pickle.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgpack
import numpy as np
from array_record.python import array_record_data_source

from ovseg_jax.data.manifest import (
    read_manifest,
    verify_files,
)
from ovseg_jax.data.pairs import PairIndex
from ovseg_jax.errors import UserError

RECORD_LAYOUT = 1
INDEX_NAME = "index.jsonl"
# Starts and records of a `PairIndex`.
ENTITY_INDEX_NAMES = ("entities.starts.npy", "entities.records.npy")


@dataclass(frozen=True)
class Record:
    """One image-caption pair.

    Attributes:
      image: the encoded image (PNG, JPEG, ...), exactly as it was found.
      caption: the text that came with the image.
      key: a name that is unique within its data set.
      entities: sorted ids of the entities that the caption names; empty when there are none.
    """

    image: bytes
    caption: str
    key: str
    entities: tuple[int, ...] = ()


@runtime_checkable
class RecordSource(Protocol):
    """Random access to the records of one data set.

    A source may also have `keys() -> list[str]`. Then everything that needs no image (the text
    caches, cached image features) is read without touching one.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def captions(self) -> list[str]:
        """Every caption in record order; cheaper than reading the records where it can be."""
        ...

    def fingerprint(self) -> str:
        """A short string that changes whenever a record would."""
        ...


def keys_of(source: RecordSource) -> list[str]:
    """Every key in record order, through `source.keys()` where the source has it."""
    keys = getattr(source, "keys", None)
    if callable(keys):
        return list(keys())
    return [source[index].key for index in range(len(source))]


def sample_captions(source: RecordSource, most: int) -> list[str]:
    """Up to about `most` captions, evenly spread over the records."""
    sample = getattr(source, "caption_sample", None)
    if callable(sample):
        return sample(most)
    captions = source.captions()
    return captions[:: max(1, len(captions) // most)]


def key_digest(keys: Iterable[str]) -> str:
    """SHA-256 of a list of keys, in order; lengths are hashed too, so that no two lists collide."""
    digest = hashlib.sha256()
    for key in keys:
        _add(digest, key.encode())
    return digest.hexdigest()


def pack_record(record: Record) -> bytes:
    """A record as bytes (see the module's docstring).

    Raises:
      UserError: the key or caption is not valid Unicode.
    """
    try:
        return msgpack.packb(
            [RECORD_LAYOUT, record.key, record.caption, record.image, list(record.entities)]
        )
    except UnicodeEncodeError as error:
        raise UserError(
            f"the caption or key of record {record.key!r} is not valid Unicode; drop the record"
        ) from error


def unpack_record(data: bytes) -> Record:
    """Inverse of `pack_record`.

    Raises:
      ValueError: the bytes are no record of this layout.
    """
    try:
        layout, key, caption, image, entities = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError("these bytes are no record") from error
    if layout != RECORD_LAYOUT:
        raise ValueError(f"record layout {layout!r} is not {RECORD_LAYOUT}")
    return Record(image=image, caption=caption, key=key, entities=tuple(entities))


def index_line(record: Record) -> str:
    """The line of a record in the index of a folder; ASCII."""
    return json.dumps([record.key, record.caption]) + "\n"


class MemorySource:
    """A list of records as a record source, for tests and small experiments."""

    def __init__(self, records: Sequence[Record], name: str = "memory"):
        self._records = list(records)
        self.name = name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def keys(self) -> list[str]:
        return [record.key for record in self._records]

    def captions(self) -> list[str]:
        return [record.caption for record in self._records]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for record in self._records:
            for part in (record.key.encode(), record.caption.encode(), record.image):
                _add(digest, part)
            _add(digest, repr(record.entities).encode())
        return digest.hexdigest()[:16]


class ArrayRecordSource:
    """A folder of records, read at random access. Can be pickled; files open on first use.

    Raises:
      UserError: the manifest or a shard is missing, cut short or changed (see `read_manifest`).
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.name = self.manifest.source
        self._reader: Any = None

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> Record:
        """Reads one record.

        Raises:
          IndexError: no such record.
          UserError: the shard is damaged at this record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.directory}")
        try:
            return unpack_record(self._data()[index])
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"record {index} of {self.directory} cannot be read ({error}): its shard is "
                "damaged; copy the shard again, or write the records again"
            ) from error

    def _data(self) -> array_record_data_source.ArrayRecordDataSource:
        if self._reader is None:
            # The counts are in the manifest, so no shard is opened before it is needed.
            self._reader = array_record_data_source.ArrayRecordDataSource(
                [f"{self.directory / s.file}[0:{s.count}]" for s in self.manifest.shards]
            )
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def verify(self) -> None:
        """Checks every byte of the folder against the manifest.

        Raises:
          UserError: naming the first file that differs.
        """
        verify_files(self.directory, self.manifest)

    def entity_index(self) -> PairIndex | None:
        """Entity -> records, on disk, for the entities of the manifest; None if not stored."""
        if not self.manifest.files:
            return None
        starts, records = (
            np.load(self.directory / name, mmap_mode="r") for name in ENTITY_INDEX_NAMES
        )
        return PairIndex(starts, records)

    def keys(self) -> list[str]:
        return [key for key, _ in self._index()]

    def captions(self) -> list[str]:
        return [caption for _, caption in self._index()]

    def caption_sample(self, most: int) -> list[str]:
        """Up to about `most` captions, evenly spread; unlike `captions()`, the rest is not kept."""
        step = max(1, len(self) // most)
        return [row[1] for number, row in enumerate(self._index()) if number % step == 0]

    def _index(self) -> Iterator[list[str]]:
        """[key, caption] of every record, after the keys were checked; one at a time in memory."""
        path = self.directory / self.manifest.index.file
        count = 0

        def keys(rows: Iterator[list[str]]) -> Iterator[str]:
            nonlocal count
            for row in rows:
                count += 1
                yield row[0]

        try:
            with path.open(encoding="ascii") as stream:
                digest = key_digest(keys(json.loads(line) for line in stream))
            if count != len(self) or digest != self.manifest.keys_sha256:
                raise ValueError("its keys are not those of the manifest")
            with path.open(encoding="ascii") as stream:
                yield from (json.loads(line) for line in stream)
        except (ValueError, TypeError, LookupError, OSError) as error:
            raise UserError(
                f"{path} is damaged ({error}); copy the file again, or write the records again"
            ) from error

    def fingerprint(self) -> str:
        return self.manifest.digest()[:16]


def _add(digest: Any, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
