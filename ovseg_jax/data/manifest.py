"""The manifest of a folder of records: what the folder must hold, checked before it is used."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ovseg_jax.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = "ovseg_jax records"
VERSION = 3
# What `Manifest.captions` may say.
TEXTS, CLASS_NAMES = "texts", "class_names"


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
      source: name of the source that was written.
      source_fingerprint: the fingerprint of that source.
      keys_sha256: digest of the key list (`records.key_digest`).
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
        text = json.dumps(self.fields(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

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
    return json.dumps(document, indent=1, ensure_ascii=True) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks the manifest and the presence and size of every file that it names.

    Raises:
      UserError: the folder or a file is missing, cut short, or was changed after it was written.
    """
    path = directory / MANIFEST_NAME
    again = "write the records again into an empty folder"
    if not directory.is_dir():
        raise UserError(f"there is no folder of records at {directory}; check the path")
    if not path.is_file():
        raise UserError(
            f"{directory} has no {MANIFEST_NAME}, so it is no finished folder of records; {again}"
        )
    try:
        document = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); {again}") from error
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of records; check the path")
    if document.get("version") not in (2, VERSION):
        raise UserError(
            f"{path} has layout version {document.get('version')!r}, this program reads 2 and "
            f"{VERSION}; {again}"
        )
    manifest = _parse(document, path)
    if manifest.digest() != document.get("manifest_sha256"):
        raise UserError(f"{path} was changed after it was written; restore it, or {again}")
    for info in manifest.everything():
        _check_file(directory / info.file, info)
    return manifest


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compares the content of every file with its digest; reads everything once.

    Raises:
      UserError: naming the first file that differs.
    """
    for info in manifest.everything():
        path = directory / info.file
        _check_file(path, info)
        if file_digest(path) != info.sha256:
            raise UserError(
                f"{path} was changed after it was written; copy the file again, or write the "
                "records again into an empty folder"
            )


def _check_file(path: Path, info: FileInfo) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; copy the file, or write the records again")
    size = path.stat().st_size
    if size != info.bytes:
        raise UserError(
            f"{path} has {size} bytes and should have {info.bytes}: it was cut short or changed; "
            "copy the file again, or write the records again"
        )


def _parse(document: Mapping[str, Any], path: Path) -> Manifest:
    try:
        manifest = Manifest(
            count=document["count"],
            shards=tuple(FileInfo(**shard) for shard in document["shards"]),
            index=FileInfo(**document["index"]),
            entities={name: list(forms) for name, forms in document["entities"].items()},
            source=document["source"],
            source_fingerprint=document["source_fingerprint"],
            keys_sha256=document["keys_sha256"],
            tool=document["tool"],
            files=tuple(FileInfo(**info) for info in document["files"]),
            captions=TEXTS if document["version"] == 2 else document["captions"],
            version=document["version"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} lacks a field or has a wrong one ({error}); restore it, or write the records "
            "again into an empty folder"
        ) from error
    if manifest.count != sum(shard.count for shard in manifest.shards):
        raise UserError(
            f"{path}: the shards' counts do not add up to {manifest.count}; restore the file, or "
            "write the records again into an empty folder"
        )
    return manifest
