"""A preparation repeats itself to the byte, in processes and on Beam, and goes on when killed."""

import importlib.util
import itertools
import os
import signal
import subprocess
import sys

import pytest
from messy_folder import ENTITIES, files, run, write_folder

from ovseg_jax.data.prepare import run as run_module
from ovseg_jax.data.prepare import shard
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.run import EntityChoice, parse_choice
from ovseg_jax.data.records import ArrayRecordSource
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import beam_jobs, local_jobs, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run(folder, out)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_write_the_same_bytes(finished, folder, tmp_path, workers):
    run(folder, tmp_path / "out", run_jobs=local_jobs(workers))
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
    (run_module, "process_shard", 0),
    (run_module, "process_shard", 3),
    (shard, "index_line", 20),
    (run_module, "find_repeated", 0),
    (run_module, "drop_repeated", 1),
    (shard, "pack_record", 30),
    (run_module, "move_file", 2),
    (run_module, "_write_index", 0),
    (run_module, "_write_entity_index", 0),
    (run_module, "make_report", 0),
    (run_module, "manifest_text", 0),
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


def test_finished_shards_are_not_processed_again(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _fail_at(patch, run_module, "process_shard", 3)
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
        "from pathlib import Path\n"
        "from ovseg_jax.data.entities import EntitySet\n"
        "from ovseg_jax.data.prepare.run import EntityChoice\n"
        "from ovseg_jax.prepare import local_jobs\n"
        "from ovseg_jax.data.prepare.rules import Rules\n"
        "from ovseg_jax.data.prepare.run import prepare\n"
        "from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource\n"
        "choice = EntityChoice(EntitySet.from_json(sys.argv[3]).table, 'a test')\n"
        "def say(line):\n"
        "    print(line, flush=True)\n"
        "    if line.startswith('shard 2'): time.sleep(600)\n"
        "prepare(Img2DatasetSource(sys.argv[1]), Path(sys.argv[2]), choice, Rules(),\n"
        "        run_jobs=local_jobs(0), say=say)\n"
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
    (out / ".work" / "shard-00002.array_record").write_bytes(b"half a file")
    lines = []
    run(folder, out, say=lines.append)
    assert lines[0] == "2 of 5 shards were finished before"
    assert files(out) == files(finished[0])


def test_other_arguments_do_not_go_on(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _fail_at(patch, run_module, "process_shard", 1)
        with pytest.raises(Killed):
            run(folder, out)
    with pytest.raises(UserError, match=r"other arguments.*\(rules\)"):
        run(folder, out, rules=Rules(min_side=5))
    other = EntityChoice({"dog": []}, "a test")
    with pytest.raises(UserError, match=r"\(listed\)"):
        run(folder, out, choice=other)


def test_counting_nouns_goes_on_too(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "whole", choice=parse_choice("auto:2"))
    with monkeypatch.context() as patch:
        _fail_at(patch, run_module, "write_nouns", 2)
        with pytest.raises(Killed):
            run(folder, tmp_path / "cut", choice=parse_choice("auto:2"))
    run(folder, tmp_path / "cut", choice=parse_choice("auto:2"))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_run_killed_at_its_very_end_leaves_no_work(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _fail_at(patch, run_module, "remove_folder", 0)
        with pytest.raises(Killed):
            run(folder, out)
    assert len(ArrayRecordSource(out)) > 0
    with pytest.raises(UserError, match="already holds records"):
        run(folder, out)
    assert not (out / ".work").exists()


def test_worker_that_dies_is_explained():
    with pytest.raises(UserError, match="worker process died.*goes on"):
        list(local_jobs(1)(os._exit, [(1,)]))


# ---- Apache Beam


@pytest.mark.parametrize("entities", ["published", "auto:2"])
def test_beam_writes_the_same_bytes(folder, tmp_path, entities):
    where = [f"--source=img2dataset:{folder}", f"--entities={entities}"]
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
    with pytest.raises(UserError, match="none of DirectRunner"):
        beam_jobs("Dataflow")
    with pytest.raises(UserError, match=r"needs --source in a bucket, gs://\.\.\."):
        main(["--source=scenes:3", f"--out={tmp_path}", "--runner=DataflowRunner"])
    with pytest.raises(UserError, match=r"needs --out in a bucket, gs://\.\.\."):
        main(["--source=img2dataset:gs://a/b", f"--out={tmp_path}", "--runner=DataflowRunner"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ovseg_jax\[beam\]'"):
        beam_jobs("SparkRunner")
