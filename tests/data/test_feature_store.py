"""Feature stores appear complete or not at all; batches of cached features are those meant."""

import json
import os
import pickle

import numpy as np
import pytest
from memory_source import MemorySource
from small_set import BROKEN, NAMES, TEMPLATES, load, prompts_of

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
        assert "masked_mask" in again
        assert "image" in again
        assert "other" not in again
        assert again["image"].dtype == np.float16
        assert (again["image"][1] == 2.5).all()
        assert not again["image"][[0, 2]].any()
        assert again["masked_mask"].sum() == 1
        with pytest.raises(ValueError, match="read-only"):
            again["image"][0] = 1
        with pytest.raises(UserError, match="x.npy cannot be read"):
            again["x"]


def test_unfinished_store_is_absent_and_removed_later(tmp_path):
    FeatureStore.create(tmp_path / "store", "key", LAYOUT)
    building = FeatureStore.create(tmp_path / "store", "key", LAYOUT)
    building["image"][:] = 1
    assert FeatureStore.open(tmp_path / "store", "key") is None
    building.commit()
    assert FeatureStore.open(tmp_path / "store", "key") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_other_key_is_another_store(store, tmp_path):
    assert FeatureStore.open(tmp_path / "store", "other") is None
    replaced = FeatureStore.create(tmp_path / "store", "other", {"x": ((1,), "int32")}).commit()
    assert "x" in replaced and "image" not in replaced
    assert FeatureStore.open(tmp_path / "store", "key") is None
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["meta.json", "x.npy"]


def _wrong_shape(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["arrays"]["image"][0] = [3, 2, 4, 6]
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGE = {
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "cut meta": lambda folder: (folder / "meta.json").write_text("{"),
    "wrong shape": _wrong_shape,
    "cut array": lambda folder: os.truncate(folder / "image.npy", 200),
    "no array": lambda folder: (folder / "image.npy").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_store_is_absent(store, tmp_path, damage):
    damage(tmp_path / "store")
    assert FeatureStore.open(tmp_path / "store", "key") is None


def test_pickle_carries_the_path_not_the_data(tmp_path):
    layout = {"image": ((100, 1000), "float16")}
    store = FeatureStore.create(tmp_path / "big", "key", layout).commit()
    assert store["image"].shape == (100, 1000)
    data = pickle.dumps(store)
    assert len(data) < 5000
    assert pickle.loads(data)["image"].shape == (100, 1000)


# ---- batches


@pytest.fixture
def stores(source, tmp_path):
    """Features that say what they are made of: the record, the view, the template."""
    count, length, width = len(source), 4, 2
    layout = {"image": ((count, 3, 5, width), "float16"), "valid": ((count,), "int32")}
    images = FeatureStore.create(tmp_path / "images", "k", layout)
    images["image"][:] = (np.arange(count)[:, None] * 10 + np.arange(3))[..., None, None]
    images["valid"][:] = np.arange(count) != BROKEN
    layout = {"caption_starts": ((count + 1,), "int64"), "masked_mask": ((count, length), "bool")}
    layout |= dict.fromkeys(("caption_rows", "masked_rows"), ((count,), "int32"))
    layout |= {"prompt_rows": ((count, len(TEMPLATES)), "int32")}
    layout |= {"caption_pooled": ((count, width), "float16")}
    layout |= {"masked_tokens": ((count, length, width), "float16")}
    layout |= {"prompt_pooled": ((len(TEMPLATES), width), "float16")}
    layout |= {"shared_pooled": ((len(NAMES), width), "float16")}
    texts = FeatureStore.create(tmp_path / "texts", "k", layout)
    texts["caption_pooled"][:] = np.arange(count)[:, None]
    texts["masked_mask"][:, :2] = True
    texts["caption_starts"][:] = np.arange(count + 1)
    texts["caption_rows"][:] = texts["masked_rows"][:] = np.arange(count)
    texts["prompt_rows"][:] = np.arange(len(TEMPLATES))
    texts["prompt_pooled"][:] = np.arange(len(TEMPLATES))[:, None]
    texts["shared_pooled"][:] = np.arange(len(NAMES))[:, None] + 1
    return {"image_store": images.commit(), "text_store": texts.commit()}


def test_cached_features_take_the_place_of_images_and_ids(read, stores):
    batch = read(last_step=1, **stores)[0]
    shapes = dict.fromkeys(("image_features", "image2_features"), (5, 2))
    shapes |= dict.fromkeys(("caption_pooled", "prompt_pooled", "shared_pooled"), (2,))
    shapes |= {"masked_tokens": (4, 2), "masked_mask": (4,), "caption_set": (4,)}
    assert {name: x.shape[1:] for name, x in batch.items() if x.ndim > 1} == shapes
    assert type(batch["image_features"]) is np.ndarray
    good = batch["weight"] > 0
    np.testing.assert_array_equal(batch["caption_pooled"][good, 0], batch["record"][good])
    np.testing.assert_array_equal(batch["image_features"][good, 0, 0] // 10, batch["record"][good])
    assert batch["masked_mask"].any(1).all(), "attention over no token at all would be 0/0"


def test_cached_and_fresh_texts_use_the_same_template_and_partner(read, stores, tokenizer, source):
    for fresh, cached in zip(read(), read(**stores), strict=True):
        sets = ("entity_set", "caption_set")
        for name in ("record", "weight", "entity_weight", "pair_weight", *sets):
            np.testing.assert_array_equal(fresh[name], cached[name], err_msg=name)
        for at, index in enumerate(fresh["record"]):
            if index == BROKEN:
                continue
            template = TEMPLATES[int(cached["prompt_pooled"][at, 0])]
            (text,) = prompts_of(source[int(index)].captions[0], [template])
            np.testing.assert_array_equal(fresh["prompt_ids"][at], tokenizer.encode([text], 12)[0])
            shared = int(cached["shared_pooled"][at, 0])
            text = f"a photo of {NAMES[shared - 1]}" if shared else ""
            np.testing.assert_array_equal(fresh["shared_ids"][at], tokenizer.encode([text], 12)[0])


def test_every_stored_view_is_drawn(read, stores):
    views = set()
    for batch in read(last_step=20, **stores):
        views |= set((batch["image_features"][batch["weight"] > 0, 0, 0] % 10).astype(int))
    assert views == {0, 1, 2}


class _NoImages(MemorySource):
    def __getitem__(self, index):
        raise AssertionError("cached features make reading a record pointless")


def test_no_record_is_read_when_images_are_cached(source, stores):
    blind = _NoImages([source[index] for index in range(23)])
    loader = load(blind, None, spec={"templates": TEMPLATES}, **stores)
    assert len(list(loader)) == 7
    assert set(loader.failures) <= {f"key-{BROKEN}"}


def test_store_of_another_data_set_is_a_user_error(source, stores):
    with pytest.raises(UserError, match="prompt_rows is for 3 and not for 25 "):
        load(source, None, spec={}, **stores)
    with pytest.raises(UserError, match="image is for 23 and not for 1 "):
        load(MemorySource([source[0]]), None, spec={"templates": TEMPLATES}, **stores)
