"""Records, each an image with its captions, and the folders that hold them.

A folder has ArrayRecord shards, an index of keys and captions (`index.jsonl`), `manifest.json`,
which is checked first, and where `prepare` wrote it an entity -> records index. A stored record is
the msgpack array `[2, key, [captions], image, [entity ids]]`, beginning with its layout; nothing is
a pickle. Layout 1, with a single caption, is still read.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgpack
import numpy as np
from array_record.python import array_record_data_source

from ovseg_jax.data.tokenizer import CLIP_TEMPLATES, fill
from ovseg_jax.errors import UserError

RECORD_LAYOUT = 2
INDEX_NAME = "index.jsonl"
# Starts and records of a `order.PairIndex`.
ENTITY_INDEX_NAMES = ("entities.starts.npy", "entities.records.npy")
MANIFEST_NAME = "manifest.json"
FORMAT = "ovseg_jax records"
VERSION = 3
TEXTS, CLASS_NAMES = "texts", "class_names"  # what `Manifest.captions` may say
_AGAIN = "copy the file again, or write the records again into an empty folder"
# What reading damaged JSON raises: RecursionError for "[[[[...".
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError)
MOST_NAMES = 4  # names of a class that are told apart; `ovseg_jax.prepare` gives no more


@dataclass(frozen=True)
class Record:
    """An image with its captions, of which each epoch of training draws one.

    Attributes:
      image: the encoded image (PNG, JPEG, ...), byte for byte the original file.
      captions: the texts that came with the image, at least one: a tuple, or `ClassCaptions`.
      key: a name that is unique within its data set.
      entities: sorted ids of the entities that any of the captions names.
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

    Keys and captions are in record order, if possible without reading the records. The fingerprint
    is a short string that changes whenever a record would. A source may also have `caption_sample`
    (see `sample_captions`), and `find_pairs(entity_set)` if it has another way to find partners
    than `order.find_pairs`.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def keys(self) -> list[str]: ...

    def captions(self) -> list[Sequence[str]]: ...

    def fingerprint(self) -> str: ...


