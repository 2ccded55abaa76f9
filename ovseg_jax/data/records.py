"""Records, each an image with its captions, and the sources that they come from.

A *record source* is anything with the members of `RecordSource`. A folder of records on disk has
ArrayRecord shards, an index of keys and captions (`index.jsonl`) and `manifest.json`; a folder that
`ovseg_jax.prepare` wrote also has an entity -> records index. A stored record is the msgpack array
`[2, key, [captions], image, [entity ids]]`: a layout version, strings, bytes, and integers. Nothing
in a folder is a pickle. Layout 1, with a single caption in place of the list, is still read.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgpack
import numpy as np
from array_record.python import array_record_data_source

from ovseg_jax.data.captions import CLIP, fill
from ovseg_jax.data.manifest import CLASS_NAMES, read_manifest, verify_files
from ovseg_jax.errors import UserError

RECORD_LAYOUT = 2
INDEX_NAME = "index.jsonl"
# Starts and records of a `pairs.PairIndex`.
ENTITY_INDEX_NAMES = ("entities.starts.npy", "entities.records.npy")


@dataclass(frozen=True)
class Record:
    """An image with its captions, of which each epoch of training draws one.

    Attributes:
      image: the encoded image (PNG, JPEG, ...), byte for byte the original file.
      captions: the texts that came with the image, at least one: a tuple, or `ClassCaptions`.
      key: a name that is unique within its data set.
      entities: sorted ids of the entities that any of the captions names.

    Raises:
      ValueError: there is no caption, or a string in place of a tuple.
    """

    image: bytes
    captions: Sequence[str]
    key: str
    entities: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.captions, str) or not self.captions:
            raise ValueError(f"record {self.key!r} needs a tuple of captions, at least one")


@dataclass(frozen=True)
class ClassCaptions(Sequence[str]):
    """The captions of a photograph in a folder named after a class: each name in each template."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names) * len(self.templates)

    def __getitem__(self, number: Any) -> Any:
        return fill(self.templates[number % len(self.templates)], [self.name_in(number)])

    def name_in(self, number: int) -> str:
        """The name that caption `number` has in it."""
        return self.names[number // len(self.templates)]


@runtime_checkable
class RecordSource(Protocol):
    """Random access to the records of one data set.

    A source may also have `keys() -> list[str]`, so that a reader who needs no images (the text
    caches, cached image features) reads none; `caption_sample` (see `sample_captions`); and
    `find_pairs(entity_set)`, if it has another way to find partners than `pairs.find_pairs`.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def captions(self) -> list[Sequence[str]]:
        """The captions of every record, if possible without reading the records."""
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
    """Up to about `most` captions of records that are evenly spread, one from each record."""
    sample = getattr(source, "caption_sample", None)
    if callable(sample):
        return sample(most)
    captions = source.captions()
    return _one_of_each(captions[:: max(1, len(captions) // most)])


def _one_of_each(records: Iterable[Sequence[str]]) -> list[str]:
    # The first caption of the first record, the second of the second, and so on.
    return [captions[number % len(captions)] for number, captions in enumerate(records)]


def key_digest(keys: Iterable[str]) -> str:
    """SHA-256 of a list of keys in order, and of their lengths: no two lists are hashed alike."""
    digest = hashlib.sha256()
    for key in keys:
        _add(digest, key.encode())
    return digest.hexdigest()


def pack_record(record: Record) -> bytes:
    """A record as bytes (see the module's docstring).

    Raises:
      UserError: the key or a caption is not valid Unicode.
    """
    fields = [record.key, list(record.captions), record.image, list(record.entities)]
    try:
        return msgpack.packb([RECORD_LAYOUT, *fields])
    except UnicodeEncodeError as error:
        raise UserError(
            f"a caption or the key of record {record.key!r} is not valid Unicode; drop the record"
        ) from error


def unpack_record(data: bytes) -> Record:
    """Inverse of `pack_record`; reads layout 1 too.

    Raises:
      ValueError: the bytes are no record of these layouts.
    """
    try:
        layout, key, captions, image, entities = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError("these bytes are no record") from error
    if layout == 1:
        captions = [captions]
    elif layout != RECORD_LAYOUT or not isinstance(captions, list):
        raise ValueError(f"this is no record of layout 1 or {RECORD_LAYOUT}")
    return Record(image=image, captions=tuple(captions), key=key, entities=tuple(entities))


def index_line(record: Record) -> str:
    """The line of a record in the index of a folder; ASCII."""
    return json.dumps([record.key, list(record.captions)]) + "\n"


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

    def captions(self) -> list[Sequence[str]]:
        return [record.captions for record in self._records]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for record in self._records:
            for text in (record.key, *record.captions):
                _add(digest, text.encode())
            _add(digest, record.image)
            _add(digest, repr(record.entities).encode())
        return digest.hexdigest()[:16]


class ArrayRecordSource:
    """A folder of records at random access. Can be pickled; it opens the files on first use.

    Args:
      name_templates: for class names, in a folder that has these in place of captions.

    Raises:
      UserError: the manifest or a shard is missing, cut short or changed (see `read_manifest`).
    """

    def __init__(self, directory: str | Path, name_templates: Sequence[str] = CLIP):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.name = self.manifest.source
        self._templates = tuple(name_templates)
        # Names -> their captions, the same object for all photographs of a class.
        self._of_class: dict[tuple[str, ...], ClassCaptions] = {}
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
            record = unpack_record(self._data()[index])
            return replace(record, captions=self._as_captions(record.captions))
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"record {index} of {self.directory} cannot be read ({error}): its shard is "
                "damaged; copy the shard again, or write the records again"
            ) from error

    def _as_captions(self, stored: Sequence[str]) -> Sequence[str]:
        """The captions that stored ones stand for."""
        texts = tuple(stored)
        if self.manifest.captions != CLASS_NAMES:
            return texts
        return self._of_class.setdefault(texts, ClassCaptions(texts, self._templates))

    def _data(self) -> array_record_data_source.ArrayRecordDataSource:
        if self._reader is None:
            # With the counts from the manifest, the reader opens no shard before it is needed.
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

    def entity_index(self) -> tuple[np.ndarray, ...] | None:
        """The arrays of a `pairs.PairIndex` of the manifest's entities; None if not stored."""
        if not self.manifest.files:
            return None
        return tuple(np.load(self.directory / name, mmap_mode="r") for name in ENTITY_INDEX_NAMES)

    def keys(self) -> list[str]:
        return [key for key, _ in self._index()]

    def captions(self) -> list[Sequence[str]]:
        return [captions for _, captions in self._index()]

    def caption_sample(self, most: int) -> list[str]:
        """See `sample_captions`; keeps only the sample in memory."""
        step = max(1, len(self) // most)
        every = itertools.islice(self._index(), 0, None, step)
        return _one_of_each(captions for _, captions in every)

    def _index(self) -> Iterator[tuple[str, Sequence[str]]]:
        """(key, captions) of every record, after the keys were checked; one at a time in memory."""
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
                for key, captions in map(json.loads, stream):
                    # Version 2 of the manifest has the caption itself in place of the list.
                    listed = [captions] if isinstance(captions, str) else captions
                    yield key, self._as_captions(listed)
        except (ValueError, TypeError, LookupError, OSError) as error:
            raise UserError(
                f"{path} is damaged ({error}); copy the file again, or write the records again"
            ) from error

    def fingerprint(self) -> str:
        # Without the templates: caches of images do not depend on them, and caches of texts have
        # the captions in their key.
        return self.manifest.digest()[:16]


def _add(digest: Any, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
