"""A table of captions and a folder of images, however the program that fetched them named them."""

import functools
import hashlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from urllib.parse import unquote, urlsplit

import numpy as np
from jaxtyping import Int64

from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.places import Place, is_file, place, reached, size_of
from ovseg_jax.data.prepare.raw import InputShard, RawPair
from ovseg_jax.data.prepare.table import SAMPLE_ROWS, open_table
from ovseg_jax.errors import UserError

_PER_SHARD = 10_000
_ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp")


def _url_name(cell: str, row: int) -> str:
    return unquote(urlsplit(cell).path.rpartition("/")[2])


# How the file of a row may be named -> its name, with or without an ending.
NAMINGS: dict[str, Callable[[str, int], str]] = {
    "path in the table": lambda cell, row: cell,
    "end of the URL": _url_name,
    "MD5 of the URL": lambda cell, row: hashlib.md5(
        cell.encode(), usedforsecurity=False
    ).hexdigest(),
    "SHA-256 of the URL": lambda cell, row: hashlib.sha256(cell.encode()).hexdigest(),
    "number of the row, 9 digits": lambda cell, row: f"{row:09d}",
    "number of the row": lambda cell, row: str(row),
}


class FileSource:
    """Rows of a .tsv or .csv file with their images; the key is the cell that names the image.

    Rows with the same cell for the image, wherever they stand, are the captions of this image.
    How image files are named (`NAMINGS`) is found by trying: the way that finds most of the first
    rows' images is taken.

    Raises:
      UserError: no such file or folder, a column missing, or no image found.
    """

    def __init__(self, table: str | Place, images: str | Place | None = None):
        self._table = open_table(table)
        self._images = place(images) if images else self._table.path.parent
        if not self._images.is_dir():
            raise UserError(f"there is no folder {self._images}; check --images")
        self._naming = self._find_naming()
        self.name = f"files: {self._table.describe()}; image files named by {self._naming}"

    def shards(self) -> list[InputShard]:
        starts, _ = self._scanned
        stops = [*starts[1:], size_of(self._table.path)]
        return [
            InputShard(f"rows from {n * _PER_SHARD}", start, stop, n * _PER_SHARD)
            for n, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]

    @functools.cached_property
    def _scanned(self) -> tuple[list[int], Int64[np.ndarray, "rows 2"]]:
        """(where shards begin, for each row whose image came before: where that row and it begin).

        The rows in order of the first column, then of the second.
        """
        starts, begins, digests = [], array("q"), array("Q")
        for row, (begin, cells) in enumerate(self._numbered()):
            if row % _PER_SHARD == 0:
                starts.append(begin)
            if cell := self._image_cell(cells):
                digest = hashlib.blake2b(cell.encode("utf-8", "surrogateescape"), digest_size=8)
                begins.append(begin)
                digests.append(int.from_bytes(digest.digest(), "little"))
        hashes = np.frombuffer(digests, np.uint64)
        order = np.argsort(hashes, kind="stable")
        places, hashes = np.frombuffer(begins, np.int64)[order], hashes[order]
        again = np.zeros(len(hashes), bool)
        again[1:] = hashes[1:] == hashes[:-1]
        first = places[np.maximum.accumulate(np.where(again, 0, np.arange(len(places))))]
        pairs = np.stack([first, places], axis=1)[again]
        return starts, pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]

    def _image_cell(self, cells: list[str]) -> str:
        """The cell that names the image; empty where the row is unusable."""
        table = self._table
        whole = len(cells) > max(table.image, table.caption, table.key or 0)
        return cells[table.image].strip() if whole else ""

    def _numbered(self) -> Iterator[tuple[int, list[str]]]:
        return islice(self._table.rows(), int(self._table.header), None)

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        table, (_, again) = self._table, self._scanned
        low, high = np.searchsorted(again[:, 0], [shard.start, shard.stop])
        further = defaultdict(list)
        for first, begin in again[low:high].tolist():
            further[first].append(begin)
        seen = set(again[:, 1][(again[:, 1] >= shard.start) & (again[:, 1] < shard.stop)].tolist())
        rows = dict(table.rows(shard.start, shard.stop))
        for row, (begin, cells) in enumerate(rows.items(), shard.first):
            if begin in seen:
                continue
            if not (cell := self._image_cell(cells)):
                yield RawPair(f"row {row}", cause=causes.BAD_ROW)
                continue
            key = cell if table.key is None else cells[table.key].strip()
            image = self._read_image(self._naming, cell, row) if images else None
            alike = [rows.get(at) or next(table.rows(at))[1] for at in further[begin]]
            yield RawPair(key, tuple(one[table.caption] for one in (cells, *alike)), image)

    def _read_image(self, naming: str, cell: str, row: int) -> bytes | None:
        for ending in _ENDINGS:
            try:
                path = self._path(naming, cell, row, ending)
                with reached(path, FileNotFoundError, IsADirectoryError):
                    return path.read_bytes()
            except (OSError, ValueError):
                continue  # not there, a folder, not to be read, or no possible name
        return None

    def _path(self, naming: str, cell: str, row: int, ending: str) -> Place:
        name = NAMINGS[naming](cell, row)
        if not name:
            raise ValueError("no name")
        return self._images / (name + ending)

    def _find_naming(self) -> str:
        found = dict.fromkeys(NAMINGS, 0)
        for row, (_, cells) in enumerate(islice(self._numbered(), SAMPLE_ROWS)):
            if len(cells) <= self._table.image:
                continue
            for naming in NAMINGS:
                found[naming] += self._exists(naming, cells[self._table.image].strip(), row)
        best = max(NAMINGS, key=lambda naming: found[naming])
        if not found[best]:
            tried = ", ".join(NAMINGS)
            raise UserError(
                f"none of the first {SAMPLE_ROWS} images of {self._table.path} is in "
                f"{self._images}; tried as file name, with and without {', '.join(_ENDINGS[1:])}: "
                f"{tried}. Check --images"
            )
        return best

    def _exists(self, naming: str, cell: str, row: int) -> bool:
        for ending in _ENDINGS:
            try:
                if is_file(self._path(naming, cell, row, ending)):
                    return True
            except (OSError, ValueError):
                continue
        return False
