"""Folders that img2dataset wrote in its webdataset format: 00000.tar and 00000.parquet.

In the tar, KEY.jpg, KEY.txt and KEY.json stand next to one another for each image that was
downloaded. The parquet file has one row a URL, those that failed included. The caption in KEY.json
and in the parquet file may be a list of several.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ovseg_jax.data.prepare.paths import AnyPath, file_size, is_file, network_errors, parse_path
from ovseg_jax.data.prepare.raw_pairs import LOST, NOT_DOWNLOADED, Damage, InputShard, RawPair
from ovseg_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
# img2dataset before 1.5 stored keys as numbers.
_KEY_DIGITS = 9
_DAMAGED = (tarfile.TarError, EOFError)
# Key -> captions, and whether the image was downloaded.
_Rows = dict[str, tuple[tuple[str, ...], bool]]


class Img2DatasetSource:
    """All tars below a folder, in the order of their paths.

    Raises:
      UserError: no such folder, or no tar in it.
    """

    name = "img2dataset"

    def __init__(self, directory: str | AnyPath):
        self.directory = parse_path(directory)
        if not self.directory.is_dir():
            raise UserError(f"there is no folder {self.directory}; check --source")
        if not next(_tars(self.directory), None):
            raise UserError(
                f"there is no .tar file below {self.directory}: img2dataset writes them with "
                "--output_format=webdataset"
            )

    def shards(self) -> list[InputShard]:
        tars = {path.relative_to(self.directory).as_posix(): path for path in _tars(self.directory)}
        return [InputShard(name, 0, file_size(tars[name])) for name in sorted(tars)]

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
                    yield RawPair(key, cause=LOST)
                continue
            seen.add(listed)
            image = next((files[k] for k in IMAGES if images and k in files), None)
            yield RawPair(key, _captions(files, rows.get(listed, ((), True))[0]), image)
        for key, (captions, downloaded) in rows.items():
            if key not in seen:
                yield RawPair(key, captions, cause=LOST if downloaded else NOT_DOWNLOADED)


def _tars(folder: AnyPath) -> Iterator[AnyPath]:
    """The tars below a folder, unordered.

    In a bucket only two levels are searched: a search at any depth would list all of it.
    """
    if isinstance(folder, Path):
        paths = folder.rglob("*.tar")
    else:
        paths = (path for pattern in ("*.tar", "*/*.tar") for path in folder.glob(pattern))
    yield from filter(is_file, paths)


def _captions(files: dict[str, bytes], listed: tuple[str, ...]) -> tuple[str | bytes, ...]:
    """The texts of a pair.

    In this order: several in KEY.json, KEY.txt, one in KEY.json, `listed` by the parquet file.
    """
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


def _samples(path: AnyPath, images: bool) -> Iterator[tuple[str, dict[str, bytes] | None] | Damage]:
    """(key, extension -> content) of neighboring members of a tar that share a key.

    The second is None for a pair that the end of a damaged tar cuts off.
    """
    wanted = (*IMAGES, *_TEXTS) if images else _TEXTS
    key, files, count, damage = "", {}, 0, ""
    try:
        with (
            network_errors(path, *_DAMAGED),
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
            # tarfile takes the end of a file that was cut between two members for the end of the
            # archive. A whole archive has a block of zeros there.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                damage = f"cut short, or damaged, after {count} pairs: it has no end mark there"
    except (*_DAMAGED, OSError) as error:
        damage = f"cannot be read after {count} pairs ({error})"
    if files:
        yield key, None if damage else files
    if damage:
        yield Damage(damage)


def _split(name: str) -> tuple[str, str]:
    """'a/000.jpg' -> ('a/000', 'jpg'); the key ends at the first period of the file name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def _metadata(path: AnyPath) -> tuple[_Rows, str]:
    """(rows of a parquet file, what is wrong with the file or ''); no rows without a file."""
    if not is_file(path):
        return {}, f"{path.name} is missing: failed downloads and lost pairs are not counted"
    try:
        with network_errors(path):
            content = io.BytesIO(path.read_bytes())
        present = pyarrow.parquet.read_schema(content).names
        lacking = [name for name in ("key", "status") if name not in present]
        if lacking:
            return {}, f"{path.name} has no column {' and no '.join(lacking)}; it is not used"
        columns = [name for name in ("key", "caption", "status") if name in present]
        rows = pyarrow.parquet.read_table(content, columns=columns).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        # Arrow's messages go over many lines, with addresses in memory.
        reason = str(error).splitlines()[0][:80]
        return {}, f"{path.name} cannot be read ({reason}); it is not used"
    return {_key(r["key"]): (_texts(r.get("caption")), r["status"] == "success") for r in rows}, ""


def _key(value: Any) -> str:
    return f"{value:0{_KEY_DIGITS}d}" if isinstance(value, int) else str(value)
