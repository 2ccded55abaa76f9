"""Which record comes in which slot of which step, and the randomness of an example.

All are pure functions, so a run does not depend on the number of processes or workers that read the
data, and can resume at any step.

Several data sets are read as one, each for a fixed share of the examples. Position p of the order
(step * batch + slot) goes to one of the data sets by an interleaving in closed form. Among any N
consecutive examples a data set has its share of N to within a few examples. A data set has epochs
and an order of its own: a small set with a large share may be in its tenth epoch while a large one
is in its first.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grain
import numpy as np

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.pairs import Pairs, find_pairs
from ovseg_jax.data.records import Record, RecordSource, keys_of, sample_captions
from ovseg_jax.errors import UserError

# Feistel rounds of the index permutation; Grain allows no fewer.
_ROUNDS = 4
# Shares are integer multiples of 2^-40: exact at any position, and far finer than an example in a
# run of any length.
_BITS = 40


def record_index(seed: int, n_records: int, position: int) -> tuple[int, int]:
    """(epoch, record index) of a position in the order of examples.

    Epochs follow each other without a gap, and every epoch is another permutation of the records.
    Slot s of a step reads position p + s after p examples in the earlier steps. Needs no memory:
    the permutation is computed index by index.

    Raises:
      UserError: there are no records.
    """
    if n_records < 1:
        raise UserError("the data set has no records; check its path and its filters")
    epoch, offset = divmod(position, n_records)
    key = _digest(f"order/{seed}/{epoch}", 4)
    return epoch, int(grain.experimental.index_shuffle(offset, n_records - 1, key, _ROUNDS))


def record_at(source: RecordSource, seed: int, position: int) -> tuple[int, int]:
    """`record_index` for a source, which may be a mixture: the epoch is that of its data set."""
    if isinstance(source, Mixture):
        return source.record_at(seed, position)
    return record_index(seed, len(source), position)


def example_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of everything random about the record `key` in an epoch."""
    return np.random.Generator(np.random.Philox(key=_digest(f"example/{seed}/{epoch}/{key}", 16)))


def _digest(text: str, size: int) -> int:
    # A hash instead of a sum: neighboring seeds and epochs share nothing.
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little")


class Mixture:
    """A record source that joins others; record i of data set p is record `starts[p] + i`.

    A key begins with the number of its data set ("1/000042"), because two data sets may use the
    same keys.

    Attributes:
      parts: the data sets. starts: where each begins among all records.
      weights: their shares of the examples; they add up to 1.

    Raises:
      UserError: there is no data set, one is empty, or a weight is no positive number.
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
        """The number of records of all data sets: an epoch of the mixture."""
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Record:
        part, inside = self.part_of(index)
        record = self.parts[part][inside]
        return replace(record, key=f"{part}/{record.key}")

    def part_of(self, index: int) -> tuple[int, int]:
        """(data set, record index within it) of a record.

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
        # Data sets of the same size differ in their order too.
        part_seed = _digest(f"part/{seed}/{part}", 8)
        epoch, index = record_index(part_seed, len(self.parts[part]), at)
        return epoch, self.starts[part] + index

    def keys(self) -> list[str]:
        return [f"{n}/{key}" for n, part in enumerate(self.parts) for key in keys_of(part)]

    def captions(self) -> list[Sequence[str]]:
        return [captions for part in self.parts for captions in part.captions()]

    def caption_sample(self, most: int) -> list[str]:
        """Up to about `most` captions, of each data set by its share of the examples."""
        sample = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            sample += sample_captions(part, max(1, round(most * weight)))
        return sample

    def fingerprint(self) -> str:
        # Without the weights, which change no record: a cache of features serves any weights.
        text = "/".join(part.fingerprint() for part in self.parts)
        return hashlib.sha256(f"mixture/{text}".encode()).hexdigest()[:16]

    def find_pairs(self, entity_set: EntitySet) -> "MixturePairs":
        """Partners of the records, each within its own data set."""
        return MixturePairs(self.starts, [find_pairs(part, entity_set) for part in self.parts])


class MixturePairs:
    """The partners of a mixture's records, drawn within their own data set (Sec. 3.2.3)."""

    def __init__(self, starts: Sequence[int], parts: Sequence[Pairs]):
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
    """(data set, how many earlier positions belong to it) of a position.

    The first data set has the positions at which floor(p * share) grows. The others divide the
    remaining positions, numbered anew, in the same way.

    Args:
      cuts: for each data set but the last, its share of what the ones before it leave, in 2^-40.
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
        # Every data set comes up some time, however small its weight.
        cuts.append(min(max(share, 1), 2**_BITS - 1))
    return tuple(cuts)
