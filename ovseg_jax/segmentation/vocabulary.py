"""The words that compete for a pixel, and the classes they stand for.

A class may have several words, ``cat|kitten|tabby``: its probability at a pixel is that of its best
word. Words may also stand for the background, which then gets the pixels they win.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.segmentation.protocol import Protocol, data_file

BACKGROUND = -1
BETWEEN = "|"
# Evaluation sets whose classes can be named by --vocabulary.
LISTS = ("coco", "voc", "context", "coco_object", "coco_stuff", "ade20k", "cityscapes")
# Everyday nouns in order of preference, each with the words for it, for its kinds and parts, and
# wider words; and nouns for what is around a subject.
_NOUNS = "competitors.json"


def ordered(items: Any, what: str) -> list[str]:
    """A sequence of texts as a list; UserError for other things, and for sets, generators and the
    like, which have no order."""
    if isinstance(items, str):
        raise UserError(f"{what} is a list: write [{items!r}], not one text")
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")) or hasattr(items, "keys"):
        kind = type(items).__name__
        raise UserError(f"{what} is a list, whose order numbers the labels; not a {kind}")
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"{what} is a list of texts, not {items!r}")
    if wrong := [item for item in items if any("\ud800" <= sign <= "\udfff" for sign in item)]:
        raise UserError(f"{what}: {wrong[0]!r} is no text in UTF-8: check the terminal's encoding")
    return list(items)


@dataclass(frozen=True)
class Vocabulary:
    """Classes and the words that compete for a pixel."""

    classes: tuple[str, ...]  # what they are called in results: the first word of each
    words: tuple[str, ...]  # what the text encoder gets
    word_to_class: tuple[int, ...]  # `BACKGROUND` for words that stand for it

    @classmethod
    def of(cls, entries: Iterable[str], background: Iterable[str] = ()) -> "Vocabulary":
        """From one entry per class, synonyms between bars, and words for the background; UserError
        for no class, an empty word, a word that is listed twice, or lists without order."""
        entries, background = ordered(entries, "classes"), ordered(background, "background")
        if not entries:
            raise UserError("no classes: name at least one, for example --classes='cat,dog'")
        pairs = [(i, word) for i, entry in enumerate(entries) for word in entry.split(BETWEEN)]
        pairs += [(BACKGROUND, word) for word in background]
        words, seen = [word.strip() for _, word in pairs], set()
        for word in words:
            if not word:
                raise UserError(f"empty class name in {[*entries, *background]}")
            if word.lower() in seen:
                raise UserError(f"class {word!r} is listed twice")
            seen.add(word.lower())
        names = tuple(entry.split(BETWEEN)[0].strip() for entry in entries)
        return cls(names, tuple(words), tuple(index for index, _ in pairs))

    @property
    def things(self) -> tuple[bool, ...]:
        """For each word, whether its last noun names a thing rather than surroundings."""
        surroundings = data_file(_NOUNS)["surroundings"]
        return tuple(word.lower().split()[-1] not in surroundings for word in self.words)

    def words_of(self, index: int) -> tuple[str, ...]:
        """The words of a class, or of `BACKGROUND`."""
        pairs = zip(self.words, self.word_to_class, strict=True)
        return tuple(word for word, of_class in pairs if of_class == index)

    def lines(self) -> tuple[str, ...]:
        """A text for each class with its synonyms, then the background's words."""
        lines = [BETWEEN.join(self.words_of(i)) for i in range(len(self.classes))]
        if words := self.words_of(BACKGROUND):
            lines.append(f"background: {BETWEEN.join(words)}")
        return tuple(lines)


def competition(vocabulary: Vocabulary, protocol: Protocol) -> Vocabulary:
    """The words that compete for a pixel under a protocol.

    The best probability of one class is 1 everywhere, and of two never below one half, so few words
    would paint the whole image. Up to `competing_words`, everyday nouns are added for the
    background, but none that is related to a word of a class (in singular or regular plural) and
    would take its pixels; and none to words for the background, or where there is no background.
    """
    if protocol.threshold is None or BACKGROUND in vocabulary.word_to_class:
        return vocabulary
    names = {name.lower() for name in vocabulary.words}
    ends = ("", "s", "es")
    taken = {word + end for name in names for word in (name, *name.split()) for end in ends}
    nouns = data_file(_NOUNS)["competitors"].items()
    free = [n for n, more in nouns if not taken & {x + end for x in (n, *more) for end in ends}]
    more = tuple(free[: max(0, protocol.competing_words - len(names))])
    classes = vocabulary.word_to_class + (BACKGROUND,) * len(more)
    return Vocabulary(vocabulary.classes, vocabulary.words + more, classes)


# ---- lists of words that people write

# First entries that are no class: what a mask has as 0, and what LabelMe writes above it for -1.
BACKGROUND_NAMES = ("background", "_background_", "__background__")
_IGNORED = "__ignore__"


