"""A whole preparation: what it writes, that it repeats itself to the byte, and goes on when cut."""

import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from pair_folders import encoded, jpeg, write_img2dataset
from PIL import Image

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.pairs import PairIndex
from ovseg_jax.data.prepare import assemble, causes, duplicates
from ovseg_jax.data.prepare import run as run_module
from ovseg_jax.data.prepare.entity_choice import EntityChoice, parse_choice
from ovseg_jax.data.prepare.pool import LocalPool
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.run import prepare
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.data.records import ArrayRecordSource, key_digest
from ovseg_jax.errors import UserError

NOUNS = ["dog", "cat", "bus", "tree"]
ENTITIES = EntitySet({"dog": ["puppy"], "cat": [], "bus": [], "unicorn": []})
CHOICE = EntityChoice(ENTITIES.table, 0, "a test")


def _pair(number):
    named = f"a {NOUNS[number % 4]} and a {NOUNS[number // 4 % 4]}"
    return f"{number:09d}", f"{named} &amp; more" if number % 7 == 0 else named, jpeg(number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five shards of eight pairs, with one of nearly everything that goes wrong."""
    path = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        pairs = [_pair(8 * shard + n) for n in range(8)]
        if shard == 1:
            # The first holder of the key is broken: the second is no duplicate.
            pairs[0] = ("twice", "a dog", b"broken")
            pairs[1] = ("000000002", "a cat too many", jpeg(99))
            pairs[2] = ("a", "a tiny dog", encoded(Image.new("RGB", (3, 3))))
        if shard == 2:
            pairs[0] = ("twice", "a dog", jpeg(98))
            pairs[1] = ("twice", "a dog again", jpeg(97))
            pairs[2] = ("b", b"a dog \xff", jpeg(96))
        if shard == 3:  # nothing is kept
            pairs = [(key, "a tree", image) for key, _, image in pairs]
        write_img2dataset(path, shard, pairs, failed=[f"f{shard}"] if shard != 4 else [])
    cut = path / "00004.tar"
    data = cut.read_bytes().rstrip(b"\0")
    cut.write_bytes(data[: len(data) // 2])
    return path


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    report = prepare(Img2DatasetSource(folder), out, CHOICE, Rules(), say=lambda line: None)
    return out, report


def run(folder, out, **changes):
    options = {"choice": CHOICE, "rules": Rules(), "workers": 0, "say": lambda line: None} | changes
    choice, rules = options.pop("choice"), options.pop("rules")
    return prepare(Img2DatasetSource(folder), out, choice, rules, **options)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_pair_is_kept_or_counted(finished):
    out, report = finished
    lost = report["dropped"][causes.LOST]
    assert report["read"] == 5 * 8 + 4 == report["kept"] + sum(report["dropped"].values())
    assert 0 < lost < 8
    assert report["dropped"] == {
        causes.NOT_DOWNLOADED: 4,
        causes.LOST: lost,
        causes.NOT_UTF8: 1,
        causes.NO_ENTITY: report["dropped"][causes.NO_ENTITY],
        "unreadable image: not an image": 1,
        causes.SMALL_IMAGE: 1,
        causes.DUPLICATE: 2,
    }
    assert report["dropped_examples"][causes.DUPLICATE] == ["000000002", "twice"]
    assert report["dropped_examples"][causes.NOT_DOWNLOADED] == ["f0", "f1", "f2", "f3"]
    assert len(report["damaged_shards"]) == 1
    assert report["damaged_shards"][0].startswith("00004.tar: ")
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))


def test_the_folder_holds_the_records(finished, folder):
    out, report = finished
    source = ArrayRecordSource(out)
    source.verify()
    records = [source[index] for index in range(len(source))]
    assert len(records) == report["kept"] == report["records"]["count"]
    keys = [record.key for record in records]
    assert len(set(keys)) == len(keys) == 8 + 4 + 6 + 0 + 8 - report["dropped"][causes.LOST]
    assert keys == source.keys()
    assert report["records"]["keys_sha256"] == key_digest(keys)
    # Of equal keys the first that nothing is wrong with stays.
    assert records[keys.index("twice")].image == jpeg(98)
    assert records[keys.index("000000002")].image == jpeg(2)
    assert [record.caption for record in records] == source.captions()
    assert "a dog and a dog & more" in source.captions()
    for record in records:
        assert record.entities == ENTITIES.find(record.caption) != ()
    # The shard of which nothing is kept leaves no file.
    assert [shard.file[8:13] for shard in source.manifest.shards] == [
        "00000",
        "00001",
        "00002",
        "00003",
    ]
    assert sorted(files(out)) == sorted(
        [info.file for info in source.manifest.everything()]
        + ["manifest.json", "entities.json", "report.json", "report.html"]
    )
    assert EntitySet.from_json(out / "entities.json").table == ENTITIES.table


def test_the_entity_index_is_that_of_the_captions(finished):
    source = ArrayRecordSource(finished[0])
    entities = [ENTITIES.find(caption) for caption in source.captions()]
    expected = PairIndex.build(entities)
    index = source.entity_index()
    for entity in range(len(ENTITIES)):
        np.testing.assert_array_equal(index.members(entity), expected.members(entity))
    assert len(index.members(3)) == 0
    assert isinstance(index.records, np.memmap), "on disk, not in memory"


def test_counts_are_those_of_the_records(finished):
    out, report = finished
    source = ArrayRecordSource(out)
    found = [ENTITIES.find(caption) for caption in source.captions()]
    assert report["entities"] == {
        name: sum(entity in ids for ids in found) for entity, name in enumerate(ENTITIES.names)
    }
    together = {
        (ENTITIES.names[a], ENTITIES.names[b]): n
        for a, b in itertools.combinations(range(3), 2)
        if (n := sum({a, b} <= set(ids) for ids in found))
    }
    assert {(a, b): n for a, b, n in report["together"]} == together
    words = [len(caption.split()) for caption in source.captions()]
    assert report["caption_words"] == np.bincount(words, minlength=81).tolist()
    assert report["image_sides"]["0"] == len(source)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_write_the_same_bytes(finished, folder, tmp_path, workers):
    run(folder, tmp_path / "out", workers=workers)
    assert files(tmp_path / "out") == files(finished[0])


@pytest.mark.parametrize("per_bucket", [1, 3])
def test_number_of_buckets_changes_nothing(finished, folder, tmp_path, monkeypatch, per_bucket):
    monkeypatch.setattr(duplicates, "_PER_BUCKET", per_bucket)
    assert duplicates.bucket_count(20) > 5
    run(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(finished[0])


class Killed(Exception):
    pass


def _fail_at(monkeypatch, module, name, call):
    """Makes the given call of a function fail; those before and after it work."""
    right, calls = getattr(module, name), itertools.count()

    def wrong(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return right(*args, **kwargs)

    monkeypatch.setattr(module, name, wrong)


STAGES = [
    (run_module, "make_part", 0),
    (run_module, "make_part", 3),
    (duplicates, "duplicates_in_bucket", 0),
    (assemble, "finish_shard", 2),
    (assemble, "_copy_without", 1),
    (assemble, "write_index", 0),
    (assemble, "write_entity_index", 0),
    (run_module, "make_report", 0),
    (run_module, "write_manifest", 0),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage[1]} {stage[2]}")
def test_cut_off_run_goes_on_to_the_same_bytes(finished, folder, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _fail_at(patch, *stage)
        with pytest.raises(Killed):
            run(folder, out)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        ArrayRecordSource(out)
    run(folder, out)
    assert files(out) == files(finished[0])


def test_finished_parts_are_not_made_again(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _fail_at(patch, run_module, "make_part", 3)
        with pytest.raises(Killed):
            run(folder, out)
    lines = []
    run(folder, out, say=lines.append)
    assert lines[0] == "3 of 5 shards were finished before"
    assert lines[1].startswith("shard 1 of 2: ")


def test_killed_process_goes_on(finished, folder, tmp_path):
    out, entities = tmp_path / "out", tmp_path / "entities.json"
    # The same table and the same words about it as `finished` has.
    ENTITIES.to_json(entities)
    program = (
        "import sys, time\n"
        "from ovseg_jax.data.prepare import run, parts\n"
        "from ovseg_jax.data.prepare.rules import Rules\n"
        "from ovseg_jax.data.prepare.entity_choice import EntityChoice\n"
        "from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource\n"
        "from ovseg_jax.data.entities import EntitySet\n"
        "from pathlib import Path\n"
        "table = EntitySet.from_json(sys.argv[3]).table\n"
        "def say(line):\n"
        "    print(line, flush=True)\n"
        "    if line.startswith('shard 2'): time.sleep(600)\n"
        "run.prepare(Img2DatasetSource(sys.argv[1]), Path(sys.argv[2]),\n"
        "            EntityChoice(table, 0, 'a test'), Rules(), say=say)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(out), str(entities)],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("shard 2"):
            break
    # A second run keeps off while the first one lives.
    with pytest.raises(UserError, match="another run is preparing"):
        run(folder, out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    # As if it had been killed while writing the third shard.
    (out / ".work" / "part-00002.array_record").write_bytes(b"half a file")
    lines = []
    run(folder, out, say=lines.append)
    assert lines[0] == "2 of 5 shards were finished before"
    assert files(out) == files(finished[0])


def test_folders_that_hold_something_else(finished, folder, tmp_path):
    with pytest.raises(UserError, match="already holds records"):
        run(folder, finished[0])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run(folder, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        run(folder, tmp_path / "file" / "out")


def test_other_arguments_do_not_go_on(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _fail_at(patch, run_module, "make_part", 1)
        with pytest.raises(Killed):
            run(folder, out)
    with pytest.raises(UserError, match=r"other arguments.*\(rules\)"):
        run(folder, out, rules=Rules(min_side=5))
    other = EntityChoice({"dog": []}, 0, "a test")
    with pytest.raises(UserError, match=r"\(listed\)"):
        run(folder, out, choice=other)


def test_nothing_kept_is_said_with_the_causes(folder, tmp_path):
    choice = EntityChoice({"unicorn": []}, 0, "a test")
    with pytest.raises(UserError, match="no pair is left(.|\n)*no entity"):
        run(folder, tmp_path / "out", choice=choice)
    assert (tmp_path / "out" / "report.html").exists()


def test_entities_from_the_captions(folder, tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    out = tmp_path / "out"
    report = run(folder, out, choice=parse_choice("auto:2"))
    assert report["entities_source"] == (
        "the 2 most frequent nouns of the captions, by bundled word lists"
    )
    document = json.loads((out / "entities.json").read_text())
    assert list(document["counts"]) == list(report["entities"]) == ["tree", "dog"]
    # The file can be reviewed, edited and given back.
    again = run(folder, tmp_path / "again", choice=parse_choice(str(out / "entities.json")))
    assert again["entities"] == report["entities"]
    assert again["entities_source"] == "the file entities.json"
    assert again["records"] == report["records"]


def test_counting_nouns_goes_on_too(folder, tmp_path, monkeypatch):
    from ovseg_jax.data.prepare import entity_choice

    run(folder, tmp_path / "whole", choice=parse_choice("auto:2"))
    with monkeypatch.context() as patch:
        _fail_at(patch, entity_choice, "count_nouns", 2)
        with pytest.raises(Killed):
            run(folder, tmp_path / "cut", choice=parse_choice("auto:2"))
    run(folder, tmp_path / "cut", choice=parse_choice("auto:2"))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_pairs_without_entities_on_request(folder, tmp_path):
    report = run(folder, tmp_path / "out", rules=Rules(keep_without_entities=True))
    source = ArrayRecordSource(tmp_path / "out")
    assert causes.NO_ENTITY not in report["dropped"]
    assert any(source[index].entities == () for index in range(len(source)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto", "must say how many"),
        ("auto:0", "must say how many"),
        ("auto:many", "must say how many"),
        ("publisht", "none of: published"),
        ("none.json", "no entity file"),
    ],
)
def test_entity_choices_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        parse_choice(text)


def test_listed_choices():
    assert parse_choice("published").listed == EntitySet.published().table
    assert "dog" in parse_choice("scenes").listed


def test_many_duplicates_are_warned_of(tmp_path):
    for shard in range(3):
        write_img2dataset(tmp_path / "in", shard, [_pair(0)])
    report = run(tmp_path / "in", tmp_path / "out")
    assert report["dropped"] == {causes.DUPLICATE: 2}
    assert "number each shard from 0" in report["warnings"][0]
    assert len(ArrayRecordSource(tmp_path / "out").manifest.shards) == 1


def test_names_that_are_no_utf8_can_be_reported(tmp_path):
    path = write_img2dataset(tmp_path / "in", 0, [_pair(0)])
    os.rename(path, os.fsencode(path.parent) + b"/1\xff.tar")
    report = run(tmp_path / "in", tmp_path / "out")
    assert report["damaged_shards"][0].startswith("1\\udcff.tar: ")
    assert "udcff.tar" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_run_killed_at_its_very_end_leaves_no_work(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _fail_at(patch, run_module.shutil, "rmtree", 0)
        with pytest.raises(Killed):
            run(folder, out)
    assert len(ArrayRecordSource(out)) > 0
    with pytest.raises(UserError, match="already holds records"):
        run(folder, out)
    assert not (out / ".work").exists()


def test_worker_that_dies_is_explained():
    with LocalPool(1) as pool, pytest.raises(UserError, match="worker process died.*goes on"):
        list(pool.map(os._exit, [(1,)]))


def test_pool_keeps_the_order_and_runs_ahead_by_little():
    taken = []

    def arguments():
        for number in range(12):
            taken.append(number)
            yield (number, 2)

    with LocalPool(1) as pool:
        results = pool.map(pow, arguments())
        assert next(results) == 0
        assert len(taken) == 2
        assert [0, *results] == [number**2 for number in range(12)]
