"""The words of the softmax and the classes that they stand for.

A class may have several words, ``cat|kitten|tabby``: its probability at a pixel is that of its best
word. Words may also stand for the background, which then wins their pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ovseg_jax.errors import UserError

BACKGROUND = -1
BETWEEN = "|"
# Nouns for what surrounds the subject of a photograph. A word whose last noun is one of these, such
# as "dirt road", is not held to be background for resembling the border of the image.
SURROUNDINGS = frozenset(
    "sky cloud clouds ground floor wall walls ceiling grass lawn field meadow tree trees forest "
    "woods bush bushes hedge leaves vegetation water sea ocean lake river pond beach sand desert "
    "snow ice mountain mountains hill hills cliff rock rocks soil dirt mud earth land road street "
    "highway path pavement sidewalk railroad track building buildings house houses skyscraper "
    "city landscape background scenery surroundings fence carpet rug tiles curtain curtains room "
    "court playingfield platform".split()
)


@dataclass(frozen=True)
class Vocabulary:
    """C classes and the W words that compete for a pixel.

    Attributes:
      classes: what the classes are called in results: the first word of each.
      words: what the text encoder is asked for.
      owners: the class of each word, `BACKGROUND` where it stands for the background.
    """

    classes: tuple[str, ...]
    words: tuple[str, ...]
    owners: tuple[int, ...]

    @classmethod
    def of(cls, entries: Sequence[str], background: Sequence[str] = ()) -> "Vocabulary":
        """From one entry a class, synonyms between bars, and words for the background.

        Raises:
          UserError: no class, an empty word, or a word that is listed twice.
        """
        if isinstance(entries, str):
            raise UserError(f"classes is a list of names: [{entries!r}], not one text")
        if entries is None or not all(isinstance(x, str) for x in [*entries, *background]):
            raise UserError(f"classes is a list of names, not {entries!r}")
        if not len(entries):
            raise UserError("no classes: name at least one, for example --classes='cat,dog'")
        words, owners, seen = [], [], set()
        for owner, entry in [*enumerate(entries), *((BACKGROUND, word) for word in background)]:
            parts = entry.split(BETWEEN) if owner != BACKGROUND else [entry]
            for word in (part.strip() for part in parts):
                if not word:
                    raise UserError(f"empty class name in {[*entries, *background]}")
                if word.lower() in seen:
                    raise UserError(f"class {word!r} is listed twice")
                seen.add(word.lower())
                words.append(word)
                owners.append(owner)
        names = tuple(entry.split(BETWEEN)[0].strip() for entry in entries)
        return cls(names, tuple(words), tuple(owners))

    @property
    def things(self) -> tuple[bool, ...]:
        """For each word, whether it names a thing rather than `SURROUNDINGS`."""
        return tuple(word.lower().split()[-1] not in SURROUNDINGS for word in self.words)

    def with_background(self, words: Sequence[str]) -> "Vocabulary":
        """The same with more words for the background (those not there yet)."""
        have = {word.lower() for word in self.words}
        more = tuple(word for word in words if word.lower() not in have)
        return Vocabulary(self.classes, self.words + more, self.owners + (BACKGROUND,) * len(more))

    def lines(self) -> tuple[str, ...]:
        """One text a class with its synonyms, then the background's words: to show and to hash."""
        by_class: dict[int, list[str]] = {}
        for word, owner in zip(self.words, self.owners, strict=True):
            by_class.setdefault(owner, []).append(word)
        lines = [BETWEEN.join(by_class[i]) for i in range(len(self.classes))]
        if BACKGROUND in by_class:
            lines.append(f"background: {BETWEEN.join(by_class[BACKGROUND])}")
        return tuple(lines)
