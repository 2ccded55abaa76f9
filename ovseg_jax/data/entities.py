"""Entities: which of a fixed set of visual nouns a caption names, and where (Sec. 3.1.2).

An entity has a name and surface forms: the words a caption may use for it. Plurals of the forms
are found without being listed. Ids are positions in the table.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ovseg_jax.data.plurals import plurals
from ovseg_jax.data.words import word_at, word_spans, words
from ovseg_jax.errors import UserError

MASK_TOKEN = "[MASK]"
FORMAT = "ovseg_jax entities"
VERSION = 1


def unmasked(text: str) -> str:
    """The text with every mask token that its author typed taken apart: it masks nothing.

    The tokenizer makes the same pieces of "[ MASK ]" as of the letters of "[MASK]".
    """
    return text.replace(MASK_TOKEN, f"[ {MASK_TOKEN[1:-1]} ]")


class EntitySet:
    """A table of entities with a fast matcher.

    Args:
      table: entity name -> surface forms; the name counts as a form of its own. The order of the
        table gives the ids.

    Raises:
      UserError: a form is empty, or is listed under two entities.
    """

    def __init__(self, table: Mapping[str, Sequence[str]]):
        self.table: dict[str, list[str]] = {}
        self._ids: dict[tuple[str, ...], int] = {}
        for identity, (name, forms) in enumerate(table.items()):
            if isinstance(forms, str):
                raise UserError(f"the forms of entity {name!r} are a string; write a list of them")
            self.table[name] = list(forms)
            for form in (name, *forms):
                self._add_form(name, form, identity)
        self.names: tuple[str, ...] = tuple(self.table)
        listed = dict(self._ids)
        for tokens, identity in listed.items():
            for plural in plurals(tokens[-1]):
                # A listed form always wins over a plural made by rule ("glasses", not "glass").
                self._ids.setdefault((*tokens[:-1], plural), identity)
        # First word -> how many words the longest form that begins with it has.
        self._longest: dict[str, int] = {}
        for tokens in self._ids:
            self._longest[tokens[0]] = max(self._longest.get(tokens[0], 0), len(tokens))

    def _add_form(self, name: str, form: str, identity: int) -> None:
        tokens = tuple(words(form))
        if not tokens or not all(tokens):
            raise UserError(f"entity {name!r} has the form {form!r}, in which no word can be found")
        other = self._ids.setdefault(tokens, identity)
        if other != identity:
            raise UserError(
                f"the form {form!r} is listed under two entities, {list(self.table)[other]!r} and "
                f"{name!r}; remove it from one of them"
            )

    def __len__(self) -> int:
        return len(self.names)

    def is_form(self, text: str) -> bool:
        """Whether the text as a whole is a form of an entity, or a plural of one."""
        return tuple(words(text)) in self._ids

    def spans(self, caption: str) -> list[tuple[int, int, int]]:
        """(start, end, entity id) of every mention, in order, without overlaps.

        Upper and lower case are the same; of two forms that begin at one word the longer is taken.
        The mask token itself is never a mention, even if "mask" is an entity.
        """
        positions = word_spans(caption)
        tokens = [word_at(caption, position) for position in positions]
        for start in _literal_positions(caption, MASK_TOKEN):
            for at, (left, _) in enumerate(positions):
                if start <= left < start + len(MASK_TOKEN):
                    tokens[at] = ""  # no form begins with it
        return [
            (positions[first][0], positions[last][1], identity)
            for first, last, identity in self._mentions(tokens)
        ]

    def _mentions(self, tokens: Sequence[str]) -> list[tuple[int, int, int]]:
        """(first word, last word, entity id) of every mention among the words of a caption."""
        found = []
        at = 0
        while at < len(tokens):
            taken = 1
            longest = self._longest.get(tokens[at], 0)
            for length in range(min(longest, len(tokens) - at), 0, -1):
                identity = self._ids.get(tuple(tokens[at : at + length]))
                if identity is not None:
                    found.append((at, at + length - 1, identity))
                    taken = length
                    break
            at += taken
        return found

    def find(self, caption: str) -> tuple[int, ...]:
        """Sorted ids of the entities that the caption names, each once."""
        return tuple(sorted({identity for _, _, identity in self.spans(caption)}))

    def among(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """`find` for a caption that is words already (`words.words`); knows no mask token."""
        return tuple(sorted({identity for _, _, identity in self._mentions(tokens)}))

    def first_words(self) -> frozenset[str]:
        """The words that a form, listed or a plural, can begin with."""
        return frozenset(self._longest)

    def vocabulary(self) -> frozenset[str]:
        """Every word of every form, plurals too."""
        return frozenset(word for tokens in self._ids for word in tokens)

    def to_json(
        self, path: str | Path, *, source: str = "", counts: Mapping[str, int] | None = None
    ) -> None:
        """Writes the table as a file that a person can read, edit and give back.

        Args:
          source: where the entities come from.
          counts: entity name -> how often it was found; for the reader alone.
        """
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "source": source}
        if counts is not None:
            document["counts"] = dict(counts)
        document["entities"] = self.table
        text = json.dumps(document, indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", "utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "EntitySet":
        """Reads a table that `to_json`, or a person, wrote.

        The file is what `to_json` writes, or only the object of names and forms in it.

        Raises:
          UserError: the file is missing or is not an object of lists of strings.
        """
        try:
            document = json.loads(Path(path).read_text("utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"there is no entity file at {path}; check the path") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error}); correct the file") from error
        return cls(_table_of(document, path))

    @classmethod
    def published(cls) -> "EntitySet":
        """The published list: 73 classes of 100 words (Sec. 3.1.2; `entity_lists/`)."""
        listed = resources.files("ovseg_jax.data").joinpath("entity_lists/published.json")
        return cls(_table_of(json.loads(listed.read_text("utf-8")), "the published list"))


def joined_tables(tables: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """One table of the entities of several; the first one itself where all are equal.

    Entities of one name become one, and so does an entity whose name is a form of an entity before
    it ("puppy", after "dog" with the form "puppy"). A form belongs to the first entity that lists
    it.
    """
    first = tables[0]
    if all(list(table.items()) == list(first.items()) for table in tables):
        return {name: list(forms) for name, forms in first.items()}
    joined: dict[str, list[str]] = {}
    owners: dict[tuple[str, ...], str] = {}
    for table in tables:
        for name, forms in table.items():
            owner = owners.setdefault(tuple(words(name)), name)
            listed = joined.setdefault(owner, [])
            for form in forms:
                taken = owners.setdefault(tuple(words(form)), owner)
                if taken == owner and form not in listed:
                    listed.append(form)
    return joined


def with_names(table: Mapping[str, Sequence[str]], names: Iterable[str]) -> dict[str, list[str]]:
    """The table with further entities: the names that no entity of it has as a form, or a plural.

    Names without a letter, or in which no word is found, are passed over.
    """
    known = EntitySet(table)
    new = [
        name
        for name in names
        if any(map(str.isalpha, name)) and all(words(name)) and not known.is_form(name)
    ]
    return joined_tables([table, {name: [] for name in new}]) if new else joined_tables([table])


def _table_of(document: Any, path: str | Path) -> dict[str, list[str]]:
    """The table in a parsed file, checked."""
    table = document
    if isinstance(document, dict) and document.get("format") == FORMAT:
        if document.get("version") != VERSION:
            raise UserError(
                f"{path} has layout version {document.get('version')!r}, this program reads "
                f"{VERSION}; write the entities again"
            )
        table = document.get("entities")
    well_formed = isinstance(table, dict) and all(
        isinstance(forms, list) and all(isinstance(form, str) for form in forms)
        for forms in table.values()
    )
    if not well_formed:
        raise UserError(
            f'{path} must hold one JSON object such as {{"dog": ["dog", "puppy"]}}: a list of '
            "surface forms for each entity name"
        )
    return table


def _literal_positions(text: str, literal: str) -> list[int]:
    positions = []
    at = text.find(literal)
    while at >= 0:
        positions.append(at)
        at = text.find(literal, at + len(literal))
    return positions
