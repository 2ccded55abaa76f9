"""Where training records come from, by name: the place to add a data set.

Several data sets are read as one, each for a fixed share of the examples. Position p of the order
(step * batch + slot) goes to one of them by an interleaving in closed form: among any N consecutive
examples a data set has its share of N to within a few. It has epochs and an order of its own.
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

from ovseg_jax.data import records, tokenizer
from ovseg_jax.data.entities import EntitySet, joined_tables
from ovseg_jax.data.order import Pairs, Partner, digest, find_pairs, record_index
from ovseg_jax.data.records import ArrayRecordSource, Record, RecordSource
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.errors import UserError
from ovseg_jax.flags import filled

# Shares are integer multiples of 2^-40: exact at any position, and far finer than an example in a
# run of any length.
_BITS = 40


def _scenes(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    fields = config.scenes
    source = ScenesSource(fields.split, fields.count, fields.seed, fields.size)
    return source, EntitySet(scene_entity_table())


def _records(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    names = config.get("name_templates", (tokenizer.CLIP_NAME,))
    source = ArrayRecordSource(config.records.dir, tokenizer.expand_templates(names))
    return source, EntitySet(source.manifest.entities)


def _mixture(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    if not config.mixture:
        raise UserError(
            "config.data.source is 'mixture', but config.data.mixture is empty; list the data sets "
            "with their weights: ({'weight': 0.7, 'records': {'dir': 'data/a'}}, ...)"
        )
    configs = _mixed_configs(config)
    sources, entity_sets = zip(*(SOURCES[mixed.source](mixed) for mixed in configs), strict=True)
    tables = [entities.table for entities in entity_sets]
    stored = [t for t, mixed in zip(tables, configs, strict=True) if mixed.source == "records"]
    mixture = Mixture(sources, [listed["weight"] for listed in config.mixture])
    return mixture, EntitySet(joined_tables(stored or tables[:1]))


def _mixed_configs(config: ConfigDict) -> list[ConfigDict]:
    """The ``config.data`` of each data set of a mixture: its fields over the common ones."""
    common = {kind: config[kind].to_dict() for kind in SOURCES if kind != "mixture"}
    configs = []
    for number, listed in enumerate(config.mixture):
        where, wanted = f"config.data.mixture[{number}]", f"a weight and one of {', '.join(common)}"
        if not isinstance(listed, Mapping | ConfigDict):
            raise UserError(f"{where} is {listed!r}; it needs {wanted}")
        fields = filled(listed, {"weight": None, **common}, where)
        named = [kind for kind in common if kind in listed]
        if "weight" not in listed or len(named) != 1:
            raise UserError(f"{where} needs {wanted}")
        (kind,) = named
        configs.append(ConfigDict({**config.to_dict(), "source": kind, kind: fields[kind]}))
    return configs


SOURCES: dict[str, Callable[[ConfigDict], tuple[RecordSource, EntitySet]]] = {
    "scenes": _scenes,
    "records": _records,
    "mixture": _mixture,
}


def make_source(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    """The records and entities that `config` (``config.data``) names; a mixture's are joined."""
    if config.source not in SOURCES:
        raise UserError(f"config.data.source is {config.source!r}; there are: {', '.join(SOURCES)}")
    return SOURCES[config.source](config)


def missing_data(config: ConfigDict) -> list[str]:
    """What the source needs and lacks, one line each with what to do; empty if nothing."""
    configs = {"config.data.records.dir": config}
    if config.source == "mixture":
        mixed = enumerate(_mixed_configs(config))
        configs = {f"config.data.mixture[{number}].records.dir": data for number, data in mixed}
    name = records.MANIFEST_NAME
    return [
        f"training records: {where} = {data.records.dir!r} has no {name}; write them with "
        "python -m ovseg_jax.prepare, or point it at a folder that has been prepared"
        for where, data in configs.items()
        if data.source == "records" and not (Path(data.records.dir) / name).is_file()
    ]


# ---- several data sets as one


class Mixture:
    """A record source that joins `parts`; record i of data set p is record `starts[p] + i`.

    Their `weights`, the shares of the examples, add up to 1. A key begins with the number of its
    data set ("1/000042"), because two may use the same keys.

    Raises:
      UserError: a data set is empty, or a weight is no positive number.
    """

    def __init__(self, parts: Sequence[RecordSource], weights: Sequence[Any]):
        for part, weight in zip(parts, weights, strict=True):
            if not len(part):
                raise UserError(f"the data set {part.name} has no records; take it out of the mix")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise UserError(f"the weight {weight!r} of {part.name} must be a number above 0")
        total = math.fsum(weights)
        self.parts = tuple(parts)
        self.weights = tuple(weight / total for weight in weights)
        self.starts = tuple(sum(map(len, parts[:number])) for number in range(len(parts)))
        shares = zip(self.weights, parts, strict=True)
        self.name = "mixture of " + ", ".join(f"{share:.3g} {part.name}" for share, part in shares)
        self._cuts = _cuts(self.weights)

    def __len__(self) -> int:
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
        return [f"{n}/{key}" for n, part in enumerate(self.parts) for key in part.keys()]

    def captions(self) -> list[Sequence[str]]:
        return [captions for part in self.parts for captions in part.captions()]

    def caption_sample(self, most: int) -> list[str]:
        """Up to about `most` captions, of each data set by its share of the examples."""
        sample = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            sample += records.sample_captions(part, max(1, round(most * weight)))
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
        self._mixture, self._pairs = mixture, pairs

    def partner(self, rng: np.random.Generator, record: int, entities: Sequence[int]) -> Partner:
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
    rests = [math.fsum(weights[number:]) for number in range(len(weights))]
    shares = [round(w / rest * 2**_BITS) for w, rest in zip(weights, rests, strict=True)]
    # Every data set comes up some time, however small its weight.
    return tuple(min(max(share, 1), 2**_BITS - 1) for share in shares[:-1])
