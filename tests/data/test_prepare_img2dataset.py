"""img2dataset's shards: whole, cut in half, without their parquet file, and odd in other ways."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_folders import add_file, jpeg, write_img2dataset

from ovseg_jax.data.prepare import rules
from ovseg_jax.data.prepare.pairs import Damage, RawPair, source_fingerprint
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.errors import UserError

PAIRS = [(f"{index:09d}", f"a dog {index}", jpeg(index)) for index in range(6)]
FAILED = ["000000006", "000000007"]


def contents(folder, **options):
    source = Img2DatasetSource(folder)
    items = [item for shard in source.shards() for item in source.read(shard, **options)]
    pairs = [item for item in items if isinstance(item, RawPair)]
    return pairs, [item.what for item in items if isinstance(item, Damage)]


def as_found(pairs):
    return [(pair.key, *pair.captions, pair.image) for pair in pairs if not pair.cause]


def as_bytes(pairs):
    return [(key, caption.encode(), image) for key, caption, image in pairs]


def by_cause(pairs, cause):
    return [pair.key for pair in pairs if pair.cause == cause]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_whole_shard(tmp_path, kind):
    write_img2dataset(tmp_path, 0, PAIRS, FAILED, image_kind=kind)
    pairs, damage = contents(tmp_path)
    assert as_found(pairs) == as_bytes(PAIRS)
    assert by_cause(pairs, rules.NOT_DOWNLOADED) == FAILED
    assert not damage
    without, _ = contents(tmp_path, images=False)
    assert [(p.key, p.captions, p.cause) for p in without] == [
        (p.key, p.captions, p.cause) for p in pairs
    ]
    assert all(pair.image is None for pair in without)


def test_shards_come_in_the_order_of_their_paths(tmp_path):
    for number in (2, 0, 1):
        write_img2dataset(tmp_path / "part", number, PAIRS[number : number + 1])
    tar = write_img2dataset(tmp_path, 9, PAIRS[5:])
    source = Img2DatasetSource(tmp_path)
    shards = source.shards()
    parts = [f"part/0000{number}.tar" for number in range(3)]
    assert [shard.name for shard in shards] == ["00009.tar", *parts]
    assert source_fingerprint(source, shards) == source_fingerprint(source, source.shards())
    tar.write_bytes(tar.read_bytes() + b"more")
    assert source_fingerprint(source, shards) != source_fingerprint(source, source.shards())


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_shard_cut_short_loses_only_what_is_gone(tmp_path, share, images):
    path = write_img2dataset(tmp_path, 0, PAIRS, FAILED)
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[: int(share * len(data))])
    pairs, damage = contents(tmp_path, images=images)
    whole = as_found(pairs)
    assert 0 <= len(whole) < 6
    assert [key for key, *_ in whole] == [key for key, *_ in PAIRS[: len(whole)]]
    if images:
        assert whole == as_bytes(PAIRS[: len(whole)])
    assert by_cause(pairs, rules.LOST) == [key for key, *_ in PAIRS[len(whole) :]]
    assert by_cause(pairs, rules.NOT_DOWNLOADED) == FAILED
    assert len(damage) == 1
    assert f"after {len(whole)} pairs" in damage[0]


def tar_of(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files:
            add_file(archive, name, content)
    return stream.getvalue()


def packed(pairs, prefix=""):
    """The pairs as img2dataset puts them into a tar."""
    files = []
    for key, caption, image in pairs:
        files.append((f"{prefix}{key}.jpg", image))
        files.append((f"{prefix}{key}.json", json.dumps({"caption": caption}).encode()))
        files.append((f"{prefix}{key}.txt", caption.encode()))
    return tar_of(files)


def offset_of(path, member):
    """Where a member of a tar begins."""
    with tarfile.open(path) as archive:
        return archive.getmembers()[member].offset


def test_damage_in_the_middle_and_files_that_are_no_tar(tmp_path):
    path = write_img2dataset(tmp_path, 0, PAIRS)
    offset, data = offset_of(path, 9), bytearray(path.read_bytes())
    data[offset : offset + 512] = b"x" * 512
    for content, lost in ((bytes(data), 4), (b"", 6), (b"no tar at all", 6), (b"x" * 4096, 6)):
        path.write_bytes(content)
        pairs, damage = contents(tmp_path)
        assert len(by_cause(pairs, rules.LOST)) == lost and len(damage) == 1


def test_without_parquet(tmp_path):
    path = write_img2dataset(tmp_path, 0, PAIRS, parquet=False)
    pairs, damage = contents(tmp_path)
    assert as_found(pairs) == as_bytes(PAIRS)
    assert damage == ["00000.parquet is missing: failed downloads and lost pairs are not counted"]
    # What the cut took of a pair that had begun is still known.
    path.write_bytes(path.read_bytes()[: offset_of(path, 10)])
    pairs, _ = contents(tmp_path)
    assert by_cause(pairs, rules.LOST) == [PAIRS[3][0]]


def test_damaged_parquet_or_one_without_columns(tmp_path):
    path = write_img2dataset(tmp_path, 0, PAIRS).with_suffix(".parquet")
    path.write_bytes(path.read_bytes()[:100])
    pairs, damage = contents(tmp_path)
    assert as_found(pairs) == as_bytes(PAIRS)
    assert "cannot be read" in damage[0]
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), path)
    _, damage = contents(tmp_path)
    assert damage == ["00000.parquet has no column key and no status; it is not used"]


def test_where_the_caption_comes_from(tmp_path):
    image = jpeg()
    texts = [("1.jpg", image), ("1.txt", b"from the text"), ("1.json", b'{"caption": "no"}')]
    texts += [("2.jpg", image), ("2.json", b'{"caption": "from JSON"}'), ("3.jpg", image)]
    texts += [("4.jpg", image), ("4.json", b"{not JSON"), ("5.txt", b"no image")]
    content = tar_of([*texts, ("6.PNG", image), ("6.txt", b"\xff")])
    (tmp_path / "00000.tar").write_bytes(content)
    rows = {"key": ["3"], "status": ["success"], "caption": ["from the table"]}
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    pairs, _ = contents(tmp_path)
    assert [(pair.key, *pair.captions, pair.image is None) for pair in pairs] == [
        ("1", b"from the text", False),
        ("2", "from JSON", False),
        ("3", "from the table", False),
        ("4", False),
        ("5", b"no image", True),
        ("6", b"\xff", False),
    ]


def test_list_of_captions(tmp_path):
    listed = json.dumps({"caption": ["a dog", None, "a cat"]}).encode()
    first = [("1.jpg", b"x"), ("1.txt", b"['a dog', ...]"), ("1.json", listed)]
    (tmp_path / "00000.tar").write_bytes(tar_of([*first, ("2.jpg", b"y")]))
    rows = {"key": ["2"], "status": ["success"], "caption": [["a bus", "a tree"]]}
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    pairs, _ = contents(tmp_path)
    assert [pair.captions for pair in pairs] == [("a dog", "a cat"), ("a bus", "a tree")]


def test_every_member_of_a_tar_is_counted_but_folders(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add_file(archive, "a/0.jpg", b"x")
        # The key ends at the first period, as webdataset has it.
        add_file(archive, "a/0.1.jpg", b"y")
        add_file(archive, "a/0.txt", b"a dog")
        link = tarfile.TarInfo("a/1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link, io.BytesIO())
    pairs, _ = contents(tmp_path)
    assert [(pair.key, pair.image, *pair.captions) for pair in pairs] == [
        ("a/0", b"x", b"a dog"),
        ("a/1", b""),
    ]


def test_periods_in_keys(tmp_path):
    pairs = [(f"photo.{key}", caption, image) for key, caption, image in PAIRS]
    (tmp_path / "0.tar").write_bytes(packed(pairs))
    assert as_found(contents(tmp_path)[0]) == as_bytes(pairs)


def test_tar_that_was_packed_on_macos(tmp_path):
    files = [(f"{prefix}{n}.{kind}", b"x") for n in "01" for kind in ("jpg", "txt")
             for prefix in ("._", "", "__MACOSX/a/._")]  # fmt: skip
    (tmp_path / "00000.tar").write_bytes(tar_of([*files, (".DS_Store", b"x")]))
    assert [pair.key for pair in contents(tmp_path)[0]] == ["0", "1"]


def test_tars_behind_one_another(tmp_path):
    """As from `cat a.tar b.tar`; what is wrong with the second is said, not passed over."""
    path, first, second = tmp_path / "0.tar", packed(PAIRS[:3]), packed(PAIRS[3:])
    path.write_bytes(first + second)
    assert as_found(contents(tmp_path)[0]) == as_bytes(PAIRS)
    path.write_bytes(first + second.rstrip(b"\0")[:-3000])
    pairs, damage = contents(tmp_path)
    whole = as_found(pairs)
    assert 3 <= len(whole) < 6 and whole == as_bytes(PAIRS[: len(whole)])
    assert f"after {len(whole)} pairs" in damage[1]
    path.write_bytes(first + b"no tar")
    pairs, damage = contents(tmp_path)
    assert as_found(pairs) == as_bytes(PAIRS[:3]) and "after 3 pairs" in damage[1]


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.integers(0, 3), min_size=1, max_size=3), share=st.floats(0.02, 1))
def test_every_row_of_the_parquet_file_is_kept_or_counted(parts, share):
    """For several tars behind one another, cut anywhere; tarfile tells which pairs are whole."""
    numbers = iter(range(9))
    groups = [[(f"{next(numbers):09d}", "a dog", b"x" * 700) for _ in range(n)] for n in parts]
    tars = [packed(group) for group in groups]
    keys = [key for group in groups for key, *_ in group]
    size = int(share * sum(map(len, tars)))
    whole, offset = [], 0
    for tar in tars:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            members = [m for m in archive if offset + m.offset_data + m.size <= size]
        whole += [member.name[:-4] for member in members if member.name.endswith(".txt")]
        offset += len(tar)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "0.tar").write_bytes(b"".join(tars)[:size])
        columns = [pa.array(column, pa.string()) for column in (keys, ["success"] * len(keys))]
        pq.write_table(pa.table(columns, ["key", "status"]), f"{folder}/0.parquet")
        pairs, damage = contents(folder)
    assert sorted(pair.key for pair in pairs) == keys
    kept = [key for key, *_ in as_found(pairs)]
    # The last pair before a cut may have had more files.
    assert kept == whole[: len(kept)] and len(whole) - len(kept) <= bool(damage)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        Img2DatasetSource(tmp_path / "none")
    with pytest.raises(UserError, match=r"no \.tar file below.*webdataset"):
        Img2DatasetSource(tmp_path)


def test_parquet_without_its_tar_and_files_of_other_kinds(tmp_path):
    write_img2dataset(tmp_path, 0, PAIRS[:2])
    write_img2dataset(tmp_path, 1, PAIRS[2:], FAILED).unlink()
    for name in ("00002.tar.gz", "notes.txt", "00000_stats.json", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    pairs, damage = contents(tmp_path)
    assert as_found(pairs) == as_bytes(PAIRS[:2])
    assert by_cause(pairs, rules.LOST) == [key for key, *_ in PAIRS[2:]]
    assert by_cause(pairs, rules.NOT_DOWNLOADED) == FAILED
    assert "No such file" in damage[0]
    shards = Img2DatasetSource(tmp_path).shards()
    assert shards[-1].name == "2 other files (00002.tar.gz, notes.txt)"
    assert damage[1].startswith("passed over")


@pytest.mark.parametrize("prefix", ["./", "folder/", "./a/b/"])
def test_tar_that_was_packed_again(tmp_path, prefix):
    write_img2dataset(tmp_path, 0, PAIRS, FAILED).write_bytes(packed(PAIRS, prefix))
    pairs, damage = contents(tmp_path)
    assert [key.rpartition("/")[2] for key, *_ in as_found(pairs)] == [key for key, *_ in PAIRS]
    assert by_cause(pairs, rules.NOT_DOWNLOADED) == FAILED
    assert not by_cause(pairs, rules.LOST) and not damage


def test_keys_as_numbers(tmp_path):
    write_img2dataset(tmp_path, 0, PAIRS)
    table = pa.table({"key": list(range(7)), "status": ["success"] * 6 + ["failed_to_resize"]})
    pq.write_table(table, tmp_path / "00000.parquet")
    pairs, damage = contents(tmp_path)
    assert by_cause(pairs, rules.NOT_DOWNLOADED) == ["000000006"]
    assert len(pairs) == 7
    assert not damage
