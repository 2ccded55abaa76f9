"""Writes a folder of records in one go; `ovseg_jax.prepare` does it in parts."""

from array_record.python import array_record_module

from ovseg_jax.data.records import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    describe_file,
    index_line,
    key_digest,
    manifest_text,
    pack_record,
)


def write_manifest(directory, manifest):
    (directory / MANIFEST_NAME).write_text(manifest_text(manifest))


def write_records(source, directory, *, entity_names, shard_size=10_000):
    """Writes a source as ArrayRecord shards with an index and a manifest, which it returns."""
    directory.mkdir()
    records = [source[index] for index in range(len(source))]
    shards = []
    for start in range(0, max(1, len(records)), shard_size):
        path = directory / f"records-{start:05d}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records[start : start + shard_size]:
            writer.write(pack_record(record))
        writer.close()
        shards.append(describe_file(path, len(records[start : start + shard_size])))
    index = directory / INDEX_NAME
    index.write_text("".join(map(index_line, records)), "ascii")
    manifest = Manifest(
        count=len(records),
        shards=tuple(shards),
        index=describe_file(index, len(records)),
        entities={name: [name] for name in entity_names},
        source=source.name,
        source_fingerprint=source.fingerprint(),
        keys_sha256=key_digest(record.key for record in records),
        tool="a test",
    )
    write_manifest(directory, manifest)
    return manifest
