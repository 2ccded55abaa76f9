"""Entities: which of a fixed set of visual nouns a caption names, and where (Sec. 3.1.2).

An entity has a name and surface forms, the words that a caption may use for it. Plurals of the
forms need not be listed. Ids are positions in the table.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ovseg_jax.data.tokenizer import MASK_TOKEN
from ovseg_jax.data.words import plurals, word_spans, words
from ovseg_jax.errors import UserError

FORMAT = "ovseg_jax entities"
VERSION = 1
_EDGE = ".,'-_*/\u2026"  # marks that are no words, alone or around a word


class EntitySet:
    """Finds the entities of a table in captions.

    `table` has the surface forms of each name, which is a form too; its order gives the ids. A
    UserError tells of a form that is empty, or is listed under two entities.
    """

    def __init__(self, table: Mapping[str, Sequence[str]]):
        self.table: dict[str, list[str]] = {}
        self._ids: dict[tuple[str, ...], int] = {}
        for identity, (name, forms) in enumerate(table.items()):
            if isinstance(forms, str):
                raise UserError(f"the forms of entity {name!r} are a string; write a list of them")
            self.table[name] = list(forms)
            for form in (name, *forms):
                tokens = _form_words(form)
                if not tokens:
                    raise UserError(f"entity {name!r} has the form {form!r}, which has no word")
                other = self._ids.setdefault(tokens, identity)
                if other != identity:
                    both = f"two entities, {list(self.table)[other]!r} and {name!r}"
                    raise UserError(f"the form {form!r} is listed under {both}; remove one of them")
        self.names: tuple[str, ...] = tuple(self.table)
        for tokens, identity in list(self._ids.items()):
            for plural in plurals(tokens[-1]):
                # A listed form always wins over a plural made by rule ("glasses", not "glass").
                self._ids.setdefault((*tokens[:-1], plural), identity)
        # First word -> the number of words of the longest form that begins with it.
        self._longest: dict[str, int] = {}
        for tokens in self._ids:
            self._longest[tokens[0]] = max(self._longest.get(tokens[0], 0), len(tokens))
        self._first_words = frozenset(self._longest)

    def __len__(self) -> int:
        return len(self.names)

    def is_form(self, text: str) -> bool:
        """Whether the text as a whole is a form of an entity, or a plural of one."""
        return tuple(words(text)) in self._ids

    def spans(self, caption: str) -> list[tuple[int, int, int]]:
        """(start, end, entity id) of every mention, in order, without overlaps.

        Case does not matter; of two forms that begin at the same word the longer is a mention. The
        mask token itself is never a mention, even if "mask" is an entity.
        """
        positions = word_spans(caption)
        return [
            (positions[first][0], positions[last][1], identity)
            for first, last, identity in self._mentions(words(caption))
        ]

    def find(self, caption: str) -> tuple[int, ...]:
        """Sorted ids of the entities that the caption names, each once."""
        tokens = words(caption)
        # Most alt texts of the web name no entity.
        if self._first_words.isdisjoint(tokens):
            return ()
        return tuple(sorted({identity for _, _, identity in self._mentions(tokens)}))

    def _mentions(self, tokens: Sequence[str]) -> list[tuple[int, int, int]]:
        """(first word, last word, entity id) of every mention among the words of a caption."""
        mentions = []
        at = 0
        while at < len(tokens):
            longest = min(self._longest.get(tokens[at], 0), len(tokens) - at)
            for length in range(longest, 0, -1):
                identity = self._ids.get(tuple(tokens[at : at + length]))
                if identity is not None:
                    mentions.append((at, at + length - 1, identity))
                    at += length
                    break
            else:
                at += 1
        return mentions

    def to_json(
        self, path: str | Path, *, source: str = "", counts: Mapping[str, int] | None = None
    ) -> None:
        """Writes the table as a file to read, edit and give back; the rest is for the reader."""
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "source": source}
        if counts is not None:
            document["counts"] = dict(counts)
        document["entities"] = self.table
        text = json.dumps(document, indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", "utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "EntitySet":
        """Reads what `to_json` writes, or only the object of names and forms in it."""
        try:
            document = json.loads(Path(path).read_text("utf-8-sig"))
        except FileNotFoundError:
            raise UserError(f"there is no entity file at {path}; check the path") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error}); correct the file") from error
        return cls(_table_of(document, path))

    @classmethod
    def published(cls) -> "EntitySet":
        """The published list: 73 classes of 100 words (Sec. 3.1.2; `entity_lists/`)."""
        listed = resources.files("ovseg_jax.data").joinpath("entity_lists/published.json")
        return cls(_table_of(json.loads(listed.read_text("utf-8")), "the published list"))


def joined_tables(tables: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """One table of the entities of several; the first table where all are equal.

    Entities of one name are joined. An entity whose name is a form of an earlier one ("puppy")
    joins that one. A form belongs to the first entity that lists it.
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
    """The table with further entities: names with a word that are no form, or plural, in it."""
    known = EntitySet(table)
    usable = [name for name in names if any(map(str.isalpha, name)) and _form_words(name)]
    new = {name: [] for name in usable if not known.is_form(name)}
    return joined_tables([table, new] if new else [table])


def _table_of(document: Any, path: str | Path) -> dict[str, list[str]]:
    """The table in a parsed file, checked."""
    table = document
    if isinstance(document, dict) and document.get("format") == FORMAT:
        if document.get("version") != VERSION:
            version = document.get("version")
            raise UserError(f"{path} has layout version {version!r}; write the entities again")
        table = document.get("entities")
    well_formed = isinstance(table, dict) and all(
        isinstance(forms, list) and all(isinstance(form, str) for form in forms)
        for forms in table.values()
    )
    if not well_formed:
        example = '{"dog": ["dog", "puppy"]}'
        raise UserError(f"{path} must hold a list of forms for each entity name, as in {example}")
    return table


def _form_words(form: str) -> tuple[str, ...]:
    """The words of a surface form; () if it has a mark in place of a word."""
    tokens = tuple(words(form))
    are_words = all(token.strip(_EDGE) and token != MASK_TOKEN.lower() for token in tokens)
    return tokens if are_words else ()
