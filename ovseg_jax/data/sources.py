"""Where training records come from, by name: the place to add a data set."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data.captions import CLIP_NAME, expand_templates
from ovseg_jax.data.entities import EntitySet, joined_tables
from ovseg_jax.data.order import Mixture
from ovseg_jax.data.records import MANIFEST_NAME, ArrayRecordSource, RecordSource
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest


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
