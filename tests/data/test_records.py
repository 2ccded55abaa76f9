"""Records on disk: what is written is read, and every kind of damage has a message."""

import hashlib
import json
import os
import pickle
from dataclasses import replace

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource
from record_folder import write_manifest, write_records

from ovseg_jax.data import records as stored
from ovseg_jax.data.records import ArrayRecordSource, Record, key_digest, sample_captions
from ovseg_jax.errors import UserError

TEXTS = [(f'caption "{i}" é\n', "b")[: i % 2 + 1] for i in range(25)]
RECORDS = [Record(bytes([i]) * 37 * i, TEXTS[i], f"key-{i}", (0, 1)[: i % 3]) for i in range(25)]


@pytest.fixture
def folder(tmp_path):
    write_records(MemorySource(RECORDS), tmp_path / "set", entity_names=["a", "b"], shard_size=10)
    return tmp_path / "set"


CAPTIONS, IDS = st.lists(st.text(), min_size=1, max_size=3), st.lists(st.integers(0, 2**31))


@settings(deadline=None)
@given(st.binary(max_size=50), CAPTIONS, st.text(), IDS)
def test_packing_is_lossless(image, captions, key, entities):
    record = Record(image, tuple(captions), key, tuple(entities))
    assert stored.unpack_record(stored.pack_record(record)) == record


