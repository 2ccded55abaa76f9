"""Checkpoints on disk: damage to any of their files, other meshes, what a killed save leaves."""

import gc
import json
import shutil
import sys
from contextlib import closing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.batches import make_batch

from ovseg_jax.errors import UserError
from ovseg_jax.train.checkpoint import Checkpoints, Misfit
from ovseg_jax.train.step import TrainState


@pytest.fixture(autouse=True)
def collected(monkeypatch):
    """Orbax leaves coroutines behind where a read fails, which complain when they are collected.

    That is to happen here, not in whatever test comes next.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    yield
    gc.collect()


def state_of(step, rows=4):
    draw = np.random.default_rng(step)
    params = {
        name: jnp.asarray(draw.normal(size=(rows, 300)).astype(np.float32)) for name in ("a", "b")
    }
    step = jnp.asarray(step, jnp.int32)
    return TrainState(step, jnp.zeros((), jnp.int32), params, {"mu": params}, {})


def laid_out(state, shardings):
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, shardings
    )


def abstract(state):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return laid_out(state, jax.tree.map(lambda _: here, state))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 3 and 6, after one of step 1 that had to make room."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 3, 6):
        checkpoints.save(state_of(step), {"phase": step})
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder):
    """(state, position) that a run would go on from, and what it said."""
    said = []
    with closing(Checkpoints(folder)) as checkpoints:
        found = checkpoints.restore_latest(lambda _: abstract(state_of(0)), said.append)
    return found, "\n".join(said)


def assert_is(found, step):
    state, position = found
    assert position == {"phase": step, "step": step}
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


def files_of(folder):
    """Names of all files of the latest checkpoint that matter."""
    top = folder / "latest" / "6"
    names = [str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()]
    return sorted(name for name in names if "/" in name or name == "files.json")


def test_the_latest_two_are_kept_and_restored(copy):
    found, said = restore(copy)
    assert_is(found, 6)
    assert not said
    assert sorted(path.name for path in (copy / "latest").iterdir()) == ["3", "6"]


def test_the_best_stays_however_old_it_is_and_is_never_the_latest(copy):
    checkpoints = Checkpoints(copy)
    assert checkpoints.best() is None
    checkpoints.mark_best(3, 3.0, "mIoU")
    for step in (7, 8, 9):
        checkpoints.save(state_of(step), {"phase": step})
    checkpoints.close()
    checkpoints = Checkpoints(copy)
    assert checkpoints.steps() == [3, 8, 9]
    assert checkpoints.best() == {"step": 3, "miou": 3.0, "metric": "mIoU"}
    best = checkpoints.restore(abstract(state_of(0)), 3)
    jax.tree.map(np.testing.assert_array_equal, best, state_of(3))
    checkpoints.mark_best(9, 4.0, "mIoU")
    for step in (10, 11, 12):
        checkpoints.save(state_of(step), {"phase": step})
    checkpoints.close()
    assert checkpoints.steps() == [9, 11, 12]
    assert_is(restore(copy)[0], 12)


def test_a_damaged_best_is_none(copy):
    checkpoints = Checkpoints(copy)
    checkpoints.mark_best(6, 3.0, "mIoU")
    checkpoints.close()
    (copy / "latest" / "6" / "files.json").unlink()
    assert_is(restore(copy)[0], 3)
    reader = Checkpoints(copy, read_only=True)
    assert reader.best() is None and reader.steps() == [3]
    reader.close()


def test_a_file_cut_short_falls_back_whichever_it_is(saved, tmp_path):
    names = files_of(saved)
    assert len(names) > 8
    for number, name in enumerate(names):
        copy = shutil.copytree(saved, tmp_path / str(number))
        path = copy / "latest" / "6" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * (number % 2) // 2])
        found, said = restore(copy)
        assert_is(found, 3)
        assert "step 6 is damaged" in said and name.rpartition("/")[2] in said, said
        assert (copy / "damaged" / "6").is_dir() and not (copy / "latest" / "6").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_file_or_changed_content_falls_back_and_the_run_goes_on_saving(copy, missing):
    names = [name for name in files_of(copy) if "ocdbt.process_0/d/" in name]
    sizes = json.loads((copy / "latest" / "6" / "files.json").read_text())
    largest = copy / "latest" / "6" / max(names, key=sizes.get)
    content = bytes(largest.stat().st_size)
    largest.unlink()
    if not missing:
        largest.write_bytes(content)
    found, said = restore(copy)
    assert_is(found, 3)
    assert "step 6 is damaged" in said
    assert (f"{max(names, key=sizes.get)} is missing" in said) == missing
    with closing(Checkpoints(copy)) as checkpoints:
        checkpoints.save(state_of(6), {"phase": 6})
    assert_is(restore(copy)[0], 6)
    gc.collect()  # Orbax leaves reads that were never awaited: their warnings belong here


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused(copy, monkeypatch):
    said = "step 7: .*has 1.0 MB left, .* takes 4.8 MB. That of step 6 is complete: the same"
    with closing(Checkpoints(copy)) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
        with pytest.raises(UserError, match=said):
            checkpoints.save(state_of(7, rows=1000), {"phase": 7})
    assert checkpoints.steps() == [3, 6]


def test_nothing_whole_is_an_error_and_nothing_at_all_a_beginning(copy, tmp_path):
    for step in ("3", "6"):
        (copy / "latest" / step / "files.json").unlink()
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        restore(copy)
    assert restore(tmp_path / "new") == (None, "")


def test_other_shapes_are_no_damage(copy):
    with closing(Checkpoints(copy)) as checkpoints:
        with pytest.raises(Misfit, match=r"params/a: saved \(4, 300\), needed \(5, 300\)"):
            checkpoints.restore_latest(lambda _: abstract(state_of(0, rows=5)), print)
    assert checkpoints.steps() == [3, 6]


def test_what_a_killed_save_left_is_removed_by_a_run_but_not_by_a_reader(copy, tmp_path):
    left = copy / "latest" / "9.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    with closing(Checkpoints(copy, read_only=True)) as reader:
        assert reader.steps() == [3, 6]
        assert reader.position(6) == {"phase": 6, "step": 6}
    assert left.exists()
    assert_is(restore(copy)[0], 6)
    assert not left.exists()
    with closing(Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)) as reader:
        assert reader.steps() == [] and reader.best() is None
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_next_step_is_the_same_on_another_mesh(make_steps, tmp_path):
    one, mixed = make_steps("one", 0.1), make_steps("mixed", 0.1)
    state, _ = one(one.place(), make_batch(0, second=True))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"phase": 0})
    checkpoints.wait()
    there = checkpoints.restore(laid_out(mixed.start, mixed.shardings), 1)
    here = checkpoints.restore(laid_out(one.start, one.shardings), 1)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(there), jax.device_get(here))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(there))
    batch = make_batch(1, second=True)
    (_, expected), (_, found) = one(here, batch), mixed(there, batch)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
