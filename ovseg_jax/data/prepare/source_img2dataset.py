"""Folders that img2dataset wrote in its webdataset format: 00000.tar and 00000.parquet.

The tar has KEY.jpg, KEY.txt and KEY.json side by side for each image that was downloaded; the
parquet file has one row a URL, those that failed included. A caption in KEY.json and in the parquet
file may be a list of several.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ovseg_jax.data.decoding import IMAGES, is_foreign
from ovseg_jax.data.prepare import pairs
from ovseg_jax.data.prepare.pairs import AnyPath, Damage, InputShard, RawPair
from ovseg_jax.data.prepare.rules import LOST, NOT_DOWNLOADED
from ovseg_jax.errors import UserError

_IMAGES = tuple(ending[1:] for ending in IMAGES)
_TEXTS = ("txt", "json")
_DAMAGED = (tarfile.TarError, EOFError)
# Of a row of a parquet file: key, captions, and whether the image was downloaded.
_Row = tuple[str, tuple[str, ...], bool]


class Img2DatasetSource:
    """All tars below a folder by path; of a parquet file without its tar everything is lost."""

    name = "img2dataset"

    def __init__(self, directory: str | AnyPath):
        self.directory = pairs.existing_folder(directory)
        if not any(path.suffix == ".tar" for path in _files(self.directory)):
            wanted = "img2dataset writes them with --output_format=webdataset"
            raise UserError(f"there is no .tar file below {self.directory}: {wanted}")

    def shards(self) -> list[InputShard]:
        names, sizes, others = set(), {}, []
        for path in _files(self.directory):
            name = path.with_suffix(".tar").relative_to(self.directory).as_posix()
            if path.suffix == ".tar":
                sizes[name] = pairs.file_size(path)
            elif path.suffix == ".parquet":
                names.add(name)
            elif path.suffix != ".json":  # img2dataset's statistics
                others.append(path.name)
        shards = [InputShard(name, 0, sizes.get(name, 0)) for name in sorted({*names, *sizes})]
        if others:
            first = ", ".join(sorted(others)[:3])
            shards.append(InputShard(f"{len(others)} other files ({first})", 0, 0, -1))
        return shards

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair | Damage]:
        if shard.first < 0:
            yield Damage("passed over, because they are no .tar and no .parquet files")
            return
        path = self.directory / shard.name
        rows, complaint = _metadata(path.with_suffix(".parquet"))
        if complaint:
            yield Damage(complaint)
        listed = {key: captions for key, captions, _ in rows}
        unseen = Counter(key for key, _, _ in rows)
        for item in _samples(path, images):
            if isinstance(item, Damage):
                yield item
                continue
            name, files = item
            # A tar that was packed again has folders before the names.
            key = name if name in listed else name.rpartition("/")[2]
            if files is None:  # begun, and cut off by the end of the tar
                if key not in listed:
                    yield RawPair(name, cause=LOST)
                continue
            unseen[key] -= 1
            image = next((files[k] for k in _IMAGES if images and k in files), None)
            yield RawPair(name, _captions(files, listed.get(key, ())), image)
        for key, captions, downloaded in rows:
            if unseen[key] > 0:
                unseen[key] -= 1
                yield RawPair(key, captions, cause=LOST if downloaded else NOT_DOWNLOADED)


def _files(folder: AnyPath) -> Iterator[AnyPath]:
    """The files below a folder, but for those of other programs.

    In a bucket only tars and parquet files of two levels: a search for all would list all of it.
    """
    if isinstance(folder, Path):
        for root, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not is_foreign(name)]
            yield from (Path(root) / name for name in names if not is_foreign(name))
        return
    for pattern in ("*.tar", "*/*.tar", "*.parquet", "*/*.parquet"):
        yield from (path for path in folder.glob(pattern) if not is_foreign(path.name))


def _captions(files: dict[str, bytes], listed: tuple[str, ...]) -> tuple[str | bytes, ...]:
    """Several in KEY.json, else KEY.txt, else one in KEY.json, else those of the parquet file."""
    try:
        caption = json.loads(files.get("json", b"{}")).get("caption")
    except (ValueError, AttributeError, RecursionError):
        caption = None
    if "txt" in files and not isinstance(caption, list):
        return (files["txt"],)
    return _texts(caption) or listed


def _texts(caption: Any) -> tuple[str, ...]:
    """A caption, or the captions of a list."""
    listed = caption if isinstance(caption, list) else [caption]
    return tuple(text for text in listed if isinstance(text, str))


def _samples(path: AnyPath, images: bool) -> Iterator[tuple[str, dict[str, bytes] | None] | Damage]:
    """(key, extension -> content) of neighbors in a tar that share a key.

    The second is None for a pair that the end of a damaged tar cuts off.
    """
    wanted = (*_IMAGES, *_TEXTS) if images else _TEXTS
    key, files, count, damage = "", {}, 0, ""
    try:
        with pairs.network_errors(path, *_DAMAGED, FileNotFoundError), path.open("rb") as file:
            for archive, member in _members(file):
                prefix, kind = _split(member.name, key if files else "") if member else ("", "")
                if files and (prefix != key or kind in files):
                    yield key, files
                    count += 1
                    files = {}
                if member is None:
                    continue
                key = prefix
                read = kind in wanted and member.isfile()
                # An entry without content says that the kind is there.
                files[kind] = archive.extractfile(member).read() if read else b""
    except (*_DAMAGED, OSError) as error:
        damage = f"cannot be read after {count} pairs ({error})"
    if files:
        yield key, None if damage else files
    if damage:
        yield Damage(damage)


def _members(file: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo | None]]:
    """The members, without folders, of one tar or of several behind one another; None after each.

    Raises TarError for damage, or an end without an end mark.
    """
    start = 0
    while True:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members.clear()  # or the list grows with the file
                if not member.isdir() and not any(map(is_foreign, member.name.split("/"))):
                    yield archive, member
            end = archive.offset
        # tarfile takes the end of a file that was cut between two members for the end of the
        # archive. A whole archive has a block of zeros there.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("cut short, or damaged: it has no end mark there")
        yield archive, None
        start = file.tell()
        while block := file.read(tarfile.RECORDSIZE):
            if rest := block.lstrip(b"\0"):
                start = file.tell() - len(rest)
                break
        else:
            return


def _split(name: str, current: str) -> tuple[str, str]:
    """'a/000.jpg' -> ('a/000', 'jpg'); `current` is the key of the member before.

    The key ends at the first period of the file name, as webdataset has it, unless only the ending
    behind the last one is known ('photo.001.jpg') and no file of the key came before.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, kind = base.partition(".")
    key, ending = folder + slash + stem, kind.lower()
    last = ending.rpartition(".")[2]
    if key != current and last != ending and last in (*_IMAGES, *_TEXTS):
        return folder + slash + base[: -len(last) - 1], last
    return key, ending


def _metadata(path: AnyPath) -> tuple[list[_Row], str]:
    """(rows of a parquet file, what is wrong with the file or ''); no rows without a file."""
    if not pairs.is_file(path):
        return [], f"{path.name} is missing: failed downloads and lost pairs are not counted"
    try:
        with pairs.network_errors(path):
            content = io.BytesIO(path.read_bytes())
        present = pyarrow.parquet.read_schema(content).names
        lacking = [name for name in ("key", "status") if name not in present]
        if lacking:
            return [], f"{path.name} has no column {' and no '.join(lacking)}; it is not used"
        columns = [name for name in ("key", "caption", "status") if name in present]
        rows = pyarrow.parquet.read_table(content, columns=columns).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        # Arrow's messages go over many lines, with addresses in memory.
        reason = str(error).splitlines()[0][:80]
        return [], f"{path.name} cannot be read ({reason}); it is not used"
    # img2dataset before 1.5 stored keys as numbers.
    keys = [f"{r['key']:09d}" if isinstance(r["key"], int) else str(r["key"]) for r in rows]
    listed = [(_texts(r.get("caption")), r["status"] == "success") for r in rows]
    return [(key, *pair) for key, pair in zip(keys, listed, strict=True)], ""
