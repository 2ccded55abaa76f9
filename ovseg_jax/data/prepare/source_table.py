"""A table of captions, and a folder of images however the program that fetched them named them.

CC12M's table is `url<TAB>caption`, CC3M's `caption<TAB>url`, neither with a header; others name
their columns. So the first rows tell which column is what. In a .csv file, cells with separators,
quotes or line breaks are quoted, and a quote in a cell is doubled or follows a backslash. A .tsv
file may be like that too (pandas), or quotes in it are letters (CC12M): the rows with quotes tell.
A row that cannot be parsed costs its first line.
"""

import contextlib
import csv
import functools
import hashlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from jaxtyping import Int64

from ovseg_jax.data.prepare import pairs
from ovseg_jax.data.prepare.pairs import AnyPath, InputShard, RawPair, is_file, read_file
from ovseg_jax.data.prepare.rules import BAD_ROW
from ovseg_jax.errors import UserError

_PER_SHARD = 10_000
_SAMPLE_ROWS = 1000
# Names of the columns of images, captions and keys.
_HEADERS = (
    "url image image_url image_path filepath file_name filename file path img".split(),
    "caption text title alt alt_text sentence".split(),
    "key id image_id".split(),
)
_IMAGE_CELL = re.compile(r"https?://\S+|\S.*\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
_BYTE_ORDER_MARK = "\ufeff"  # some programs begin a UTF-8 file with it
_ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp")
# A quote, not doubled, within the text of a cell of a .tsv file: it is a letter.
_LETTER = re.compile(r'(?<=[^\t"])"(?:"")*(?=[^\t"])')

# How image files may be named -> (cell of the image, number of the row) -> name of the file, with
# or without its ending.
NAMINGS: dict[str, Callable[[str, int], str]] = {
    "path in the table": lambda cell, row: cell,
    "end of the URL": lambda cell, row: unquote(urlsplit(cell).path.rpartition("/")[2]),
    "MD5 of the URL": lambda cell, row: hashlib.md5(cell.encode()).hexdigest(),
    "SHA-256 of the URL": lambda cell, row: hashlib.sha256(cell.encode()).hexdigest(),
    "number of the row, 9 digits": lambda cell, row: f"{row:09d}",
    "number of the row": lambda cell, row: str(row),
}
_Row = tuple[int, list[str]]  # the byte where it begins, and its cells


class FileSource:
    """Rows of a .tsv or .csv file with their images; the key is the cell that names the image.

    Rows with the same cell for the image, anywhere in the file, are the captions of this image.
    Of the ways to name image files (`NAMINGS`), the one that fits most of the first rows is taken.
    `images` is the folder of image files; by default the folder of the table.
    """

    def __init__(self, table: str | AnyPath, images: str | AnyPath | None = None):
        self._path = pairs.parse_path(table)
        if not is_file(self._path):
            raise UserError(f"there is no file {self._path}; check --source")
        suffix = self._path.suffix.lower()
        if suffix not in (".csv", ".tsv"):
            raise UserError(f"{self._path} must be a .tsv or .csv file of images and captions")
        self._quoted = suffix == ".csv" or _has_quoted_cells(self._path)
        self._separator = _separator(self._path) if suffix == ".csv" else "\t"
        self._columns = 0
        with self._path.open("rb") as stream:
            first = stream.readline()
        if not first.endswith(b"\n") and b"\r" in first.strip():
            hint = "save it with the line ends of Unix or Windows"
            raise UserError(f"the lines of {self._path} end with a carriage return alone; {hint}")
        rows = [cells for _, cells in islice(self._rows(0), _SAMPLE_ROWS) if cells]
        if not rows:
            raise UserError(f"{self._path} has no rows; check --source")
        self._columns = Counter(map(len, rows)).most_common(1)[0][0]
        names = [cell.strip().lower() for cell in rows[0]]
        named = [next((names.index(x) for x in known if x in names), None) for known in _HEADERS]
        self._has_header = named[0] is not None and named[1] is not None
        self._width = len(rows[0])
        columns = named if self._has_header else _guessed_columns(self._path, rows)
        self._image, self._caption, self._key = columns
        self._images = pairs.existing_folder(images or self._path.parent, "images")
        self._naming = self._find_naming()
        found = "named by its header" if self._has_header else "found by looking at its rows"
        self.name = (
            f"files: image in column {self._image + 1}, caption in column {self._caption + 1}, "
            f"{found}; image files named by {self._naming}"
        )

    def shards(self) -> list[InputShard]:
        starts, _ = self._scanned
        stops = [*starts[1:], pairs.file_size(self._path)]
        return [
            InputShard(f"rows from {n * _PER_SHARD}", start, stop, n * _PER_SHARD)
            for n, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        _, repeats = self._scanned
        low, high = np.searchsorted(repeats[:, 0], [shard.start, shard.stop])
        further = defaultdict(list)
        for first, begin in repeats[low:high].tolist():
            further[first].append(begin)
        inside = (repeats[:, 1] >= shard.start) & (repeats[:, 1] < shard.stop)
        merged = set(repeats[inside, 1].tolist())
        rows = dict(self._rows(shard.start, shard.stop))
        for row, (begin, cells) in enumerate(rows.items(), shard.first):
            if begin in merged:
                continue
            if not (cell := self._image_cell(cells)):
                yield RawPair(f"row {row}", cause=BAD_ROW)
                continue
            key = cell if self._key is None else cells[self._key].strip()
            image = self._try_names(self._naming, cell, row, read_file) if images else None
            # The other rows of the image may be in other shards.
            alike = [rows.get(at) or next(self._rows(at))[1] for at in further[begin]]
            yield RawPair(key, tuple(r[self._caption] for r in (cells, *alike)), image)

    @functools.cached_property
    def _scanned(self) -> tuple[list[int], Int64[np.ndarray, "rows 2"]]:
        """Where shards begin, and the rows whose image an earlier row has, sorted.

        Of each such row: where the first row of its image begins, and where it begins itself.
        """
        starts, begins, digests = [], array("q"), array("Q")
        for row, (begin, cells) in enumerate(self._data_rows()):
            if row % _PER_SHARD == 0:
                starts.append(begin)
            if cell := self._image_cell(cells):
                digest = hashlib.blake2b(cell.encode("utf-8", "surrogateescape"), digest_size=8)
                begins.append(begin)
                digests.append(int.from_bytes(digest.digest(), "little"))
        rows = np.frombuffer(begins, np.int64)
        hashes = np.frombuffer(digests, np.uint64)
        _, firsts, image = np.unique(hashes, return_index=True, return_inverse=True)
        first = rows[firsts[image]]
        repeats = np.stack([first, rows], axis=1)[first != rows]
        return starts, repeats[np.lexsort((repeats[:, 1], repeats[:, 0]))]

    def _rows(self, start: int, stop: int | None = None) -> Iterator[_Row]:
        quoted, columns = self._quoted, self._columns
        return _read_rows(self._path, self._separator, quoted, columns, start, stop)

    def _data_rows(self) -> Iterator[_Row]:
        return islice(self._rows(0), int(self._has_header), None)

    def _image_cell(self, cells: list[str]) -> str:
        """The cell that names the image; empty where the row is unusable."""
        usable = len(cells) > max(self._image, self._caption, self._key or 0)
        # A cell that the header does not name, or that most rows lack, comes from a separator which
        # should be in quotes: the caption would be cut there.
        width = self._width if self._has_header else self._columns
        usable = usable and not any(cells[width:])
        return cells[self._image].strip() if usable else ""

    def _try_names(self, naming: str, cell: str, row: int, read: Callable[[AnyPath], Any]) -> Any:
        """The first result of `read`, if any, for the paths that an image may have."""
        for ending in _ENDINGS:
            # An OSError: there is no such file, it is a folder, or it cannot be read.
            # A ValueError: the cell gives no possible name.
            with contextlib.suppress(OSError, ValueError):
                name = NAMINGS[naming](cell, row)
                result = read(self._images / (name + ending)) if name else None
                if result not in (None, False):
                    return result
        return None

    def _find_naming(self) -> str:
        fits = dict.fromkeys(NAMINGS, 0)
        for row, (_, cells) in enumerate(islice(self._data_rows(), _SAMPLE_ROWS)):
            if len(cells) > self._image:
                cell = cells[self._image].strip()
                for naming in NAMINGS:
                    fits[naming] += bool(self._try_names(naming, cell, row, is_file))
        best = max(NAMINGS, key=fits.__getitem__)
        if not fits[best]:
            raise UserError(
                f"none of the first {_SAMPLE_ROWS} images of {self._path} is in {self._images}, "
                f"with or without {', '.join(_ENDINGS[1:])}, named by {' or '.join(NAMINGS)}; "
                "check --images"
            )
        return best


def _guessed_columns(path: AnyPath, rows: list[list[str]]) -> tuple[int, int, None]:
    """The column in which most cells are URLs or image files, the wordiest other one, no key."""
    columns = range(max(map(len, rows)))
    cells = [[row[column] for row in rows if column < len(row)] for column in columns]
    images = [sum(bool(_IMAGE_CELL.fullmatch(c.strip())) for c in column) for column in cells]
    image = max(columns, key=images.__getitem__)
    others = [column for column in columns if column != image]
    if 2 * images[image] < len(rows) or not others:
        raise UserError(
            f"{path} lacks a column of URLs or image files, or one of captions; its first row is "
            f"{rows[0][:4]!r}. A header with url (or image) and caption says which is which"
        )
    return image, max(others, key=lambda column: sum(c.count(" ") for c in cells[column])), None


def _separator(path: AnyPath) -> str:
    """Of a .csv file: the sign that gives most rows the same number, above 1, of columns."""
    alike = {}
    for sign in (",", ";", "\t"):
        rows = islice(_read_rows(path, sign, quoted=True), _SAMPLE_ROWS)
        widths = Counter(len(cells) for _, cells in rows if len(cells) > 1)
        alike[sign] = max(widths.values(), default=0)
    return max(alike, key=alike.__getitem__)


def _has_quoted_cells(path: AnyPath) -> bool:
    """Whether quotes in a .tsv file are around cells: in three of four lines that have quotes."""
    with path.open("rb") as stream:
        texts = (line.decode("utf-8", "replace").rstrip("\r\n") for line in stream if b'"' in line)
        votes = [_LETTER.search(text) is None for text in islice(texts, _SAMPLE_ROWS)]
    return bool(votes) and 4 * sum(votes) >= 3 * len(votes)


def _read_rows(
    path: AnyPath,
    separator: str,
    quoted: bool,
    columns: int = 0,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[_Row]:
    """The rows that begin at byte `start` to `stop`; without cells where one cannot be parsed.

    Bytes that are not UTF-8 become lone surrogates. The header is a row too; blank lines are none.
    Quotes are letters unless `quoted`; a row over several lines must have `columns`, if not 0.
    """
    is_csv = path.suffix.lower() == ".csv"
    with path.open("rb") as stream:
        stream.seek(start)
        begin = start
        while (stop is None or begin < stop) and (line := stream.readline()):
            end = begin + len(line)
            text = line.decode("utf-8", "surrogateescape")
            if begin == 0:
                text = text.removeprefix(_BYTE_ORDER_MARK)
            cells = text.rstrip("\r\n").split(separator)
            if "\r" in text.rstrip("\r\n"):
                cells = []  # programs disagree whether a row ends here
            if quoted and '"' in text:
                row = _parse_quoted(text, stream, separator, columns)
                end = stream.tell()
                if row is not None or is_csv:
                    cells = row or []
            if text.strip("\r\n"):
                yield begin, cells
            begin = end


def _parse_quoted(text: str, stream: Any, separator: str, columns: int) -> list[str] | None:
    """The cells of a row with quotes that begins with the line `text`; None if it is none.

    Leaves `stream`, which has the lines after it, behind the row, or behind `text`. A quoted cell
    with whole rows in it is one that was not closed: `text` is no row then.
    """
    with contextlib.suppress(csv.Error):
        return next(csv.reader([text], delimiter=separator, strict=True))
    begin = stream.tell()
    for escape in (None, "\\"):
        lines = chain([text], (line.decode("utf-8", "surrogateescape") for line in stream))
        reader = csv.reader(lines, delimiter=separator, escapechar=escape, strict=True)
        with contextlib.suppress(csv.Error):
            cells = next(reader)
            end = stream.tell()
            stream.seek(begin)
            further = [stream.readline() for _ in range(reader.line_num - 1)]
            rows = any(_is_row(line, separator, columns) for line in further)
            if reader.line_num == 1 or not columns or len(cells) == columns and not rows:
                stream.seek(end)
                return cells
        stream.seek(begin)
    return None


def _is_row(line: bytes, separator: str, columns: int) -> bool:
    """Whether a line of a quoted cell, up to its closing quote, looks like a row by itself."""
    cells = line.decode("utf-8", "replace").split('"')[0].strip().split(separator)
    return len(cells) == columns and any(_IMAGE_CELL.fullmatch(cell.strip()) for cell in cells)
