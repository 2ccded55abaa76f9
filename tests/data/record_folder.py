"""Writes a folder of records in one go; `ovseg_jax.prepare` does it in parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from array_record.python import array_record_module

import ovseg_jax
from ovseg_jax.data.records import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    RecordSource,
    describe_file,
    index_line,
    key_digest,
    manifest_text,
    pack_record,
)
from ovseg_jax.errors import UserError


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_NAME).write_text(manifest_text(manifest))


def write_records(
    source: RecordSource,
    directory: str | Path,
    *,
    entity_names: Sequence[str] | Mapping[str, Sequence[str]],
    shard_size: int = 10_000,
) -> Manifest:
    """Writes a source as ArrayRecord shards with an index and a manifest.

    The manifest comes last: a folder without one is unfinished, and is written over.

    Args:
      source: the records; read once, in order.
      directory: a folder that holds no finished records yet.
      entity_names: the entities in id order, alone or with their surface forms.
      shard_size: records a shard.

    Raises:
      UserError: the folder already holds finished records, or a record cannot be stored.
    """
    directory = Path(directory)
    if (directory / MANIFEST_NAME).exists():
        raise UserError(f"{directory} already holds records; choose another folder, or empty it")
    directory.mkdir(parents=True, exist_ok=True)
    if not isinstance(entity_names, Mapping):
        entity_names = {name: [name] for name in entity_names}

    shards = []
    keys = []
    total = max(1, -(-len(source) // shard_size))
    index_path = directory / INDEX_NAME
    with index_path.open("w", encoding="ascii") as index:
        for shard in range(total):
            path = directory / f"records-{shard:05d}-of-{total:05d}.array_record"
            # One record a group: reading one record never decodes its neighbors.
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            members = range(shard * shard_size, min((shard + 1) * shard_size, len(source)))
            for position in members:
                record = source[position]
                writer.write(pack_record(record))
                index.write(index_line(record))
                keys.append(record.key)
            writer.close()
            shards.append(describe_file(path, len(members)))
    manifest = Manifest(
        count=len(source),
        shards=tuple(shards),
        index=describe_file(index_path, len(source)),
        entities={name: list(forms) for name, forms in entity_names.items()},
        source=source.name,
        source_fingerprint=source.fingerprint(),
        keys_sha256=key_digest(keys),
        tool=f"ovseg_jax {ovseg_jax.__version__}",
    )
    write_manifest(directory, manifest)
    return manifest
