"""The same preparation on Apache Beam: the same bytes, and its mistakes explained."""

import importlib.util

import pytest
from pair_folders import jpeg, write_img2dataset

from ovseg_jax.data.prepare.beam_pool import Beam, BeamPool
from ovseg_jax.data.prepare.parts import PartPaths
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("in")
    for shard in range(4):
        pairs = [(f"{shard}{n}", f"a dog and a cat {n}", jpeg(n)) for n in range(3)]
        pairs.append(("twice", "a bird", jpeg()))
        pairs.append((f"{shard}x", "a broken dog", b""))
        write_img2dataset(path, shard, pairs, failed=[f"f{shard}"])
    return path


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("entities", ["published", "auto:2"])
def test_beam_writes_the_same_bytes(folder, tmp_path, entities):
    where = [f"--source=img2dataset:{folder}", f"--entities={entities}"]
    assert main([*where, f"--out={tmp_path / 'local'}", "--workers=0"]) == 0
    assert main([*where, f"--out={tmp_path / 'beam'}", "--runner=DirectRunner"]) == 0
    assert files(tmp_path / "beam") == files(tmp_path / "local")


def _double(number, path):
    if number == 3:
        raise UserError("three is too many")
    return 2 * number, path.name


def test_results_come_in_order_and_mistakes_come_through(tmp_path):
    with BeamPool(Beam("DirectRunner"), tmp_path) as pool:
        found = list(pool.map(_double, ((n, PartPaths(tmp_path, n).done) for n in (5, 1, 4))))
        assert found == [(10, "part-00005.json"), (2, "part-00001.json"), (8, "part-00004.json")]
        assert list(pool.map(_double, [])) == []
        with pytest.raises(UserError, match="three is too many"):
            list(pool.map(_double, ((n, tmp_path) for n in range(5))))
        with pytest.raises(UserError, match="pipeline on DirectRunner failed.*goes on"):
            list(pool.map(_double, [(1, None)]))
    assert not list(tmp_path.iterdir())


def test_runner_options_reach_beam(tmp_path):
    beam = Beam("DirectRunner", ("--direct_running_mode=no_such_mode",))
    with pytest.raises(UserError, match="--beam_options: .*direct_running_mode: invalid choice"):
        with BeamPool(beam, tmp_path) as pool:
            list(pool.map(_double, [(1, tmp_path)]))


def test_missing_beam_is_explained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ovseg_jax\[beam\]'"):
        Beam("SparkRunner")
    with pytest.raises(UserError, match="none of DirectRunner"):
        Beam("Dataflow")


def test_dataflow_needs_buckets(tmp_path):
    with pytest.raises(UserError, match=r"needs --source in a bucket, gs://\.\.\."):
        main(["--source=scenes:3", f"--out={tmp_path}", "--runner=DataflowRunner"])
    with pytest.raises(UserError, match=r"needs --out in a bucket, gs://\.\.\."):
        main(["--source=img2dataset:gs://a/b", f"--out={tmp_path}", "--runner=DataflowRunner"])
