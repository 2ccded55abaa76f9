"""Tables of captions as text: which column is what, and rows from any place in the file.

CC12M's table is `url<TAB>caption`, CC3M's `caption<TAB>url`, neither with a header; others name
their columns. So the data are looked at.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ovseg_jax.data.prepare.places import Place, is_file, place
from ovseg_jax.errors import UserError

SAMPLE_ROWS = 1000
_IMAGE_NAMES = ("url", "image", "image_url", "image_path", "filepath", "file_name", "filename")
_IMAGE_NAMES += ("file", "path", "img")
_CAPTION_NAMES = ("caption", "text", "title", "alt", "alt_text", "sentence")
_KEY_NAMES = ("key", "id", "image_id")
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_FILE = re.compile(r"\S.*\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
_MARK = "\ufeff"  # some programs begin a UTF-8 file with it


@dataclass(frozen=True)
class Table:
    """A text file of rows, and which of its columns is what.

    Attributes:
      separator: between two columns.
      quoted: rows are as a spreadsheet writes them: quoted, over several lines where need be.
      header: the first row names the columns.
      image, caption: numbers of these columns.
      key: that of a column with keys, or None.
    """

    path: Place
    separator: str
    quoted: bool
    header: bool
    image: int
    caption: int
    key: int | None

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, list[str]]]:
        """(byte where the row begins, its cells); no cells where the row cannot be parsed.

        Bytes that are not UTF-8 become lone surrogates. The header is a row too.
        """
        return _rows(self.path, self.separator, self.quoted, start, stop)

    def describe(self) -> str:
        """One line for the report."""
        named = "named by its header" if self.header else "found by looking at its rows"
        return f"image in column {self.image + 1}, caption in column {self.caption + 1}, {named}"


def open_table(path: str | Place) -> Table:
    """Looks at the first rows of a file and finds out how to read it.

    Raises:
      UserError: no such file, no rows, or no column with images or with captions.
    """
    path = place(path)
    if not is_file(path):
        raise UserError(f"there is no file {path}; check --source")
    if path.suffix.lower() not in (".tsv", ".csv"):
        raise UserError(f"{path} must be a .tsv or .csv file of images and captions")
    quoted = path.suffix.lower() == ".csv"
    separator = _separator(path) if quoted else "\t"
    rows = [cells for cells in _first(path, separator, quoted) if cells]
    if not rows:
        raise UserError(f"{path} has no rows; check --source")
    named = _named(rows[0])
    if named:
        image, caption, key = named
    else:
        image, caption, key = (*_guessed(path, rows), None)
    return Table(path, separator, quoted, bool(named), image, caption, key)


def _named(row: list[str]) -> tuple[int, int, int | None] | None:
    """The columns that a header names, or None where the row is none."""
    names = [cell.strip().lower() for cell in row]
    image = next((names.index(name) for name in _IMAGE_NAMES if name in names), None)
    caption = next((names.index(name) for name in _CAPTION_NAMES if name in names), None)
    key = next((names.index(name) for name in _KEY_NAMES if name in names), None)
    return None if image is None or caption is None else (image, caption, key)


def _guessed(path: Place, rows: list[list[str]]) -> tuple[int, int]:
    """The column in which most cells are URLs or image files, and the wordiest of the others."""
    width = max(map(len, rows))
    columns = [[row[c] for row in rows if c < len(row)] for c in range(width)]
    images = [sum(map(_is_image, cells)) / len(rows) for cells in columns]
    image = max(range(width), key=lambda c: images[c])
    others = [c for c in range(width) if c != image]
    if images[image] < 0.5 or not others:
        raise UserError(
            f"{path} lacks a column: it needs one with URLs or image files and one with captions; "
            f"its first row is {rows[0][:4]!r}. A header with the names url and caption, or "
            "image and caption, says which is which"
        )
    return image, max(others, key=lambda c: sum(cell.count(" ") for cell in columns[c]))


def _is_image(cell: str) -> bool:
    return bool(_URL.fullmatch(cell.strip()) or _FILE.fullmatch(cell.strip()))


def _separator(path: Place) -> str:
    """Of a .csv file: the sign that gives most rows the same number, above 1, of columns."""

    def alike(separator: str) -> int:
        widths = [len(cells) for cells in _first(path, separator, True)]
        return max((widths.count(w) for w in set(widths) if w > 1), default=0)

    return max((",", ";", "\t"), key=alike)


def _first(path: Place, separator: str, quoted: bool) -> list[list[str]]:
    rows = _rows(path, separator, quoted, 0, None)
    return [cells for _, (_, cells) in zip(range(SAMPLE_ROWS), rows, strict=False)]


def _rows(
    path: Place, separator: str, quoted: bool, start: int, stop: int | None
) -> Iterator[tuple[int, list[str]]]:
    with path.open("rb") as stream:
        stream.seek(start)
        position = start

        def lines() -> Iterator[str]:
            nonlocal position
            for line in stream:
                position += len(line)
                text = line.decode("utf-8", "surrogateescape")
                yield text.removeprefix(_MARK) if position == len(line) else text

        if quoted:
            reader = csv.reader(lines(), delimiter=separator)
        else:
            reader = (line.rstrip("\r\n").split(separator) for line in lines())
        while stop is None or position < stop:
            begin = position
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                cells = []
            # A blank line is no row; one that cannot be parsed is.
            if cells != [""] and (cells or position > begin):
                yield begin, cells