FOREIGN = {
    "nothing": b"",
    "a number": b"\x01",
    "a later layout": b"\x95\x03\xa0\x91\xa0\xc4\x00\x90",
    "a caption in place of a list": b"\x95\x02\xa0\xa0\xc4\x00\x90",
    "no caption": b"\x95\x02\xa0\x90\xc4\x00\x90",
    "noise": b"\xff" * 9,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_bytes_are_no_record(kind):
    with pytest.raises(ValueError, match=r"record"):
        stored.unpack_record(FOREIGN[kind])


def test_records_that_cannot_be():
    for captions in ((), "a dog"):
        with pytest.raises(ValueError, match="needs a tuple of captions"):
            Record(b"", captions, "k")
    with pytest.raises(UserError, match="key-x"):
        stored.pack_record(Record(b"", ("a dog", "\udc80"), "key-x"))


def test_layout_with_one_caption_is_still_read(tmp_path):
    """A folder as version 2 of the manifest has it, written by hand."""
    shard, index = tmp_path / "records-00000-of-00001.array_record", tmp_path / "index.jsonl"
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    rows = [(f"key-{i}", f"a dog {i}", bytes([i]), [0][:i]) for i in range(2)]
    for row in rows:
        writer.write(msgpack.packb([1, *row]))
    writer.close()
    index.write_text("".join(json.dumps(row[:2]) + "\n" for row in rows))
    fields = {
        "count": 2,
        "shards": [vars(stored.describe_file(shard, 2))],
        "index": vars(stored.describe_file(index, 2)),
        "entities": {"dog": []},
        "source": "files",
        "source_fingerprint": "x",
        "keys_sha256": key_digest(row[0] for row in rows),
        "tool": "ovseg_jax 0.1",
        "files": [],
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    document = {"format": "ovseg_jax records", "version": 2, "manifest_sha256": digest, **fields}
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    source = ArrayRecordSource(tmp_path)
    source.verify()
    assert [source[i] for i in range(2)] == [
        Record(image, (caption,), key, tuple(entities)) for key, caption, image, entities in rows
    ]
    assert source.captions() == [("a dog 0",), ("a dog 1",)]
    assert source.caption_sample(5) == ["a dog 0", "a dog 1"]
    # Caches of such a folder stay valid.
    assert source.fingerprint() == digest[:16]


def test_class_names_become_captions_in_templates(tmp_path):
    records = [Record(b"x", ("sorrel", "horse"), "a"), Record(b"y", ("sofa",), "b")] * 2
    manifest = write_records(MemorySource(records), tmp_path / "set", entity_names=[])
    write_manifest(tmp_path / "set", replace(manifest, captions=stored.CLASS_NAMES))
    source = ArrayRecordSource(tmp_path / "set", ("a {}.", "the {}"))
    horses, sofas = source.captions()[:2]
    assert list(horses) == ["a sorrel.", "the sorrel", "a horse.", "the horse"]
    assert [horses.name_in(number) for number in range(4)] == ["sorrel"] * 2 + ["horse"] * 2
    assert list(sofas) == ["a sofa.", "the sofa"] and source[1].captions == sofas
    assert source.captions()[2] is horses
    assert pickle.loads(pickle.dumps(source))[0].captions == horses
    assert source.caption_sample(4) == ["a sorrel.", "the sofa", "a horse.", "the sofa"]
    other = ArrayRecordSource(tmp_path / "set")
    assert len(other[1].captions) == 80 and other.fingerprint() == source.fingerprint()


def test_folder_gives_the_records_back(folder):
    source = ArrayRecordSource(folder)
    assert isinstance(source, stored.RecordSource)
    order = [24, 0, 9, 10, 20, *range(25)]
    assert [source[index] for index in order] == [RECORDS[index] for index in order]
    assert pickle.loads(pickle.dumps(source))[3] == RECORDS[3], "pickled while it is open"
    assert source.captions() == [record.captions for record in RECORDS]
    assert source.keys() == [record.key for record in RECORDS]
    assert list(source.manifest.entities) == ["a", "b"]
    assert [shard.count for shard in source.manifest.shards] == [10, 10, 5]
    source.verify()
    for most in (1, 5, 7, 100):
        assert sample_captions(source, most) == sample_captions(MemorySource(RECORDS), most)
        assert set(sample_captions(source, most)) <= set(sum(source.captions(), ()))
    with pytest.raises(IndexError):
        source[25]


def test_empty_source_can_be_written_and_read(tmp_path):
    write_records(MemorySource([]), tmp_path / "none", entity_names=[])
    assert len(ArrayRecordSource(tmp_path / "none")) == 0
    assert key_digest(["ab", "c"]) != key_digest(["a", "bc"])


def _shard(folder):
    return sorted(folder.glob("*.array_record"))[1]


def _edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "no folder": (lambda f: f.rename(f.parent / "moved"), "no folder of records"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "cut manifest": (lambda f: os.truncate(f / "manifest.json", 100), "cannot be used"),
    "other JSON": (lambda f: (f / "manifest.json").write_text("[1]"), "cannot be used"),
    "edited count": (lambda f: _edit_manifest(f, count=24), "do not add up"),
    "edited name": (lambda f: _edit_manifest(f, source="other"), "was changed"),
    "lost field": (lambda f: _edit_manifest(f, shards=[{}]), "cannot be used"),
    "later layout": (lambda f: _edit_manifest(f, version=99), "version 99, is not read"),
    "no shard": (lambda f: _shard(f).unlink(), "is missing"),
    "cut shard": (lambda f: os.truncate(_shard(f), 100), "cut short or changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_on_opening(folder, kind):
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError, match=message):
        ArrayRecordSource(folder)


def test_changed_bytes_are_found_on_reading_and_by_verify(folder):
    path, index = _shard(folder), folder / "index.jsonl"
    data = bytearray(path.read_bytes())
    for at in range(300, 3000):
        data[at] ^= 255
    path.write_bytes(data)
    source = ArrayRecordSource(folder)
    assert source[0] == RECORDS[0], "other shards stay readable"
    with pytest.raises(UserError, match="damaged"):
        [source[at] for at in range(10, 20)]
    with pytest.raises(UserError, match=path.name):
        source.verify()
    index.write_text(index.read_text().replace("key-3", "key-4"))
    with pytest.raises(UserError, match="is damaged"):
        ArrayRecordSource(folder).captions()
