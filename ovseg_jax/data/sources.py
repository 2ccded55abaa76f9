"""Where training records come from, by name: the place to add a data set.

Several data sets are read as one, each for a fixed share of the examples. Position p of the order
(step * batch + slot) goes to one of the data sets by an interleaving in closed form. Among any N
consecutive examples a data set has its share of N to within a few examples. A data set has epochs
and an order of its own: a small set with a large share may be in its tenth epoch while a large one
is in its first.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.data.captions import CLIP_NAME, expand_templates
from ovseg_jax.data.entities import EntitySet, joined_tables
from ovseg_jax.data.order import Pairs, digest, find_pairs, record_index
from ovseg_jax.data.records import (
    MANIFEST_NAME,
    ArrayRecordSource,
    Record,
    RecordSource,
    keys_of,
    sample_captions,
)
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

# Shares are integer multiples of 2^-40: exact at any position, and far finer than an example in a
# run of any length.
_BITS = 40


def _scenes(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    entities = EntitySet(scene_entity_table())
    fields = config.scenes
    source = ScenesSource(fields.split, fields.count, fields.seed, fields.size, entities)
    return source, entities


def _records(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    templates = expand_templates(config.get("name_templates", (CLIP_NAME,)))
    source = ArrayRecordSource(config.records.dir, templates)
    return source, EntitySet(source.manifest.entities)


def _mixture(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    if not config.mixture:
        raise UserError(
            "config.data.source is 'mixture', but config.data.mixture is empty; list the data sets "
            "with their weights: ({'weight': 0.7, 'records': {'dir': 'data/a'}}, ...)"
        )
    configs = _mixed_configs(config)
    sources, entity_sets = zip(*(SOURCES[mixed.source](mixed) for mixed in configs), strict=True)
    stored = [
        entities.table
        for mixed, entities in zip(configs, entity_sets, strict=True)
        if mixed.source == "records"
    ]
    mixture = Mixture(sources, [listed["weight"] for listed in config.mixture])
    return mixture, EntitySet(joined_tables(stored or [entity_sets[0].table]))


def _mixed_configs(config: ConfigDict) -> list[ConfigDict]:
    """The ``config.data`` of each data set of a mixture: its fields over the common ones."""
    kinds = [kind for kind in SOURCES if kind != "mixture"]
    configs = []
    for number, listed in enumerate(config.mixture):
        where = f"config.data.mixture[{number}]"
        fields = _fields(listed, ["weight", *kinds], where)
        named = [kind for kind in kinds if kind in fields]
        if "weight" not in fields or len(named) != 1:
            raise UserError(f"{where} needs a weight and one of {', '.join(kinds)}")
        (kind,) = named
        common = config[kind].to_dict()
        common |= _fields(fields[kind], list(common), f"{where}.{kind}")
        configs.append(ConfigDict({**config.to_dict(), "source": kind, kind: common}))
    return configs


def _fields(value: Any, known: list[str], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping | ConfigDict):
        raise UserError(f"{where} is {value!r}; it must have fields, of {', '.join(known)}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}.{key} is no field{nearest(key, known)}")
    return dict(value)


SOURCES: dict[str, Callable[[ConfigDict], tuple[RecordSource, EntitySet]]] = {
    "scenes": _scenes,
    "records": _records,
    "mixture": _mixture,
}


def make_source(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    """The records and entities that `config` (a run's ``config.data``) names.

    A mixture has the entities of all its stored records (`entities.joined_tables`), which also
    serve its scenes. An entity -> records index on disk is used only if its folder has this very
    table.

    Raises:
      UserError: the source is unknown, or refuses its settings.
    """
    if config.source not in SOURCES:
        raise UserError(f"config.data.source is {config.source!r}; there are: {', '.join(SOURCES)}")
    return SOURCES[config.source](config)


def missing_data(config: ConfigDict) -> list[str]:
    """What the source needs and lacks, one line each with what to do; empty if nothing."""
    configs = {"config.data.records.dir": config}
    if config.source == "mixture":
        configs = {
            f"config.data.mixture[{number}].records.dir": mixed
            for number, mixed in enumerate(_mixed_configs(config))
        }
    return [
        f"training records: {where} = {data.records.dir!r} has no {MANIFEST_NAME}; write them with "
        "python -m ovseg_jax.prepare, or point it at a folder that has been prepared"
        for where, data in configs.items()
        if data.source == "records" and not (Path(data.records.dir) / MANIFEST_NAME).is_file()
    ]


# ---- several data sets as one


class Mixture:
    """A record source that joins others; record i of data set p is record `starts[p] + i`.

    A key begins with the number of its data set ("1/000042"), because two data sets may use the
    same keys.

    Attributes:
      parts: the data sets.
      starts: where each begins among all records.
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
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in a mixture")
        part = self.part_of(index)
        record = self.parts[part][index - self.starts[part]]
        return replace(record, key=f"{part}/{record.key}")

    def part_of(self, index: int) -> int:
        """The data set of a record."""
        return bisect_right(self.starts, index) - 1

    def record_at(self, seed: int, position: int) -> tuple[int, int]:
        """(epoch of its data set, record index) of a position of the order."""
        part, at = interleaved(position, self._cuts)
        # Data sets of the same size differ in their order too.
        part_seed = digest(f"part/{seed}/{part}", 8)
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
        """Partners of the records, each within its own data set (Sec. 3.2.3)."""
        return MixturePairs(self, [find_pairs(part, entity_set) for part in self.parts])


class MixturePairs:
    """The partners of a mixture's records."""

    def __init__(self, mixture: Mixture, pairs: Sequence[Pairs]):
        self._mixture, self._pairs = mixture, tuple(pairs)

    def partner(
        self, rng: np.random.Generator, record: int, entities: Sequence[int]
    ) -> tuple[int | None, int | None]:
        """As `PairIndex.partner`, with record indices of the mixture."""
        part = self._mixture.part_of(record)
        start = self._mixture.starts[part]
        partner, shared = self._pairs[part].partner(rng, record - start, entities)
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
