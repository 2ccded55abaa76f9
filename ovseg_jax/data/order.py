"""Which record comes in which slot of which step, its partner, and the randomness of an example.

All are pure functions, so a run does not depend on the number of processes or workers that read the
data, and can resume at any step.
"""

import functools
import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int64

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.records import ArrayRecordSource, RecordSource
from ovseg_jax.errors import UserError

# Feistel rounds of the index permutation; Grain allows no fewer.
_ROUNDS = 4
# (partner record, shared entity), or (None, None) where there is no other record.
Partner = tuple[int | None, int | None]


def record_index(seed: int, n_records: int, position: int) -> tuple[int, int]:
    """(epoch, record index) of a position in the order of examples, of which slots are offsets.

    Epochs follow each other without a gap, and every epoch is another permutation of the records.
    """
    if n_records < 1:
        raise UserError("the data set has no records; check its path and its filters")
    epoch, offset = divmod(position, n_records)
    key = digest(f"order/{seed}/{epoch}", 4)
    return epoch, int(grain.experimental.index_shuffle(offset, n_records - 1, key, _ROUNDS))


def example_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of everything random about the record `key` in an epoch."""
    return np.random.Generator(np.random.Philox(key=digest(f"example/{seed}/{epoch}/{key}", 16)))


def digest(text: str, size: int) -> int:
    """An integer of `size` bytes. A hash, so that neighboring seeds and epochs share nothing."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little")


@runtime_checkable
class Pairs(Protocol):
    """Draws partners of records, as `PairIndex` does."""

    def partner(
        self, rng: np.random.Generator, record: int, entities: Sequence[int]
    ) -> Partner: ...


class PairIndex:
    """Entity -> records that name it, as two flat arrays (8 bytes a mention).

    Attributes:
      starts: [entities + 1]; entity e has the records `records[starts[e]:starts[e + 1]]`.
      records: record indices, ascending within an entity.
    """

    def __init__(
        self, starts: Int64[np.ndarray, "entities_plus_one"], records: Int64[np.ndarray, "mentions"]
    ):
        self.starts = starts
        self.records = records

    @classmethod
    def build(cls, entity_lists: Iterable[Collection[int]]) -> "PairIndex":
        """The index of records with these entity ids."""
        # An id counts once, however often the captions name the entity.
        ids = [np.unique(np.fromiter(listed, np.int64)) for listed in entity_lists]
        entity = np.concatenate([np.zeros(0, np.int64), *ids])
        records = np.repeat(np.arange(len(ids)), np.array([unique.size for unique in ids], int))
        starts = np.concatenate([[0], np.cumsum(np.bincount(entity, minlength=1))])
        # A stable sort keeps records ascending within an entity.
        return cls(starts.astype(np.int64), records[np.argsort(entity, kind="stable")])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, entity: int) -> Int64[np.ndarray, "members"]:
        """The records that name an entity; none for an entity that no caption names."""
        if not 0 <= entity < len(self):
            return self.records[:0]
        return self.records[self.starts[entity] : self.starts[entity + 1]]

    def partner(self, rng: np.random.Generator, record: int, entities: Sequence[int]) -> Partner:
        """Draws another record that shares an entity with this one (Sec. 3.2.3).

        The entity is uniform over those of `entities` that another record names too, and the
        partner is uniform over the other records with it. Draws two numbers when there is a
        partner, none otherwise.
        """
        choices = []
        for entity in entities:
            members = self.members(entity)
            at = int(np.searchsorted(members, record))
            is_member = at < members.size and members[at] == record
            if members.size > is_member:
                choices.append((entity, members, at if is_member else members.size))
        if not choices:
            return None, None
        entity, members, at = choices[int(rng.integers(len(choices)))]
        # `at` is the position of the record itself, or the end: draw among the others.
        drawn = int(rng.integers(members.size - (at < members.size)))
        return int(members[drawn + (drawn >= at)]), int(entity)


def find_pairs(source: RecordSource, entity_set: EntitySet) -> Pairs:
    """The partners in a source, from the index that `ovseg_jax.prepare` stored, or a new one."""
    if hasattr(source, "find_pairs"):
        return source.find_pairs(entity_set)
    # Ids are positions: the order of the table counts.
    if isinstance(source, ArrayRecordSource) and list(source.manifest.entities.items()) == list(
        entity_set.table.items()
    ):
        stored = source.entity_index()
        if stored is not None:
            return PairIndex(*stored)

    # Photographs of a class share hundreds of captions.
    @functools.lru_cache(maxsize=100_000)
    def named(captions: Sequence[str]) -> set[int]:
        return {entity for text in captions for entity in entity_set.find(text)}

    return PairIndex.build(map(named, source.captions()))
