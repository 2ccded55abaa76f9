"""A whole preparation: what it writes and refuses; the same bytes wherever and however often."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from pair_folders import encoded, jpeg, write_img2dataset
from PIL import Image

from ovseg_jax.data import records
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.order import PairIndex
from ovseg_jax.data.prepare import pairs, rules, shard
from ovseg_jax.data.prepare import pipeline as run_module
from ovseg_jax.data.prepare.pipeline import EntityChoice, parse_choice, prepare
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.data.records import ArrayRecordSource, key_digest
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import beam_jobs, local_jobs, main

NOUNS = ["dog", "cat", "bus", "tree"]
ENTITIES = EntitySet({"dog": ["puppy"], "cat": [], "bus": [], "unicorn": []})
CHOICE = EntityChoice(ENTITIES.table, "a test")


def good_pair(number):
    """(key, caption, image) with nothing wrong."""
    named = f"a {NOUNS[number % 4]} and a {NOUNS[number // 4 % 4]}"
    return f"{number:09d}", f"{named} &amp; more" if number % 7 == 0 else named, jpeg(number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five shards of eight pairs, with one of nearly everything that goes wrong."""
    path = tmp_path_factory.mktemp("shards")
    for number in range(5):
        pairs = [good_pair(8 * number + n) for n in range(8)]
        if number == 1:
            # The first holder of the key is broken: the second is no duplicate.
            pairs[0] = ("twice", "a dog", b"broken")
            pairs[1] = ("000000002", "a cat too many", jpeg(99))
            pairs[2] = ("a", "a tiny dog", encoded(Image.new("RGB", (3, 3))))
        if number == 2:
            pairs[0] = ("twice", "a dog", jpeg(98))
            pairs[1] = ("twice", "a dog again", jpeg(97))
            pairs[2] = ("b", b"a dog \xff", jpeg(96))
        if number == 3:  # nothing is kept
            pairs = [(key, "a tree", image) for key, _, image in pairs]
        write_img2dataset(path, number, pairs, failed=[f"f{number}"] if number != 4 else [])
    cut = path / "00004.tar"
    data = cut.read_bytes().rstrip(b"\0")
    cut.write_bytes(data[: len(data) // 2])
    return path


def run(folder, out, **changes):
    """Prepares a folder with `CHOICE` and the usual rules, silently; returns the report."""
    options = {"choice": CHOICE, "rules": Rules(), "run_jobs": local_jobs(0), "say": lambda line: 0}
    return prepare(Img2DatasetSource(folder), out, **options | changes)


def files(directory):
    """Name -> content of all files of a folder."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
    assert [shard.file[8:13] for shard in source.manifest.shards] == [f"0000{n}" for n in range(4)]
    reports = {"manifest.json", "entities.json", "report.json", "report.html"}
    assert set(files(out)) == {info.file for info in source.manifest.everything()} | reports
    assert EntitySet.from_json(out / "entities.json").table == ENTITIES.table


def test_index_and_counts_are_those_of_the_captions(finished):
    out, report = finished
    source = ArrayRecordSource(out)
    found = [ENTITIES.find(caption) for (caption,) in source.captions()]
    expected, index = PairIndex.build(found), PairIndex(*source.entity_index())
    for entity in range(len(ENTITIES)):
        np.testing.assert_array_equal(index.members(entity), expected.members(entity))
    assert len(index.members(3)) == 0
    assert isinstance(index.records, np.memmap), "on disk, not in memory"
    names = ENTITIES.names
    counts = [sum(entity in ids for ids in found) for entity in range(len(names))]
    assert report["entities"] == dict(zip(names, counts, strict=True))
    both = {(a, b): sum({a, b} <= set(ids) for ids in found)
            for a, b in itertools.combinations(range(4), 2)}  # fmt: skip
    expected = {(names[a], names[b]): count for (a, b), count in both.items() if count}
    assert {(a, b): n for a, b, n in report["together"]} == expected
    words = [len(caption.split()) for (caption,) in source.captions()]
    assert report["caption_words"] == np.bincount(words, minlength=81).tolist()


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
    page = (out / "report.html").read_text()
    assert "1 of their captions: no entity" in page
    source = ArrayRecordSource(out)
    assert source.captions() == [("a dog", "two dogs here"), ("a cat",)]
    index = PairIndex(*source.entity_index())
    assert [index.members(entity).tolist() for entity in (0, 1)] == [[0], [1]]


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


def test_entity_choices():
    assert parse_choice("published").table == EntitySet.published().table
    assert "dog" in parse_choice("scenes").table
    wrong = dict.fromkeys(("auto", "auto:0", "auto:many"), "must say how many")
    wrong |= {"publisht": "none of: published", "none.json": "no entity file"}
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            parse_choice(text)


def test_many_duplicates_are_warned_of(tmp_path):
    for number in range(3):
        write_img2dataset(tmp_path / "in", number, [good_pair(0)])
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


# ---- again, killed, and elsewhere


def test_two_runs_write_the_same_bytes(finished, folder, tmp_path):
    run(folder, tmp_path / "out", run_jobs=local_jobs(2))
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
    (shard, "process_shard", 0), (shard, "process_shard", 3), (records, "index_line", 20),
    (shard, "find_repeated", 0), (shard, "drop_repeated", 1), (records, "pack_record", 30),
    (run_module, "move_file", 2), (run_module, "_write_index", 0),
    (run_module, "_write_entity_index", 0), (run_module, "make_report", 0),
    (run_module, "manifest_text", 0),
]  # fmt: skip


def killed(monkeypatch, stage, folder, out, **changes):
    """A run that was killed at a stage."""
    with monkeypatch.context() as patch:
        _fail_at(patch, *stage)
        with pytest.raises(Killed):
            run(folder, out, **changes)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage[1]} {stage[2]}")
def test_cut_off_run_goes_on_to_the_same_bytes(finished, folder, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    killed(monkeypatch, stage, folder, out)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        ArrayRecordSource(out)
    lines = []
    run(folder, out, say=lines.append)
    assert files(out) == files(finished[0])
    if stage == (shard, "process_shard", 3):
        assert lines[0] == "3 of 5 shards were finished before"
        assert lines[1].startswith("shard 1 of 2: ")


def test_counting_nouns_goes_on_too(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "whole", choice=parse_choice("auto:2"))
    cut = tmp_path / "cut"
    killed(monkeypatch, (shard, "write_nouns", 2), folder, cut, choice=parse_choice("auto:2"))
    run(folder, cut, choice=parse_choice("auto:2"))
    assert files(cut) == files(tmp_path / "whole")


PROGRAM = """
import sys, time
from pathlib import Path
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare.pipeline import EntityChoice, prepare
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.prepare import local_jobs

def say(line):
    print(line, flush=True)
    if line.startswith("shard 2"):
        time.sleep(600)

choice = EntityChoice(EntitySet.from_json(sys.argv[3]).table, "a test")
source, out = Img2DatasetSource(sys.argv[1]), Path(sys.argv[2])
prepare(source, out, choice, Rules(), run_jobs=local_jobs(0), say=say)
"""


def test_killed_process_goes_on(finished, folder, tmp_path):
    out, entities = tmp_path / "out", tmp_path / "entities.json"
    # The same table and the same words about it as `finished` has.
    ENTITIES.to_json(entities)
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(out), str(entities)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
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
    (out / ".work" / "shard-00002.array_record").write_bytes(b"half a file")
    lines = []
    run(folder, out, say=lines.append)
    assert lines[0] == "2 of 5 shards were finished before"
    assert files(out) == files(finished[0])


def test_other_arguments_do_not_go_on(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed(monkeypatch, (shard, "process_shard", 1), folder, out)
    with pytest.raises(UserError, match=r"other arguments.*\(rules\)"):
        run(folder, out, rules=Rules(min_side=5))
    other = EntityChoice({"dog": []}, "a test")
    with pytest.raises(UserError, match=r"\(listed\)"):
        run(folder, out, choice=other)


def test_run_killed_at_its_very_end_leaves_no_work(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed(monkeypatch, (pairs, "remove_folder", 0), folder, out)
    assert len(ArrayRecordSource(out)) > 0
    with pytest.raises(UserError, match="already holds records"):
        run(folder, out)
    assert not (out / ".work").exists()


def test_worker_that_dies_is_explained():
    with pytest.raises(UserError, match="worker process died.*goes on"):
        list(local_jobs(1)(os._exit, [(1,)]))


# ---- Apache Beam


def test_beam_writes_the_same_bytes(folder, tmp_path):
    where = [f"--source=img2dataset:{folder}", "--entities=auto:2"]
    assert main([*where, f"--out={tmp_path / 'local'}", "--workers=0"]) == 0
    assert main([*where, f"--out={tmp_path / 'beam'}", "--runner=DirectRunner"]) == 0
    assert files(tmp_path / "beam") == files(tmp_path / "local")


def _write_name(number, folder):
    if number == 3:
        raise UserError("three is too many")
    (folder / str(number)).touch()


def test_beam_runs_every_job_and_tells_mistakes(tmp_path):
    run_jobs = beam_jobs("DirectRunner")
    assert len(list(run_jobs(_write_name, [(n, tmp_path) for n in (5, 1, 4)]))) == 3
    assert sorted(files(tmp_path)) == ["1", "4", "5"]
    assert list(run_jobs(_write_name, [])) == []
    with pytest.raises(UserError, match="pipeline on DirectRunner failed.*three is too many.*goes"):
        list(run_jobs(_write_name, [(3, tmp_path)]))
    with pytest.raises(UserError, match="pipeline on DirectRunner failed.*goes on"):
        list(run_jobs(_write_name, [(1, None)]))


def test_beam_that_cannot_run_is_explained(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--beam_options: .*direct_running_mode: invalid choice"):
        beam_jobs("DirectRunner", ["--direct_running_mode=no_such_mode"])
    with pytest.raises(UserError, match=r"needs --source in a bucket, gs://\.\.\."):
        main(["--source=scenes:3", f"--out={tmp_path}", "--runner=DataflowRunner"])
    with pytest.raises(UserError, match=r"needs --out in a bucket, gs://\.\.\."):
        main(["--source=img2dataset:gs://a/b", f"--out={tmp_path}", "--runner=DataflowRunner"])
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'ovseg_jax\[beam\]'"):
        beam_jobs("SparkRunner")
