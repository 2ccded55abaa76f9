"""The second image of a pair: another record that names one of the same entities (Sec. 3.2.3)."""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Int64

from ovseg_jax.errors import UserError


class PairIndex:
    """Entity -> records that name it, as two flat arrays (8 bytes a mention).

    Attributes:
      starts: [entities + 1]; entity e has the records `records[starts[e]:starts[e + 1]]`.
      records: record indices, ascending within an entity.
    """

    def __init__(
        self,
        starts: Int64[np.ndarray, "entities_plus_one"],  # noqa: F821
        records: Int64[np.ndarray, "mentions"],  # noqa: F821
    ):
        self.starts = starts
        self.records = records

    @classmethod
    def build(cls, entity_lists: Iterable[Collection[int]]) -> "PairIndex":
        """Makes the index from the entity ids of each record, in record order.

        Raises:
          UserError: an entity id is negative.
        """
        entities, records = [], []
        for record, ids in enumerate(entity_lists):
            # An id counts once, however often the caption names the entity.
            unique = np.unique(np.fromiter(ids, np.int64))
            if unique.size and unique[0] < 0:
                raise UserError(f"record {record} has the entity id {unique[0]}; ids begin at 0")
            entities.append(unique)
            records.append(np.full(unique.size, record, np.int64))
        entity = np.concatenate(entities) if entities else np.zeros(0, np.int64)
        record_ids = np.concatenate(records) if records else np.zeros(0, np.int64)
        # A stable sort keeps records ascending within an entity.
        order = np.argsort(entity, kind="stable")
        counts = np.bincount(entity, minlength=1)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        return cls(starts, record_ids[order])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, entity: int) -> Int64[np.ndarray, "members"]:  # noqa: F821
        """The records that name an entity; none for an entity that no caption names."""
        if not 0 <= entity < len(self):
            return self.records[:0]
        return self.records[self.starts[entity] : self.starts[entity + 1]]

    def partner(
        self, rng: np.random.Generator, record: int, entities: Sequence[int]
    ) -> tuple[int | None, int | None]:
        """Draws (partner record, shared entity), or (None, None) when there is no other record.

        The entity is uniform over those of `entities` that another record names too, then the
        partner is uniform over the other records with it. Never the record itself. Draws two
        numbers when there is a partner, none otherwise.
        """
        choices = []
        for entity in entities:
            members = self.members(entity)
            at = int(np.searchsorted(members, record))
            own = at < members.size and members[at] == record
            if members.size > own:
                choices.append((entity, members, at if own else members.size))
        if not choices:
            return None, None
        entity, members, at = choices[int(rng.integers(len(choices)))]
        # `at` is where the record itself stands (the end if it does not): draw among the others.
        drawn = int(rng.integers(members.size - (at < members.size)))
        return int(members[drawn + (drawn >= at)]), int(entity)
