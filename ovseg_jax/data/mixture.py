"""Several data sets read as one, each for a fixed share of the examples.

Position p of the order (step * batch + slot) goes to one of the data sets by an interleaving that
is computed in closed form, so the order stays a pure function of (seed, step, slot). Among any N
examples in a row a data set has its share of N to within a few examples; so has every batch. A
data set runs through epochs of its own: each of its records once, in an order of its own, before
any of them again, while a small set with a large share is in its tenth epoch and a large one still
in its first.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ovseg_jax.data.order import part_seed, record_index
from ovseg_jax.data.pairs import PairIndex
from ovseg_jax.data.records import Record, RecordSource, keys_of, sample_captions
from ovseg_jax.errors import UserError

# Shares are whole multiples of 2^-40: exact integers at any position, and far finer than an
# example in a run of any length.
_BITS = 40


class Mixture:
    """A record source that joins others; record i of part p is record `starts[p] + i`.

    Keys get the number of their part ("1/000042"), as two data sets may use the same ones.

    Attributes:
      parts: the data sets. starts: where each begins among all records.
      weights: their shares of the examples; they add up to 1.

    Raises:
      UserError: no part, an empty one, or a weight that is no positive number.
    """

    def __init__(self, parts: Sequence[RecordSource], weights: Sequence[Any]):
        if not parts or len(parts) != len(weights):
            raise UserError(f"a mixture of {len(parts)} data sets has {len(weights)} weights")
        for part, weight in zip(parts, weights, strict=True):
            if not len(part):
                raise UserError(f"the data set {part.name} has no records; take it out of the mix")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise UserError(
                    f"the weight {weight!r} of the data set {part.name} must be a number above 0"
                )
        total = math.fsum(weights)
        self.parts = tuple(parts)
        self.weights = tuple(weight / total for weight in weights)
        self.starts = tuple(sum(map(len, parts[:number])) for number in range(len(parts)))
        self.name = "mixture of " + ", ".join(
            f"{weight:.3g} {part.name}" for weight, part in zip(self.weights, parts, strict=True)
        )
        self._cuts = _cuts(self.weights)

    def __len__(self) -> int:
        """Records of all parts: the examples that count as one epoch of the mixture."""
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Record:
        part, inside = self.part_of(index)
        record = self.parts[part][inside]
        return replace(record, key=f"{part}/{record.key}")

    def part_of(self, index: int) -> tuple[int, int]:
        """(part, record index within it) of a record.

        Raises:
          IndexError: no such record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in a mixture")
        part = bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]

    def record_at(self, seed: int, position: int) -> tuple[int, int]:
        """(epoch of its data set, record index) of a position of the order."""
        part, at = interleaved(position, self._cuts)
        epoch, index = record_index(part_seed(seed, part), len(self.parts[part]), at)
        return epoch, self.starts[part] + index

    def keys(self) -> list[str]:
        return [f"{n}/{key}" for n, part in enumerate(self.parts) for key in keys_of(part)]

    def captions(self) -> list[Sequence[str]]:
        return [captions for part in self.parts for captions in part.captions()]

    def caption_sample(self, most: int) -> list[str]:
        """Up to about `most` captions, of each part by its share of the examples."""
        found = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            found += sample_captions(part, max(1, round(most * weight)))
        return found

    def fingerprint(self) -> str:
        # Without the weights, which change no record: caches of features serve any of them.
        text = "/".join(part.fingerprint() for part in self.parts)
        return hashlib.sha256(f"mixture/{text}".encode()).hexdigest()[:16]


class MixturePairs:
    """The partners of a mixture's records, drawn within their own data set (Sec. 3.2.3)."""

    def __init__(self, starts: Sequence[int], parts: Sequence[PairIndex]):
        self._starts, self._parts = tuple(starts), tuple(parts)

    def partner(
        self, rng: np.random.Generator, record: int, entities: Sequence[int]
    ) -> tuple[int | None, int | None]:
        """As `PairIndex.partner`, with record indices of the mixture."""
        part = bisect_right(self._starts, record) - 1
        start = self._starts[part]
        partner, shared = self._parts[part].partner(rng, record - start, entities)
        return (None if partner is None else start + partner), shared


def interleaved(position: int, cuts: Sequence[int]) -> tuple[int, int]:
    """(part, how many positions before this one are of that part) of a position.

    The first part takes the positions at which floor(p * share) grows; what is left is numbered
    anew and divided between the others in the same way.

    Args:
      cuts: for each part but the last, its share of what the parts before it leave, in 2^-40.
    """
    for part, share in enumerate(cuts):
        before = position * share >> _BITS
        if (position + 1) * share >> _BITS > before:
            return part, before
        position -= before
    return len(cuts), position


def _cuts(weights: Sequence[float]) -> tuple[int, ...]:
    cuts = []
    for number, weight in enumerate(weights[:-1]):
        share = round(weight / math.fsum(weights[number:]) * 2**_BITS)
        # Every part comes up some time, however small its weight.
        cuts.append(min(max(share, 1), 2**_BITS - 1))
    return tuple(cuts)