def sample_captions(source: RecordSource, most: int) -> list[str]:
    """Up to about `most` captions of records that are evenly spread, one from each record."""
    if hasattr(source, "caption_sample"):
        return source.caption_sample(most)
    captions = source.captions()
    return _spread(captions[:: max(1, len(captions) // most)])


def _spread(records: Iterable[Sequence[str]]) -> list[str]:
    """The first caption of the first record, the second of the second, and so on."""
    return [captions[number % len(captions)] for number, captions in enumerate(records)]


def key_digest(keys: Iterable[str]) -> str:
    """SHA-256 of a list of keys in order, and of their lengths: no two lists are hashed alike."""
    digest = hashlib.sha256()
    for key in map(str.encode, keys):
        digest.update(len(key).to_bytes(8, "little") + key)
    return digest.hexdigest()


def pack_record(record: Record) -> bytes:
    """A record as bytes; a UserError where the key or a caption is not valid Unicode."""
    fields = [record.key, list(record.captions), record.image, list(record.entities)]
    try:
        return msgpack.packb([RECORD_LAYOUT, *fields])
    except UnicodeEncodeError as error:
        raise UserError(f"record {record.key!r} has text that is not Unicode; drop it") from error


def unpack_record(data: bytes) -> Record:
    """Inverse of `pack_record`; reads layout 1 too. A ValueError where the bytes are no record."""
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


# ---- folders of records


@dataclass(frozen=True)
class FileInfo:
    """A file of the set: its name, the records in it, its size in bytes and its SHA-256."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that identifies a folder of records.

    Attributes:
      count: number of records over all shards.
      shards: the ArrayRecord files in record order.
      index: the file with one `[key, [captions]]` a line, in record order.
      entities: entity name -> surface forms, in id order.
      source, source_fingerprint: name and fingerprint of the source that was written.
      keys_sha256: the `key_digest` of all keys.
      tool: program and version that wrote the folder.
      files: further files: the entity -> records index, where there is one.
      captions: "texts", or "class_names" that training puts into templates.
      version: of the layout. Version 2, with one caption for each record, is still read.
    """

    count: int
    shards: tuple[FileInfo, ...]
    index: FileInfo
    entities: dict[str, list[str]]
    source: str
    source_fingerprint: str
    keys_sha256: str
    tool: str
    files: tuple[FileInfo, ...] = ()
    captions: str = TEXTS
    version: int = VERSION

    def everything(self) -> tuple[FileInfo, ...]:
        """Every file of the folder but the manifest."""
        return (*self.shards, self.index, *self.files)

    def digest(self) -> str:
        """SHA-256 of the manifest; it is stored in the file, so that an edited one is noticed."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()

    def fields(self) -> dict[str, Any]:
        """What is stored after the version."""
        fields = asdict(self)
        if fields.pop("version") == 2:
            del fields["captions"]
        return fields


def describe_file(path: Path, count: int, name: str | None = None) -> FileInfo:
    """Measures a finished file, which will have the name `name`."""
    return FileInfo(name or path.name, count, path.stat().st_size, file_digest(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """The content of the manifest's file."""
    document = {"format": FORMAT, "version": manifest.version}
    document |= {"manifest_sha256": manifest.digest(), **manifest.fields()}
    return json.dumps(document, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks the manifest, and the presence and size of every file that it names."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        missing = f"there is no folder of records at {directory}: no {MANIFEST_NAME}"
        raise UserError(f"{missing}; check the path, or write the records with ovseg_jax.prepare")
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT or document["version"] not in (2, VERSION):
            raise ValueError(f"{document['format']!r}, version {document['version']}, is not read")
        known = {name: document[name] for name in Manifest.__annotations__ if name in document}
        files = {name: tuple(FileInfo(**f) for f in document[name]) for name in ("shards", "files")}
        manifest = Manifest(**known | files | {"index": FileInfo(**document["index"])})
        if manifest.count != sum(shard.count for shard in manifest.shards):
            raise ValueError(f"the shards' counts do not add up to {manifest.count}")
        if manifest.digest() != document["manifest_sha256"]:
            raise ValueError("it was changed after it was written")
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be used ({error}); {_AGAIN}") from error
    for info in manifest.everything():
        _check_file(directory / info.file, info)
    return manifest


def _check_file(path: Path, info: FileInfo) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise UserError(f"{path} is missing; {_AGAIN}")
    if size != info.bytes:
        wrong = f"{path} was cut short or changed: it has {size} and not {info.bytes} bytes"
        raise UserError(f"{wrong}; {_AGAIN}")


class ArrayRecordSource:
    """A folder of records at random access. It can be pickled, and opens files on first use."""

    def __init__(self, directory: str | Path, name_templates: Sequence[str] = CLIP_TEMPLATES):
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
        """Reads a record; a UserError where the shard is damaged at this record."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.directory}")
        if self._reader is None:
            # With the counts from the manifest, the reader opens no shard before it is needed.
            self._reader = array_record_data_source.ArrayRecordDataSource(
                [f"{self.directory / s.file}[0:{s.count}]" for s in self.manifest.shards]
            )
        try:
            record = unpack_record(self._reader[index])
        except (ValueError, RuntimeError, OSError) as error:
            where = f"record {index} of {self.directory}: its shard is damaged ({error})"
            raise UserError(f"{where}; {_AGAIN}") from error
        return replace(record, captions=self._as_captions(record.captions))

    def _as_captions(self, stored: Sequence[str]) -> Sequence[str]:
        texts = tuple(stored)
        if self.manifest.captions != CLASS_NAMES:
            return texts
        return self._of_class.setdefault(texts, ClassCaptions(texts, self._templates))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def verify(self) -> None:
        """Compares every byte with the manifest; a UserError names the first file that differs."""
        for info in self.manifest.everything():
            path = self.directory / info.file
            _check_file(path, info)
            if file_digest(path) != info.sha256:
                raise UserError(f"{path} was changed after it was written; {_AGAIN}")

    def entity_index(self) -> tuple[np.ndarray, ...] | None:
        """The arrays of a `order.PairIndex` of the manifest's entities; None if not stored."""
        if not self.manifest.files:
            return None
        return tuple(np.load(self.directory / name, mmap_mode="r") for name in ENTITY_INDEX_NAMES)

    def keys(self) -> list[str]:
        return [key for key, _ in self._index()]

    def captions(self) -> list[Sequence[str]]:
        return [captions for _, captions in self._index()]

    def caption_sample(self, most: int) -> list[str]:
        """See `sample_captions`; keeps only the sample in memory."""
        every = itertools.islice(self._index(), 0, None, max(1, len(self) // most))
        return _spread(captions for _, captions in every)

    def _index(self) -> Iterator[tuple[str, Sequence[str]]]:
        """(key, captions) of every record, after the keys were checked; one at a time in memory."""
        path = self.directory / self.manifest.index.file
        try:
            with path.open("rb") as lines:
                if key_digest(json.loads(line)[0] for line in lines) != self.manifest.keys_sha256:
                    raise ValueError("its keys are not those of the manifest")
            with path.open("rb") as lines:
                for key, captions in map(json.loads, lines):
                    # Version 2 of the manifest has the caption itself in place of the list.
                    listed = [captions] if isinstance(captions, str) else captions
                    yield key, self._as_captions(listed)
        except _DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}); {_AGAIN}") from error

    def fingerprint(self) -> str:
        # Without the templates: caches of images do not depend on them, and caches of texts have
        # the captions in their key.
        return self.manifest.digest()[:16]
