"""Where training records come from, by name: the place to add a data set."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.records import ArrayRecordSource, RecordSource
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.errors import UserError


def _scenes(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    entities = EntitySet(scene_entity_table())
    fields = config.scenes
    source = ScenesSource(fields.split, fields.count, fields.seed, fields.size, entities)
    return source, entities


def _records(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    source = ArrayRecordSource(config.records.dir)
    return source, EntitySet(source.manifest.entities)


SOURCES: dict[str, Callable[[ConfigDict], tuple[RecordSource, EntitySet]]] = {
    "scenes": _scenes,
    "records": _records,
}


def make_source(config: ConfigDict) -> tuple[RecordSource, EntitySet]:
    """The records and entities that `config` (a run's ``config.data``) names.

    Raises:
      UserError: an unknown source, or what the source itself refuses.
    """
    if config.source not in SOURCES:
        raise UserError(f"config.data.source is {config.source!r}; there are: {', '.join(SOURCES)}")
    return SOURCES[config.source](config)


def missing_data(config: ConfigDict) -> list[str]:
    """What the source needs and does not find, one line each with what to do; empty if nothing."""
    if config.source == "records" and not (Path(config.records.dir) / "manifest.json").is_file():
        return [
            f"training records: config.data.records.dir = {config.records.dir!r} has no "
            "manifest.json; write them with python -m ovseg_jax.prepare, or point it at a folder "
            "that has been prepared"
        ]
    return []
