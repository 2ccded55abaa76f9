"""Where the entity -> records index of a record source comes from: its folder, or its captions.

A record is listed under the entities of any of its captions.
"""

from collections.abc import Sequence

from ovseg_jax.data.caption_filter import CaptionFilter
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.mixture import Mixture, MixturePairs
from ovseg_jax.data.pairs import PairIndex
from ovseg_jax.data.records import ArrayRecordSource, ClassCaptions, RecordSource


def find_pairs(source: RecordSource, entity_set: EntitySet) -> PairIndex | MixturePairs:
    """The index of a source: the one `ovseg_jax.prepare` stored, or made from all captions."""
    if isinstance(source, Mixture):
        return MixturePairs(source.starts, [_pairs(part, entity_set) for part in source.parts])
    return _pairs(source, entity_set)


def _pairs(source: RecordSource, entity_set: EntitySet) -> PairIndex:
    stored = stored_pairs(source, entity_set)
    if stored is not None:
        return stored
    find = CaptionFilter(entity_set).find
    # Photographs of one class have the same captions, many hundreds of them.
    of_class: dict[ClassCaptions, set[int]] = {}

    def named(captions: Sequence[str]) -> set[int]:
        if captions in of_class:
            return of_class[captions]
        found = {entity for text in captions for entity in find(text)}
        if isinstance(captions, ClassCaptions):
            of_class[captions] = found
        return found

    return PairIndex.build(map(named, source.captions()))


def stored_pairs(source: RecordSource, entity_set: EntitySet) -> PairIndex | None:
    """The index on disk, if there is one and it is of these entities."""
    if not isinstance(source, ArrayRecordSource) or list(source.manifest.entities.items()) != list(
        entity_set.table.items()
    ):
        return None
    return source.entity_index()
