"""Where training records come from, by name: the place to add a data set."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data.captions import CLIP_NAME, expand_templates
from ovseg_jax.data.entities import EntitySet, joined_tables
from ovseg_jax.data.order import Mixture
from ovseg_jax.data.records import ArrayRecordSource, RecordSource
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest


def _scenes(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    entities = EntitySet(scene_entity_table())
    fields = config.scenes
    source = ScenesSource(fields.split, fields.count, fields.seed, fields.size, entities)
    return source, entities


def _records(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    source = ArrayRecordSource(
        config.records.dir, expand_templates(config.get("name_templates", (CLIP_NAME,)))
    )
    return source, EntitySet(source.manifest.entities)


def _mixture(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    if not config.mixture:
        raise UserError(
            "config.data.source is 'mixture', but config.data.mixture is empty; list the data sets "
            "with their weights: ({'weight': 0.7, 'records': {'dir': 'data/a'}}, ...)"
        )
    fields = [_part_config(config, number) for number in range(len(config.mixture))]
    found = [SOURCES[part.source](part) for part in fields]
    stored = [own for part, (_, own) in zip(fields, found, strict=True) if _on_disk(part)]
    tables = [own.table for own in stored or [found[0][1]]]
    sources = [source for source, _ in found]
    mixture = Mixture(sources, [fields["weight"] for fields in config.mixture])
    return mixture, EntitySet(joined_tables(tables))


def _part_config(config: ConfigDict, number: int) -> ConfigDict:
    """The ``config.data`` of one data set of a mixture: its own fields over the common ones."""
    where = f"config.data.mixture[{number}]"
    kinds = [kind for kind in SOURCES if kind != "mixture"]
    fields = _fields(config.mixture[number], ["weight", *kinds], where)
    named = [kind for kind in kinds if kind in fields]
    if "weight" not in fields or len(named) != 1:
        raise UserError(f"{where} needs a weight and one of {', '.join(kinds)}")
    kind = named[0]
    common = config[kind].to_dict()
    own = _fields(fields[kind], list(common), f"{where}.{kind}")
    part = {"source": kind, kind: {**common, **own}}
    if "name_templates" in config:
        part["name_templates"] = config.name_templates
    return ConfigDict(part)


def _fields(value: Any, known: list[str], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping | ConfigDict):
        raise UserError(f"{where} is {value!r}; it must have fields, of {', '.join(known)}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}.{key} is no field{nearest(key, known)}")
    return dict(value)


def _on_disk(config: ConfigDict) -> bool:
    return config.source == "records"


SOURCES: dict[str, Callable[[ConfigDict], tuple[RecordSource, EntitySet]]] = {
    "scenes": _scenes,
    "records": _records,
    "mixture": _mixture,
}


def make_source(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    """The records and entities that `config` (a run's ``config.data``) names.

    A mixture has the entities of all its stored records (`entities.joined_tables`); scenes in it
    are matched against these. Ids are found anew in the captions, and an entity -> records index on
    disk serves only where its folder has this very table.

    Raises:
      UserError: an unknown source, or what the source itself refuses.
    """
    if config.source not in SOURCES:
        raise UserError(f"config.data.source is {config.source!r}; there are: {', '.join(SOURCES)}")
    return SOURCES[config.source](config)


def missing_data(config: ConfigDict) -> list[str]:
    """What the source needs and does not find, one line each with what to do; empty if nothing."""
    parts = [("config.data.records.dir", config)]
    if config.source == "mixture":
        parts = [
            (f"config.data.mixture[{number}].records.dir", _part_config(config, number))
            for number in range(len(config.mixture))
        ]
    return [
        f"training records: {where} = {part.records.dir!r} has no manifest.json; write them with "
        "python -m ovseg_jax.prepare, or point it at a folder that has been prepared"
        for where, part in parts
        if _on_disk(part) and not (Path(part.records.dir) / "manifest.json").is_file()
    ]
