"""Entities of a caption, as `EntitySet.find` finds them, at many times its speed.

Two steps. A caption without any letters and digits in a row that stand in an entity's form names
none: this looks at nothing but the text, and settles most captions. For the rest, the word
tokenizer looks at each blank-separated piece of a text alone, but for quotes and for the text's
last period. Captions repeat their pieces, so what the tokenizer makes of a piece is remembered; and
of plain pieces ("dogs," or "(T-shirt)") it is known without asking. Texts with quotes that are no
apostrophes inside a word, and the few others in which pieces are not independent, go the long way.
"""

import re
from collections.abc import Collection, Sequence

from ovseg_jax.data.entities import MASK_TOKEN, EntitySet
from ovseg_jax.data.words import words

# Pieces remembered at most; then all are forgotten. Bounds memory, never changes a result.
_MOST_PIECES = 200_000
_LONGEST_PIECE = 40
_QUOTES = "'\u2018\u2019"
# A quote that a rule of the tokenizer may join with its neighbor across a blank.
_ENTANGLED = re.compile(rf"(?<!\w)[{_QUOTES}]|[{_QUOTES}](?!\w)")
# The tokenizer gets blanks in their place.
_DOUBLE = re.compile('["`\u201c\u201d\u201e\u00ab\u00bb]')
# After the last period of a text only these may stand, and it is cut off what it stands behind.
_CLOSING = ")]}>"
# Words whose cutting depends on a blank behind them, which the last period's being cut off gives.
_CUT_BEFORE_BLANK = re.compile(rf"[{_QUOTES}]|wanna", re.IGNORECASE)
# Brackets, a word, possibly its possessive ending, and marks that are words of their own; or a word
# and a period, which is taken off it.
_PLAIN = re.compile(
    rf"([(\[]*)([A-Za-z0-9]+(?:[-/][A-Za-z0-9]+)*)(?:([{_QUOTES}][sS])?([)\],;:!?]*)|\.)"
)
_INNER = re.compile("[-/]")
_CUT_IN_TWO = frozenset("cannot gimme gonna gotta lemme wanna".split())


# A run of letters and digits, and what the tokenizer may cut off one; others it keeps whole.
_RUN = re.compile("[a-z0-9]+")
_FORM = re.compile("[a-z0-9]+(?:[-/'.&][a-z0-9]+)*")
_CUT_OFF = frozenset("can not gim me gon na got ta lem wan is was t d ye more n".split())


class CaptionFilter:
    """Finds the entities of captions.

    Args:
      entity_set: the entities.
    """

    def __init__(self, entity_set: EntitySet):
        self._entity_set = entity_set
        # How many marks stand between two words only forms with such a mark can see.
        self._exact = all(any(map(str.isalnum, word)) for word in entity_set.vocabulary())
        self._runs = _telling_runs(entity_set.first_words())
        self._words: dict[str, tuple[str, ...]] = {}

    def find(self, caption: str) -> tuple[int, ...]:
        """Sorted ids of the entities that the caption names, each once: `EntitySet.find`."""
        if self._runs is not None and self._runs.isdisjoint(_RUN.findall(caption.lower())):
            return ()
        plain = _DOUBLE.sub(" ", caption)
        pieces = plain.split()
        if (
            not self._exact
            or MASK_TOKEN in caption
            or _ENTANGLED.search(plain)
            or _last_period_matters(pieces)
        ):
            return self._entity_set.find(caption)
        tokens: list[str] = []
        for piece in pieces:
            tokens.extend(self._words.get(piece) or self._learn(piece))
        return self._entity_set.among(tokens)

    def _learn(self, piece: str) -> tuple[str, ...]:
        found = _words_of(piece)
        if len(piece) <= _LONGEST_PIECE:
            if len(self._words) >= _MOST_PIECES:
                self._words.clear()
            self._words[piece] = found
        return found


def _telling_runs(first_words: Collection[str]) -> frozenset[str] | None:
    """Runs of which a caption with a mention has at least one; None where no such set is known.

    A run is a word's longest. The tokenizer gives back a whole run of the text, or one without the
    n of "n't", or a part of the few words that it cuts in two.
    """
    found = set()
    for word in first_words:
        if not _FORM.fullmatch(word):
            return None
        run = max(_RUN.findall(word), key=len)
        if run in _CUT_OFF:
            return None
        found |= {run, run + "n"}
    return frozenset(found)


def _words_of(piece: str) -> tuple[str, ...]:
    """The words of a piece that another one follows."""
    plain = _PLAIN.fullmatch(piece)
    if plain:
        before, word, possessive, after = plain.groups(default="")
        word = word.lower()
        if _CUT_IN_TWO.isdisjoint(_INNER.split(word)):
            return (*before, word, *("s" if possessive else ""), *after)
    # A word that no rule knows comes after: the end of a text has rules of its own.
    return tuple(words(piece + " x")[:-1])


def _last_period_matters(pieces: Sequence[str]) -> bool:
    """Whether cutting off the text's last period changes the word before it."""
    for piece in reversed(pieces):
        rest = piece.rstrip(_CLOSING)
        if rest:
            return rest.endswith(".") and bool(_CUT_BEFORE_BLANK.search(rest))
    return False
