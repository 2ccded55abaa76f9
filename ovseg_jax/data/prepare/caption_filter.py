"""Entities of a caption, as `EntitySet.find` finds them, at many times its speed.

The word tokenizer looks at each blank-separated piece of a text alone, but for quotes and for the
text's last period, which is no part of a word anyway. Captions repeat their pieces, so what the
tokenizer makes of a piece is remembered. Texts with quotes that are no apostrophes inside a word,
and those with a mask token, go the long way.
"""

import re

from ovseg_jax.data.entities import MASK_TOKEN, EntitySet
from ovseg_jax.data.words import words

# Pieces remembered at most; then all are forgotten. Bounds memory, never changes a result.
_MOST_PIECES = 200_000
_LONGEST_PIECE = 40
_QUOTES = r"'\u2018\u2019"
# A quote that a rule of the tokenizer may join with its neighbor across a blank.
_ENTANGLED = re.compile(rf"(?<!\w)[{_QUOTES}]|[{_QUOTES}](?!\w)")
# The tokenizer gets blanks in their place.
_DOUBLE = re.compile('["`\u201c\u201d\u201e\u00ab\u00bb]')


class CaptionFilter:
    """Finds the entities of captions.

    Args:
      entity_set: the entities.
    """

    def __init__(self, entity_set: EntitySet):
        self._entity_set = entity_set
        self._first_words = entity_set.first_words()
        # The last period of a text is a token or not, which only forms with such a token can see.
        self._exact = all(any(map(str.isalnum, word)) for word in entity_set.vocabulary())
        self._words: dict[str, tuple[str, ...]] = {}
        self._cold: set[str] = set()  # pieces in which no form begins

    def find(self, caption: str) -> tuple[int, ...]:
        """Sorted ids of the entities that the caption names, each once: `EntitySet.find`."""
        plain = _DOUBLE.sub(" ", caption)
        if not self._exact or _ENTANGLED.search(plain) or MASK_TOKEN in caption:
            return self._entity_set.find(caption)
        pieces = plain.split()
        if self._cold.issuperset(pieces):
            return ()
        tokens: list[str] = []
        for piece in pieces:
            tokens.extend(self._words.get(piece) or self._learn(piece))
        return self._entity_set.among(tokens)

    def _learn(self, piece: str) -> tuple[str, ...]:
        # A word that no rule knows comes after: the end of a text has rules of its own.
        found = tuple(words(piece + " x")[:-1])
        if len(piece) <= _LONGEST_PIECE:
            if len(self._words) >= _MOST_PIECES:
                self._words.clear()
                self._cold.clear()
            self._words[piece] = found
            if self._first_words.isdisjoint(found):
                self._cold.add(piece)
        return found