def read_words(
    text: str, where: str, numbered_from: tuple[int, ...] = (0, 1)
) -> tuple[tuple[str, ...], bool]:
    r"""(classes in order, whether the background is named before them) of a file or a flag's value.

    There is one entry a line, or a single line with commas between them; a comma that belongs to a
    name is written ``\,``. Blank lines and comments (#) are passed over, and so are numbers before
    or behind the names (``0: cat``, ``0 cat``, ``cat: 0``) that count up from one of
    `numbered_from`. UserError where there is no entry, one is empty or in quotes or brackets, or
    reading on would move a label's number.
    """
    # Not `splitlines`, which also ends lines at U+0085, U+2028 and others: the labels would move.
    lines = [line.strip() for line in re.split("\r\n?|\n", text.removeprefix("\ufeff"))]
    rows = [split_at_commas(line) for line in lines if line and not line.startswith("#")]
    if len(rows) == 1:
        entries = rows[0][:-1] if rows[0][-1] == "" else rows[0]
    elif wrong := [row for row in rows if len(row) > 1]:
        raise UserError(
            f"{where}: the line {', '.join(wrong[0])!r} has a comma and is not the only line. A "
            "class is a line, synonyms stand between bars (cat|kitten), a comma in a name is \\,"
        )
    else:
        entries = [row[0] for row in rows]
    if "" in entries:
        raise UserError(f"{where}: there is an empty name between commas")
    digits = [entry.isdecimal() for entry in entries]
    for entry, number in zip(entries, digits, strict=True):
        if re.search(r"^[\[{'\"]|^[-*] |[\]}'\"]$|;", entry) or number and not all(digits):
            hint = "write the names alone, a line each, or with commas between them"
            raise UserError(f"{where}: the entry {entry!r} is no name: {hint}")
    entries = _without_numbers(entries, where, numbered_from)
    if tabs := [entry for entry in entries if "\t" in entry]:
        raise UserError(f"{where}: the entry {tabs[0]!r} has a tab: write the names alone")
    entries = entries[entries[:1] == [_IGNORED] :]
    background = bool(entries) and entries[0].lower() in BACKGROUND_NAMES
    entries = entries[background:]
    for entry in entries:
        if entry.lower() in (*BACKGROUND_NAMES, _IGNORED):
            raise UserError(f"{where}: only the first entry may be {entry!r}, which is no class")
    if not entries:
        raise UserError(f"{where} lists no classes: name at least one")
    return tuple(entries), background


def split_at_commas(text: str) -> list[str]:
    r"""'a, b\,c' -> ['a', 'b,c']: a comma behind a backslash belongs to the name."""
    parts = re.split(r"(?<!\\),", text)
    return [part.strip().replace("\\,", ",") for part in parts]


def _without_numbers(entries: list[str], where: str, first: tuple[int, ...]) -> list[str]:
    if len(entries) > 1 and entries[0].lower() in BACKGROUND_NAMES:  # without a number it is 0
        return [entries[0], *_without_numbers(entries[1:], where, (1,))]
    forms = (
        r"(?P<number>\d{1,9})\s*[:\t]\s*(?P<name>\S.*)",
        r"(?P<number>\d{1,9})[.)]?\s+(?P<name>\S.*)",
        r"(?P<name>\S.*?)\s*[:\t]\s*(?P<number>\d{1,9})",
    )
    matches = [[re.fullmatch(form, entry) for entry in entries] for form in forms]
    # A single name may be like the later forms, as "7 up" is; a whole list is not.
    several = matches if len(entries) > 1 else []
    numbered = next((found for found in several if all(found)), matches[0])
    if not any(numbered):
        return entries
    if not all(numbered):
        entry = entries[numbered.index(None)]
        raise UserError(f"{where}: some entries are numbered, but not {entry!r}")
    numbers = [int(match["number"]) for match in numbered]
    if numbers[0] not in first or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UserError(
            f"{where}: the numbers {', '.join(map(str, numbers[:5]))}... do not count up from "
            f"{' or '.join(map(str, first))} as labels do: sort the entries and fill the gaps"
        )
    return [match["name"] for match in numbered]


def word_list(name: str) -> tuple[str, ...]:
    """The classes of an evaluation set (one of `LISTS`; 'coco' is the 80 objects), or of a text
    file, see `read_words`."""
    if name in LISTS:
        table = "coco_object" if name == "coco" else name
        classes = data_file(f"tables/{table}.json", "ovseg_jax.data.benchmarks")["classes"]
        return tuple(entry["word"] for entry in classes)
    path = Path(name).expanduser()
    if not path.is_file():
        hint = f"the lists are {', '.join(LISTS)}{nearest(name, LISTS)}"
        raise UserError(f"--vocabulary={name}: no such file and no such list; {hint}")
    return read_words(read_text(path), f"--vocabulary={name}")[0]


def read_text(path: Path) -> str:
    """The text of a file; UserError where it cannot be read, or is not in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file in UTF-8") from None
