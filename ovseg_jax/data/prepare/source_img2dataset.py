"""Folders that img2dataset wrote in its webdataset format: 00000.tar and 00000.parquet.

In the tar, KEY.jpg, KEY.txt and KEY.json stand next to one another for each image that was
downloaded. The parquet file has one row a URL, those that failed included. The caption in KEY.json
and in the parquet file may be a list of several.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.places import Place, files_below, is_file, place, reached, size_of
from ovseg_jax.data.prepare.raw import Damage, InputShard, RawPair
from ovseg_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_COLUMNS = ("key", "caption", "status")
# img2dataset before 1.5 stored keys as numbers.
_KEY_DIGITS = 9
_DAMAGED = (tarfile.TarError, EOFError)


@dataclass(frozen=True)
class _Row:
    """What the parquet file says about a pair."""

    captions: tuple[str, ...]
    downloaded: bool


class Img2DatasetSource:
    """All tars below a folder, in the order of their paths.

    Raises:
      UserError: no such folder, or no tar in it.
    """

    def __init__(self, directory: str | Place):
        self.directory = place(directory)
        self.name = "img2dataset"
        if not self.directory.is_dir():
            raise UserError(f"there is no folder {self.directory}; check --source")
        if not next(files_below(self.directory, ".tar"), None):
            raise UserError(
                f"there is no .tar file below {self.directory}: img2dataset writes them with "
                "--output_format=webdataset"
            )

    def shards(self) -> list[InputShard]:
        tars = sorted(files_below(self.directory, ".tar"), key=lambda item: item[0])
        return [InputShard(name, 0, size_of(path)) for name, path in tars]

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair | Damage]:
        path = self.directory / shard.name
        rows, complaint = _metadata(path.with_suffix(".parquet"))
        if complaint:
            yield Damage(complaint)
        seen = set()
        for item in _samples(path, images):
            if isinstance(item, Damage):
                yield item
                continue
            key, files = item
            # A tar that was packed again has folders before the names.
            listed = key if key in rows else key.rpartition("/")[2]
            if files is None:  # begun, and cut off by the end of the tar
                if listed not in rows:
                    yield RawPair(key, cause=causes.LOST)
                continue
            seen.add(listed)
            row = rows.get(listed)
            image = next((files[k] for k in IMAGES if images and k in files), None)
            yield RawPair(key, _captions(files, row.captions if row else ()), image)
        for key, row in rows.items():
            if key not in seen:
                cause = causes.LOST if row.downloaded else causes.NOT_DOWNLOADED
                yield RawPair(key, row.captions, cause=cause)


def _captions(files: dict[str, bytes], listed: tuple[str, ...]) -> tuple[str | bytes, ...]:
    """The texts of a pair: several in KEY.json, KEY.txt, one in KEY.json, or the parquet file's."""
    try:
        caption = json.loads(files.get("json", b"{}")).get("caption")
    except (ValueError, AttributeError):
        caption = None
    if "txt" in files and not isinstance(caption, list):
        return (files["txt"],)
    return _texts(caption) or listed


def _texts(caption: Any) -> tuple[str, ...]:
    """A caption, or the captions of a list."""
    listed = caption if isinstance(caption, list) else [caption]
    return tuple(text for text in listed if isinstance(text, str))


def _samples(path: Place, images: bool) -> Iterator[tuple[str, dict[str, bytes] | None] | Damage]:
    """(key, extension -> content) of neighboring members of a tar that differ in extension alone.

    The content is None for a pair that the end of a damaged tar cuts off.
    """
    wanted = (*IMAGES, *_TEXTS) if images else _TEXTS
    key, files, count = "", {}, 0
    try:
        with (
            reached(path, *_DAMAGED),
            path.open("rb") as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            for member in archive:
                archive.members.clear()  # or the list grows with the file
                if not member.isfile():
                    continue
                prefix, kind = _split(member.name)
                if files and (prefix != key or kind in files):
                    yield key, files
                    count += 1
                    files = {}
                key = prefix
                stream = archive.extractfile(member) if kind in wanted else None
                # An entry without content says that the kind is there.
                files[kind] = stream.read() if stream else b""
            # Whether the end mark, a block of zeros, stands where tarfile stopped: it does not ask.
            file.seek(archive.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (*_DAMAGED, OSError) as error:
        if files:
            yield key, None
        yield Damage(f"cannot be read after {count} pairs ({error})")
        return
    if files and whole:
        yield key, files
    elif files:
        yield key, None
    if not whole:
        yield Damage(f"cut short, or damaged, after {count} pairs: it has no end mark there")


def _split(name: str) -> tuple[str, str]:
    """'a/000.jpg' -> ('a/000', 'jpg'); the key ends at the first period of the file name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def _metadata(path: Place) -> tuple[dict[str, _Row], str]:
    """(key -> row, what is wrong with the file or ''); nothing where there is no such file."""
    if not is_file(path):
        return {}, f"{path.name} is missing: failed downloads and lost pairs are not counted"
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow to be read; install it with: pip install pyarrow"
        ) from error
    try:
        with reached(path):
            content = io.BytesIO(path.read_bytes())
        present = pyarrow.parquet.read_schema(content).names
        lacking = [name for name in ("key", "status") if name not in present]
        if lacking:
            return {}, f"{path.name} has no column {' and no '.join(lacking)}; it is not used"
        columns = [name for name in _COLUMNS if name in present]
        table = pyarrow.parquet.read_table(content, columns=columns).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        # Arrow's messages go over many lines, with addresses in memory.
        reason = str(error).splitlines()[0][:80]
        return {}, f"{path.name} cannot be read ({reason}); it is not used"
    return {_key(row["key"]): _row(row) for row in table}, ""


def _key(value: Any) -> str:
    return f"{value:0{_KEY_DIGITS}d}" if isinstance(value, int) else str(value)


def _row(row: dict[str, Any]) -> _Row:
    return _Row(_texts(row.get("caption")), row["status"] == "success")
