"""Records on disk: what is written is read, and every kind of damage has a message."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_folder import write_records

from ovseg_jax.data.records import (
    ArrayRecordSource,
    MemorySource,
    Record,
    RecordSource,
    key_digest,
    keys_of,
    pack_record,
    sample_captions,
    unpack_record,
)
from ovseg_jax.errors import UserError

RECORDS = [
    Record(
        bytes([i]) * 37 * i, (f'caption "{i}" é\n', "b")[: i % 2 + 1], f"key-{i}", (0, 1)[: i % 3]
    )
    for i in range(25)
]


@pytest.fixture
def folder(tmp_path):
    write_records(MemorySource(RECORDS), tmp_path / "set", entity_names=["a", "b"], shard_size=10)
    return tmp_path / "set"


@settings(deadline=None)
@given(
    st.binary(max_size=50),
    st.lists(st.text(), min_size=1, max_size=3),
    st.text(),
    st.lists(st.integers(0, 2**31), max_size=5),
)
def test_packing_is_lossless(image, captions, key, entities):
    record = Record(image, tuple(captions), key, tuple(entities))
    assert unpack_record(pack_record(record)) == record


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\x95\x03\xa0\x91\xa0\xc4\x00\x90",  # of a later layout
        b"\x95\x02\xa0\xa0\xc4\x00\x90",  # a caption in place of a list
        b"\x95\x02\xa0\x90\xc4\x00\x90",  # no caption
        b"\xff" * 9,
    ],
)
def test_foreign_bytes_are_no_record(data):
    with pytest.raises(ValueError, match=r"record"):
        unpack_record(data)


def test_caption_that_is_not_unicode_names_its_key():
    with pytest.raises(UserError, match="key-x"):
        pack_record(Record(b"", ("a dog", "\udc80"), "key-x"))


def test_folder_gives_the_records_back(folder):
    source = ArrayRecordSource(folder)
    assert isinstance(source, RecordSource)
    order = [24, 0, 9, 10, 20, *range(25)]
    assert [source[index] for index in order] == [RECORDS[index] for index in order]
    assert source.captions() == [record.captions for record in RECORDS]
    assert source.keys() == keys_of(MemorySource(RECORDS))
    assert list(source.manifest.entities) == ["a", "b"]
    assert [shard.count for shard in source.manifest.shards] == [10, 10, 5]
    source.verify()
    for most in (1, 5, 7, 100):
        assert sample_captions(source, most) == sample_captions(MemorySource(RECORDS), most)
        assert set(sample_captions(source, most)) <= set(sum(source.captions(), ()))
    with pytest.raises(IndexError):
        source[25]


def test_source_can_be_pickled_while_open(folder):
    source = ArrayRecordSource(folder)
    assert source[3] == RECORDS[3]
    assert pickle.loads(pickle.dumps(source))[3] == RECORDS[3]


def test_writing_twice_gives_the_same_bytes(folder, tmp_path):
    write_records(MemorySource(RECORDS), tmp_path / "again", entity_names=["a", "b"], shard_size=10)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_finished_folder_is_never_overwritten(folder):
    with pytest.raises(UserError, match="already holds records"):
        write_records(MemorySource(RECORDS), folder, entity_names=[])


def test_empty_source_can_be_written_and_read(tmp_path):
    write_records(MemorySource([]), tmp_path / "none", entity_names=[])
    assert len(ArrayRecordSource(tmp_path / "none")) == 0


def test_fingerprints_follow_the_content(folder):
    changed = [*RECORDS[:-1], Record(b"x", ("other",), "key-24")]
    assert MemorySource(RECORDS).fingerprint() == MemorySource(list(RECORDS)).fingerprint()
    assert MemorySource(RECORDS).fingerprint() != MemorySource(changed).fingerprint()
    assert ArrayRecordSource(folder).manifest.keys_sha256 == key_digest(
        record.key for record in RECORDS
    )
    assert key_digest(["ab", "c"]) != key_digest(["a", "bc"])


def _shard(folder):
    return sorted(folder.glob("*.array_record"))[1]


def _edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "no folder": (lambda f: f.rename(f.parent / "moved"), "no folder of records"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "cut manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:100]),
        "cannot be read as JSON",
    ),
    "other JSON": (lambda f: (f / "manifest.json").write_text("[1]"), "not a manifest"),
    "edited count": (lambda f: _edit_manifest(f, count=24), "do not add up"),
    "edited name": (lambda f: _edit_manifest(f, source="other"), "was changed"),
    "lost field": (lambda f: _edit_manifest(f, shards=[{}]), "lacks a field"),
    "later layout": (lambda f: _edit_manifest(f, version=99), "layout version 99"),
    "no shard": (lambda f: _shard(f).unlink(), "is missing"),
    "cut shard": (
        lambda f: _shard(f).write_bytes(_shard(f).read_bytes()[:-100]),
        "cut short or changed",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_on_opening(folder, kind):
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError, match=message):
        ArrayRecordSource(folder)


def test_changed_bytes_are_found_on_reading_and_by_verify(folder):
    path = _shard(folder)
    data = bytearray(path.read_bytes())
    for index in range(300, 3000):
        data[index] ^= 255
    path.write_bytes(data)
    source = ArrayRecordSource(folder)
    assert source[0] == RECORDS[0], "other shards stay readable"
    with pytest.raises(UserError, match="damaged"):
        [source[index] for index in range(10, 20)]
    with pytest.raises(UserError, match=path.name):
        source.verify()


def test_changed_index_is_found(folder):
    path = folder / "index.jsonl"
    path.write_text(path.read_text().replace("key-3", "key-4"))
    with pytest.raises(UserError, match="is damaged"):
        ArrayRecordSource(folder).captions()
