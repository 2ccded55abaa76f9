"""Inputs in buckets, stood in for by a file system in memory: the same pairs as from a folder."""

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from pair_folders import jpeg, read_all, write_img2dataset

from ovseg_jax.data.prepare import shard as work_files
from ovseg_jax.data.prepare.pairs import parse_path
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import main, open_source


class FakeBuckets(MemoryFileSystem):
    protocol = "s3"
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("s3://", "memory://"))


@pytest.fixture
def buckets(monkeypatch):
    monkeypatch.setattr(FakeBuckets, "store", {})
    monkeypatch.setattr(FakeBuckets, "pseudo_dirs", [""])
    fake = FakeBuckets(skip_instance_cache=True)
    # What asks fsspec for the real file system of a kind of bucket, and keeps it.
    kind = type(backend.fsspec_backend)
    monkeypatch.setattr(kind, "_get_filesystem", lambda self, name: fake)
    return fake


def upload(buckets, folder, to):
    for path in folder.rglob("*"):
        if path.is_file():
            buckets.pipe_file(f"s3://{to}/{path.relative_to(folder)}", path.read_bytes())


def test_img2dataset_in_a_bucket(buckets, tmp_path):
    pairs = [(f"{n:09d}", f"a dog {n}", jpeg(n)) for n in range(4)]
    write_img2dataset(tmp_path, 0, pairs[:2], ["dead"])
    cut = write_img2dataset(tmp_path / "part", 1, pairs[2:])
    cut.write_bytes(cut.read_bytes().rstrip(b"\0")[:-700])
    upload(buckets, tmp_path, "bucket/cc12m")
    here, there = (open_source(f"img2dataset:{x}") for x in (tmp_path, "s3://bucket/cc12m"))
    assert read_all(there) == read_all(here) and len(read_all(here)) == 6
    assert there.shards() == here.shards() and len(here.shards()) == 2


def test_table_and_images_in_buckets(buckets, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    rows = [f"https://a.org/{number}.jpg\ta dog {number}\n" for number in range(4)]
    (tmp_path / "t.tsv").write_text("".join(rows))
    upload(buckets, tmp_path, "bucket/cc3m")
    expected = read_all(open_source(f"files:{tmp_path / 't.tsv'}"))
    assert read_all(open_source("files:s3://bucket/cc3m/t.tsv")) == expected
    one = open_source("files:s3://bucket/cc3m/t.tsv", str(tmp_path))
    other = open_source(f"files:{tmp_path / 't.tsv'}", "s3://bucket/cc3m")
    assert read_all(one) == read_all(other) == expected
    assert [pair.image is None for pair in expected] == [False, False, False, True]


def test_network_that_fails_drops_nothing(buckets, tmp_path, monkeypatch):
    write_img2dataset(tmp_path, 0, [("0", "a dog", jpeg())])
    (tmp_path / "u.tsv").write_text("https://a.org/00000.tar\ta dog\n")
    upload(buckets, tmp_path, "bucket")
    sources = [open_source("img2dataset:s3://bucket"), open_source("files:s3://bucket/u.tsv")]
    shards = [source.shards() for source in sources]
    right = FakeBuckets._open

    def fails(self, path, *args, **kwargs):
        if path.endswith(".tar"):
            raise TimeoutError("the network is away")
        return right(self, path, *args, **kwargs)

    monkeypatch.setattr(FakeBuckets, "_open", fails)
    monkeypatch.setattr(FakeBuckets, "cat_file", fails)
    for source, (shard,) in zip(sources, shards, strict=True):
        with pytest.raises(UserError, match="the network is away.*goes on where it was"):
            list(source.read(shard))


def test_output_into_a_bucket_has_the_same_bytes(buckets, tmp_path, monkeypatch):
    """Also where the run was killed and goes on."""
    folder = tmp_path / "in"
    # A duplicate, broken images, and a shard that keeps nothing.
    for number in range(3):
        pairs = [(f"{number}{n}", f"a dog and a cat {n}", jpeg(n)) for n in range(3)]
        pairs += [("twice", "a bird", jpeg()), (f"{number}x", "a broken dog", b"")]
        write_img2dataset(folder, number, pairs if number else pairs[-1:])
    where = [f"--source=img2dataset:{folder}", "--entities=auto:2", "--workers=0"]
    assert main([*where, f"--out={tmp_path / 'local'}"]) == 0
    right, made = work_files.process_shard, []

    def killed(source, part, number, *rest):
        if number == 2 and 2 not in made:
            made.append(number)
            raise KeyboardInterrupt
        made.append(number)
        return right(source, part, number, *rest)

    out = "--out=s3://bucket/records"
    monkeypatch.setattr(work_files, "process_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*where, out])
    assert not buckets.exists("s3://bucket/records/manifest.json")
    with pytest.raises(UserError, match="begun with other arguments"):
        main([*where, "--min_side=5", out])
    assert main([*where, out]) == 0
    assert made == [0, 1, 2, 2]
    expected = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    names = buckets.find("s3://bucket/records")
    assert {name.partition("records/")[2]: buckets.cat_file(name) for name in names} == expected
    with pytest.raises(UserError, match="s3://bucket/records already holds records"):
        main([*where, out])
    with pytest.raises(UserError, match="s3://bucket is not empty"):
        main([*where, "--out=s3://bucket"])


def test_places_that_are_none(buckets, monkeypatch):
    with pytest.raises(UserError, match="there is no folder s3://bucket/none"):
        open_source("img2dataset:s3://bucket/none")

    def no_network(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(FakeBuckets, "exists", no_network)
    with pytest.raises(UserError, match="cannot be reached: no route; check path and access"):
        parse_path("s3://bucket/x")
