"""Feature stores appear complete or not at all."""

import json
import pickle

import numpy as np
import pytest

from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.errors import UserError

LAYOUT = {"image": ((3, 2, 4, 5), "float16"), "masked_mask": ((3, 7), np.bool_)}


@pytest.fixture
def store(tmp_path):
    building = FeatureStore.create(tmp_path / "store", "key", LAYOUT)
    building["image"][1] = 2.5
    building["masked_mask"][2, 3] = True
    return building.commit()


def test_what_is_written_is_read(store, tmp_path):
    for again in (store, FeatureStore.open(tmp_path / "store", "key")):
        assert again.names == ("image", "masked_mask")
        assert "image" in again
        assert "other" not in again
        assert again["image"].dtype == np.float16
        assert (again["image"][1] == 2.5).all()
        assert not again["image"][[0, 2]].any()
        assert again["masked_mask"].sum() == 1
        with pytest.raises(ValueError, match="read-only"):
            again["image"][0] = 1


def test_unfinished_store_is_absent(tmp_path):
    building = FeatureStore.create(tmp_path / "store", "key", LAYOUT)
    building["image"][:] = 1
    assert FeatureStore.open(tmp_path / "store", "key") is None
    building.commit()
    assert FeatureStore.open(tmp_path / "store", "key") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_left_overs_of_a_killed_run_are_removed(tmp_path):
    FeatureStore.create(tmp_path / "store", "key", LAYOUT)
    FeatureStore.create(tmp_path / "store", "key", LAYOUT)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_key_is_another_store(store, tmp_path):
    assert FeatureStore.open(tmp_path / "store", "other") is None
    replaced = FeatureStore.create(tmp_path / "store", "other", {"x": ((1,), "int32")}).commit()
    assert replaced.names == ("x",)
    assert FeatureStore.open(tmp_path / "store", "key") is None
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["meta.json", "x.npy"]


def _drop_meta(folder):
    (folder / "meta.json").unlink()


def _cut_meta(folder):
    (folder / "meta.json").write_text("{")


def _wrong_shape(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["arrays"]["image"][0] = [3, 2, 4, 6]
    (folder / "meta.json").write_text(json.dumps(meta))


def _cut_array(folder):
    (folder / "image.npy").write_bytes((folder / "image.npy").read_bytes()[:-10])


def _drop_array(folder):
    (folder / "image.npy").unlink()


@pytest.mark.parametrize("damage", [_drop_meta, _cut_meta, _wrong_shape, _cut_array, _drop_array])
def test_damaged_store_is_absent(store, tmp_path, damage):
    damage(tmp_path / "store")
    assert FeatureStore.open(tmp_path / "store", "key") is None


def test_absent_array_and_second_commit_are_user_errors(store):
    with pytest.raises(UserError, match="no array 'x'"):
        store["x"]
    with pytest.raises(UserError, match="already complete"):
        store.commit()


def test_pickle_carries_the_path_not_the_data(tmp_path):
    layout = {"image": ((100, 1000), "float16")}
    store = FeatureStore.create(tmp_path / "big", "key", layout).commit()
    assert store["image"].shape == (100, 1000)
    data = pickle.dumps(store)
    assert len(data) < 5000
    assert pickle.loads(data)["image"].shape == (100, 1000)
