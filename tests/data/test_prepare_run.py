"""A whole preparation: what it writes, and what it refuses."""

import itertools
import json
import os
import resource

import numpy as np
import pytest
from messy_folder import ENTITIES, files, good_pair, run, write_folder
from pair_folders import jpeg, write_img2dataset

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.order import PairIndex
from ovseg_jax.data.prepare import rules
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.run import EntityChoice, parse_choice
from ovseg_jax.data.records import ArrayRecordSource, key_digest
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run(folder, out)


def test_every_pair_is_kept_or_counted(finished):
    out, report = finished
    lost = report["dropped"][rules.LOST]
    assert report["read"] == 5 * 8 + 4 == report["kept"] + sum(report["dropped"].values())
    assert 0 < lost < 8
    assert report["dropped"] == {
        rules.NOT_DOWNLOADED: 4,
        rules.LOST: lost,
        rules.NOT_UTF8: 1,
        rules.NO_ENTITY: report["dropped"][rules.NO_ENTITY],
        "unreadable image: not an image": 1,
        rules.SMALL_IMAGE: 1,
        rules.DUPLICATE: 2,
    }
    assert report["dropped_examples"][rules.DUPLICATE] == ["000000002", "twice"]
    assert report["dropped_examples"][rules.NOT_DOWNLOADED] == ["f0", "f1", "f2", "f3"]
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
    assert len(set(keys)) == len(keys) == 8 + 4 + 6 + 0 + 8 - report["dropped"][rules.LOST]
    assert keys == source.keys()
    assert report["records"]["keys_sha256"] == key_digest(keys)
    # Of equal keys the first that nothing is wrong with stays.
    assert records[keys.index("twice")].image == jpeg(98)
    assert records[keys.index("000000002")].image == jpeg(2)
    assert [record.captions for record in records] == source.captions()
    assert ("a dog and a dog & more",) in source.captions()
    for record in records:
        assert record.entities == ENTITIES.find(record.captions[0]) != ()
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
    entities = [ENTITIES.find(caption) for (caption,) in source.captions()]
    expected = PairIndex.build(entities)
    index = PairIndex(*source.entity_index())
    for entity in range(len(ENTITIES)):
        np.testing.assert_array_equal(index.members(entity), expected.members(entity))
    assert len(index.members(3)) == 0
    assert isinstance(index.records, np.memmap), "on disk, not in memory"


def test_counts_are_those_of_the_records(finished):
    out, report = finished
    source = ArrayRecordSource(out)
    found = [ENTITIES.find(caption) for (caption,) in source.captions()]
    assert report["entities"] == {
        name: sum(entity in ids for ids in found) for entity, name in enumerate(ENTITIES.names)
    }
    together = {
        (ENTITIES.names[a], ENTITIES.names[b]): n
        for a, b in itertools.combinations(range(3), 2)
        if (n := sum({a, b} <= set(ids) for ids in found))
    }
    assert {(a, b): n for a, b, n in report["together"]} == together
    words = [len(caption.split()) for (caption,) in source.captions()]
    assert report["caption_words"] == np.bincount(words, minlength=81).tolist()
    assert report["image_sides"]["0"] == len(source)


def test_captions_are_counted(tmp_path, capsys):
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(jpeg(index))
    rows = ["0.jpg,a dog", "1.jpg,a cat", "0.jpg,two dogs here", "0.jpg,a stone", "2.jpg,stones"]
    rows += ["1.jpg,a cat", "x.jpg,a dog", "x.jpg,a cat"]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    (tmp_path / "entities.json").write_text('{"dog": [], "cat": []}')
    out = tmp_path / "out"
    listed = f"--entities={tmp_path / 'entities.json'}"
    assert not main([f"--source=files:{tmp_path / 't.csv'}", f"--out={out}", listed, "--workers=0"])
    report = json.loads((out / "report.json").read_text())
    assert (report["read"], report["kept"], report["captions"]) == (4, 2, 3)
    assert report["dropped"] == {rules.NO_ENTITY: 1, rules.NO_IMAGE: 1}
    assert report["captions_dropped"] == {rules.NO_ENTITY: 1, rules.REPEATED: 1}
    assert sum(report["caption_words"]) == 3 and report["caption_words"][2:4] == [2, 1]
    said = capsys.readouterr().out
    assert "with 3 captions" in said and "1 of their captions: repeated caption" in said
    assert (
        "3; dropped of kept pairs: no entity 1, repeated caption 1"
        in (out / "report.html").read_text()
    )
    source = ArrayRecordSource(out)
    assert source.captions() == [("a dog", "two dogs here"), ("a cat",)]
    assert [PairIndex(*source.entity_index()).members(entity).tolist() for entity in (0, 1)] == [
        [0],
        [1],
    ]


def test_folders_that_hold_something_else(finished, folder, tmp_path):
    with pytest.raises(UserError, match="already holds records"):
        run(folder, finished[0])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run(folder, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        run(folder, tmp_path / "file" / "out")


@pytest.mark.parametrize("room", [500, 20_000], ids=["for no record", "for some records"])
def test_full_disk_is_one_line_and_the_run_goes_on(finished, folder, tmp_path, room):
    """A limit on the size of files stands in for the full disk: the same errors come of it."""
    (tmp_path / "entities.json").write_text(json.dumps(ENTITIES.table))
    out = tmp_path / "out"
    command = [f"--source=img2dataset:{folder}", f"--out={out}", "--workers=0"]
    command.append(f"--entities={tmp_path / 'entities.json'}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be finished \(.*goes on where it was"):
            main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in out.iterdir()] == [".work"] and not list(out.glob(".work/.*"))
    assert main(command) == 0
    assert len(ArrayRecordSource(out)) == finished[1]["kept"]


def test_nothing_kept_is_said_with_the_causes(folder, tmp_path):
    choice = EntityChoice({"unicorn": []}, "a test")
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


def test_pairs_without_entities_on_request(folder, tmp_path):
    report = run(folder, tmp_path / "out", rules=Rules(keep_without_entities=True))
    source = ArrayRecordSource(tmp_path / "out")
    assert rules.NO_ENTITY not in report["dropped"]
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
    assert parse_choice("published").table == EntitySet.published().table
    assert "dog" in parse_choice("scenes").table


def test_many_duplicates_are_warned_of(tmp_path):
    for shard in range(3):
        write_img2dataset(tmp_path / "in", shard, [good_pair(0)])
    report = run(tmp_path / "in", tmp_path / "out")
    assert report["dropped"] == {rules.DUPLICATE: 2}
    assert "number each shard from 0" in report["warnings"][0]
    assert len(ArrayRecordSource(tmp_path / "out").manifest.shards) == 1


def test_names_that_are_no_utf8_can_be_reported(tmp_path):
    path = write_img2dataset(tmp_path / "in", 0, [good_pair(0)])
    os.rename(path, os.fsencode(path.parent) + b"/1\xff.tar")
    report = run(tmp_path / "in", tmp_path / "out")
    lost, named = report["damaged_shards"]
    assert lost.startswith("00000.tar: ") and named.startswith("1\\udcff.tar: ")
    assert "udcff.tar" in (tmp_path / "out" / "report.html").read_text("utf-8")
