"""Entities: which of a fixed set of visual nouns a caption names, and where (Sec. 3.1.2).

An entity has a name and surface forms: the words a caption may use for it. Plurals of the forms
are found without being listed. Ids are positions in the table.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ovseg_jax.data.plurals import plurals
from ovseg_jax.data.words import word_at, word_spans, words
from ovseg_jax.errors import UserError

MASK_TOKEN = "[MASK]"


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

    def spans(self, caption: str) -> list[tuple[int, int, int]]:
        """(start, end, entity id) of every mention, in order, without overlaps.

        Upper and lower case are the same; of two forms that begin at one word the longer is taken.
        The mask token itself is never a mention, even if "mask" is an entity.
        """
        positions = word_spans(caption)
        tokens = [word_at(caption, position) for position in positions]
        masked = _literal_positions(caption, MASK_TOKEN)
        found = []
        at = 0
        while at < len(tokens):
            taken = 1
            inside_mask = any(
                start <= positions[at][0] < start + len(MASK_TOKEN) for start in masked
            )
            longest = 0 if inside_mask else self._longest.get(tokens[at], 0)
            for length in range(min(longest, len(tokens) - at), 0, -1):
                identity = self._ids.get(tuple(tokens[at : at + length]))
                if identity is not None:
                    found.append((positions[at][0], positions[at + length - 1][1], identity))
                    taken = length
                    break
            at += taken
        return found

    def find(self, caption: str) -> tuple[int, ...]:
        """Sorted ids of the entities that the caption names, each once."""
        return tuple(sorted({identity for _, _, identity in self.spans(caption)}))

    def to_json(self, path: str | Path) -> None:
        """Writes the table as one JSON object, name -> forms, in id order."""
        Path(path).write_text(json.dumps(self.table, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "EntitySet":
        """Reads a table that `to_json`, or a person, wrote.

        Raises:
          UserError: the file is missing or is not an object of lists of strings.
        """
        try:
            table = json.loads(Path(path).read_text("utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"there is no entity file at {path}; check the path") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error}); correct the file") from error
        well_formed = isinstance(table, dict) and all(
            isinstance(forms, list) and all(isinstance(form, str) for form in forms)
            for forms in table.values()
        )
        if not well_formed:
            raise UserError(
                f'{path} must hold one JSON object such as {{"dog": ["dog", "puppy"]}}: a list of '
                "surface forms for each entity name"
            )
        return cls(table)


def _literal_positions(text: str, literal: str) -> list[int]:
    positions = []
    at = text.find(literal)
    while at >= 0:
        positions.append(at)
        at = text.find(literal, at + len(literal))
    return positions
