"""What the records of a part are like, as arrays of counts that add up over parts."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from ovseg_jax.data.prepare.parts import Facts

MOST_WORDS = 80  # longer captions are counted here
# Lower ends of the bins of images' shorter sides, in pixels.
SIDES = (0, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 2048, 4096)


@dataclass(frozen=True)
class Statistics:
    """Counts over records.

    Attributes:
      together: [e, e] records that name both entities; on the diagonal, those that name one.
      words: [MOST_WORDS + 1] captions by number of words.
      sides: [len(SIDES)] records by length of the image's shorter side.
    """

    together: Int64[np.ndarray, "e e"]
    words: Int64[np.ndarray, "w"]
    sides: Int64[np.ndarray, "s"]

    @property
    def entities(self) -> Int64[np.ndarray, "e"]:
        """Records that name each entity."""
        return np.diagonal(self.together).copy()

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.together + other.together, self.words + other.words, self.sides + other.sides
        )


def no_statistics(entities: int) -> Statistics:
    """Those of no record."""
    return Statistics(
        np.zeros((entities, entities), np.int64),
        np.zeros(MOST_WORDS + 1, np.int64),
        np.zeros(len(SIDES), np.int64),
    )


def measure(facts: Facts, kept: Bool[np.ndarray, "n"], entities: int) -> Statistics:
    """The statistics of the records of a part that are kept.

    Args:
      entities: how many there are.
    """
    record, entity = facts.mentions()
    named = np.zeros((len(kept), entities), np.float32)
    named[record, entity] = 1
    named = named[kept]
    # Exact: a part has far fewer than 2^24 records.
    together = np.rint(named.T @ named).astype(np.int64)
    words = facts.words[np.repeat(kept, np.diff(facts.word_ends, prepend=0))]
    words = np.minimum(words, MOST_WORDS)
    sides = np.searchsorted(SIDES, facts.sides[kept], side="right") - 1
    return Statistics(
        together,
        np.bincount(words, minlength=MOST_WORDS + 1).astype(np.int64),
        np.bincount(sides, minlength=len(SIDES)).astype(np.int64),
    )
