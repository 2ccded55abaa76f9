"""Batches: the same however they are read, and complete however bad the data."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.captions import texts_of
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import entity_set_hash
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.pairs import PairIndex
from ovseg_jax.data.pipeline import encode_record_texts, make_loader
from ovseg_jax.data.records import ArrayRecordSource, MemorySource, Record, write_records
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.data.tokens import Tokenizer
from ovseg_jax.errors import UserError

NAMES = ("dog", "cat", "bus", "tree")
ENTITIES = EntitySet({name: [name] for name in NAMES})
TEMPLATES = ("a photo of a {}.", "a drawing of {}.", "{}")
SPEC = {
    "text_length": 12,
    "transform": {"kind": "crop", "size": 16, "scale": (0.4, 1.0)},
    "templates": TEMPLATES,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES, "a", "and", "photo", "of", "sky"]
BROKEN = 3


def _record(index, rng):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    # Record 5 alone names a tree; every seventh names nothing.
    named = ["tree"] if index == 5 else [NAMES[index % 3], NAMES[(index // 3) % 3]]
    caption = "a sky" if index % 7 == 0 else "a photo of a " + " and a ".join(named)
    image = b"garbage" if index == BROKEN else buffer.getvalue()
    return Record(image, caption, f"key-{index}")


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    return MemorySource([_record(index, rng) for index in range(23)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return Tokenizer(directory)


@pytest.fixture
def read(source, tokenizer):
    def batches(**changes):
        settings = {
            "batch_size": 8,
            "seed": 1,
            "first_step": 0,
            "last_step": 7,
            "with_pairs": True,
            "threads": 2,
        }
        settings.update(changes)
        return list(make_loader(source, ENTITIES, tokenizer, SPEC, **settings))

    return batches


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_shapes_and_types(read):
    batch = read(last_step=1)[0]
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "image": ("uint8", (8, 16, 16, 3)),
        "image2": ("uint8", (8, 16, 16, 3)),
        "caption_ids": ("int32", (8, 12)),
        "masked_ids": ("int32", (8, 12)),
        "prompt_ids": ("int32", (8, 12)),
        "shared_ids": ("int32", (8, 12)),
        "weight": ("float32", (8,)),
        "entity_weight": ("float32", (8,)),
        "pair_weight": ("float32", (8,)),
        "entity_set": ("int32", (8,)),
        "record": ("int32", (8,)),
        "truncated": ("bool", (8,)),
    }
    plain = read(last_step=1, with_pairs=False)[0]
    assert set(batch) - set(plain) == {"image2", "shared_ids", "pair_weight"}


def test_workers_and_threads_change_nothing(read):
    expected = read()
    # Seven batches over two workers: an uneven split must lose none.
    assert_same(read(workers=2), expected)
    assert_same(read(threads=0), expected)


def test_examples_that_lose_words_are_marked(read, source, tokenizer, monkeypatch):
    monkeypatch.setitem(SPEC, "text_length", 8)
    marked = 0
    for batch in read(last_step=3):
        for at, index in enumerate(batch["record"]):
            if index == BROKEN:
                assert not batch["truncated"][at]
                continue
            texts = texts_of(source[int(index)], ENTITIES, TEMPLATES)
            long = tokenizer.lengths([texts["caption"], texts["masked"]]).max() > 8
            # Every template here is shorter than the caption it is filled from.
            assert batch["truncated"][at] == long
            marked += long
    assert 0 < marked < 23


def test_processes_read_their_slots(read):
    mine, yours = read(slots=[0, 5, 2]), read(slots=[1, 3, 4, 6, 7])
    columns = np.argsort([0, 5, 2, 1, 3, 4, 6, 7])
    joined = [
        {name: np.concatenate([left[name], right[name]])[columns] for name in left}
        for left, right in zip(mine, yours, strict=True)
    ]
    assert_same(joined, read())


def test_resuming_gives_the_tail(read):
    assert_same(read(first_step=4), read()[4:])
    assert read(first_step=7) == []


def test_an_epoch_runs_on_where_the_batch_size_changes(read):
    """16 examples in batches of 8, then 7 in batches of one: each of the 23 records once."""
    start = read(last_step=2)
    rest = read(batch_size=1, first_step=2, last_step=9, first_position=16)
    seen = np.concatenate([batch["record"] for batch in start + rest])
    assert sorted(seen) == list(range(23))
    assert_same(rest[3:], read(batch_size=1, first_step=5, last_step=9, first_position=19))


def test_loader_can_be_read_again(source, tokenizer):
    loader = make_loader(
        source, ENTITIES, tokenizer, SPEC, batch_size=4, seed=0, first_step=0, last_step=3,
        with_pairs=False,
    )  # fmt: skip
    assert len(loader) == 3
    assert_same(list(loader), list(loader))


def test_every_record_once_an_epoch(read):
    records = np.concatenate([batch["record"] for batch in read()])
    for epoch in range(2):
        assert sorted(records[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_seed_and_epoch_change_the_images(read, source):
    def images(batches):
        records = np.concatenate([batch["record"] for batch in batches])
        pixels = np.concatenate([batch["image"] for batch in batches])
        return [pixels[at] for at in np.flatnonzero(records == 1)]

    first, second = images(read())[:2]
    other = images(read(seed=2))[0]
    assert (first != second).any()
    assert (first != other).any()


def test_texts_are_those_of_the_record(read, source, tokenizer):
    templates = set()
    for batch in read():
        for at, index in enumerate(batch["record"]):
            if index == BROKEN:
                continue
            ids = encode_record_texts(source[int(index)], ENTITIES, tokenizer, SPEC)
            np.testing.assert_array_equal(batch["caption_ids"][at], ids["caption_ids"])
            np.testing.assert_array_equal(batch["masked_ids"][at], ids["masked_ids"])
            matches = (ids["prompt_ids"] == batch["prompt_ids"][at]).all(1)
            assert matches.any()
            if matches.sum() == 1:
                templates.add(int(matches.argmax()))
            entities = ENTITIES.find(source[int(index)].caption)
            assert batch["entity_weight"][at] == bool(entities)
            assert batch["entity_set"][at] == entity_set_hash(entities)
    assert templates == {0, 1, 2}


def test_partner_shares_the_entity_and_is_another(source, tokenizer, tmp_path):
    """Cached features that hold the record number show who the partner is."""
    store = FeatureStore.create(tmp_path / "s", "k", {"image": ((23, 1, 1, 1), "float16")})
    store["image"][:, 0, 0, 0] = np.arange(23)
    settings = {"batch_size": 8, "seed": 1, "first_step": 0, "last_step": 12, "with_pairs": True}
    loader = make_loader(source, ENTITIES, tokenizer, SPEC, **settings, image_store=store.commit())
    pairs = 0
    for batch in loader:
        for at, index in enumerate(batch["record"]):
            mine = set(ENTITIES.find(source[int(index)].caption))
            assert batch["image_features"][at].item() == index
            if not batch["pair_weight"][at]:
                # No entity, or the only record with its one.
                assert index % 7 == 0 or index == 5
                continue
            partner = int(batch["image2_features"][at].item())
            theirs = set(ENTITIES.find(source[partner].caption))
            shared = batch["shared_ids"][at]
            names = {tokenizer.encode([f"a photo of {NAMES[e]}"], 12).tobytes(): e for e in mine}
            assert partner != index
            assert names[shared.tobytes()] in theirs & mine
            pairs += 1
    assert pairs > 50


def test_given_pair_index_is_used(read, source):
    index = PairIndex.build([ENTITIES.find(caption) for caption in source.captions()])
    assert_same(read(pairs=index), read())
    alone = read(pairs=PairIndex.build([[]] * 23))
    assert not any(batch["pair_weight"].any() for batch in alone)


def test_broken_image_keeps_its_slot(source, tokenizer, caplog):
    settings = {"batch_size": 8, "seed": 1, "first_step": 0, "last_step": 7, "with_pairs": True}
    loader = make_loader(source, ENTITIES, tokenizer, SPEC, **settings)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    assert dict(loader.failures) == {f"key-{BROKEN}": "not an image: 7 bytes"}
    assert len([line for line in caplog.messages if "key-3" in line]) == 1
    empty = tokenizer.encode([""], 12)[0]
    for batch in batches:
        broken = batch["record"] == BROKEN
        np.testing.assert_array_equal(batch["weight"], 1.0 - broken)
        for name in ("image", "image2", "entity_weight", "pair_weight", "entity_set"):
            assert not batch[name][broken].any(), name
        for name in ("caption_ids", "masked_ids", "prompt_ids", "shared_ids"):
            assert (batch[name][broken] == empty).all(), name
        # Where the broken record was drawn as a partner, only the pair weighs nothing.
        lost = (batch["pair_weight"] == 0) & ~broken
        assert not batch["image2"][lost].any()


class _Flaky(MemorySource):
    def __getitem__(self, index):
        if index == 4:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_record_that_cannot_be_read_keeps_its_slot(source, tokenizer):
    flaky = _Flaky([source[index] for index in range(6)] + [Record(source[1].image, "\udc80", "u")])
    settings = {"batch_size": 7, "seed": 0, "first_step": 0, "last_step": 1, "with_pairs": False}
    loader = make_loader(flaky, ENTITIES, tokenizer, SPEC, **settings)
    (batch,) = loader
    lost = batch["record"][batch["weight"] == 0]
    assert sorted(lost) == [BROKEN, 4, 6]
    assert "the disk is gone" in loader.failures["#4"]
    assert "Unicode" in loader.failures["u"]


@pytest.fixture
def stores(source, tmp_path):
    """Features that say what they are made of: the record, the view, the template."""
    count, length, width = len(source), 4, 2
    images = FeatureStore.create(
        tmp_path / "images",
        "k",
        {"image": ((count, 3, 5, width), "float16"), "valid": ((count,), "int32")},
    )
    images["image"][:] = (np.arange(count)[:, None] * 10 + np.arange(3))[..., None, None]
    images["valid"][:] = np.arange(count) != BROKEN
    texts = FeatureStore.create(
        tmp_path / "texts",
        "k",
        {
            "caption_pooled": ((count, width), "float16"),
            "masked_tokens": ((count, length, width), "float16"),
            "masked_mask": ((count, length), "bool"),
            "prompt_pooled": ((count, len(TEMPLATES), width), "float16"),
            "shared_pooled": ((len(NAMES), width), "float16"),
        },
    )
    texts["caption_pooled"][:] = np.arange(count)[:, None]
    texts["masked_mask"][:, :2] = True
    texts["prompt_pooled"][:] = np.arange(len(TEMPLATES))[None, :, None]
    texts["shared_pooled"][:] = np.arange(len(NAMES))[:, None] + 1
    return {"image_store": images.commit(), "text_store": texts.commit()}


def test_cached_features_take_the_place_of_images_and_ids(read, stores):
    batch = read(last_step=1, **stores)[0]
    assert {name: array.shape[1:] for name, array in batch.items() if array.ndim > 1} == {
        "image_features": (5, 2),
        "image2_features": (5, 2),
        "caption_pooled": (2,),
        "masked_tokens": (4, 2),
        "masked_mask": (4,),
        "prompt_pooled": (2,),
        "shared_pooled": (2,),
    }
    assert type(batch["image_features"]) is np.ndarray
    good = batch["weight"] > 0
    np.testing.assert_array_equal(batch["caption_pooled"][good, 0], batch["record"][good])
    np.testing.assert_array_equal(batch["image_features"][good, 0, 0] // 10, batch["record"][good])
    assert batch["masked_mask"].any(1).all(), "attention over no token at all would be 0/0"


def test_cached_and_fresh_texts_use_the_same_template_and_partner(read, stores, tokenizer, source):
    for fresh, cached in zip(read(), read(**stores), strict=True):
        for name in ("record", "weight", "entity_weight", "pair_weight", "entity_set"):
            np.testing.assert_array_equal(fresh[name], cached[name], err_msg=name)
        for at, index in enumerate(fresh["record"]):
            if index == BROKEN:
                continue
            template = TEMPLATES[int(cached["prompt_pooled"][at, 0])]
            (text,) = texts_of(source[int(index)], ENTITIES, [template])["prompts"]
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
    settings = {"batch_size": 8, "seed": 1, "first_step": 0, "last_step": 3, "with_pairs": True}
    loader = make_loader(blind, ENTITIES, None, {"templates": TEMPLATES}, **settings, **stores)
    assert len(list(loader)) == 3
    assert set(loader.failures) <= {f"key-{BROKEN}"}


def test_store_of_another_data_set_is_a_user_error(source, stores):
    settings = {"batch_size": 8, "seed": 1, "first_step": 0, "last_step": 3, "with_pairs": True}
    with pytest.raises(UserError, match="prompt_pooled has 3 templates, the data set has 25"):
        make_loader(source, ENTITIES, None, {}, **settings, **stores)
    shorter = MemorySource([source[0]])
    with pytest.raises(UserError, match="image has 23 records, the data set has 1"):
        make_loader(shorter, ENTITIES, None, {"templates": TEMPLATES}, **settings, **stores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": [8]}, "slots"),
        ({"slots": []}, "slots"),
        ({"last_step": -1}, "last_step"),
        ({"source": MemorySource([])}, "no records"),
        ({"tokenizer": None}, "need a tokenizer"),
        ({"spec": {"text_length": 8}}, "lack 'transform'"),
    ],
)
def test_settings_that_do_not_fit_are_user_errors(source, tokenizer, changes, message):
    settings = {
        "source": source,
        "entity_set": ENTITIES,
        "tokenizer": tokenizer,
        "spec": SPEC,
        "batch_size": 8,
        "seed": 0,
        "first_step": 0,
        "last_step": 1,
        "with_pairs": False,
    }
    with pytest.raises(UserError, match=message):
        make_loader(**{**settings, **changes})


def test_entity_set_hash_is_stable():
    assert entity_set_hash(()) == 0
    assert entity_set_hash((2, 1)) == entity_set_hash((1, 2)) == 894637353
    hashes = {entity_set_hash((one, other)) for one in range(40) for other in range(one)}
    assert len(hashes) == 40 * 39 // 2
    assert all(-(2**31) <= value < 2**31 for value in hashes)


def test_scenes_go_through_the_same_path_as_files(tokenizer, tmp_path):
    entities = EntitySet(scene_entity_table())
    scenes = ScenesSource("train", 12, 0, 32, entities)
    write_records(scenes, tmp_path / "scenes", entity_names=entities.table)
    settings = {"batch_size": 6, "seed": 0, "first_step": 0, "last_step": 4, "with_pairs": True}
    direct = list(make_loader(scenes, entities, tokenizer, SPEC, **settings))
    stored = ArrayRecordSource(tmp_path / "scenes")
    assert_same(list(make_loader(stored, entities, tokenizer, SPEC, **settings)), direct)
    assert all(batch["weight"].all() for batch in direct)
    assert any(batch["pair_weight"].any() for batch in direct)


@pytest.mark.parametrize("masking", ["single_entity", "all_nouns", "mlm"])
def test_masking_objectives_in_batches(source, tokenizer, masking):
    settings = {"batch_size": 8, "seed": 1, "first_step": 0, "last_step": 3, "with_pairs": False}
    spec = {**SPEC, "masking": masking}
    batches = list(make_loader(source, ENTITIES, tokenizer, spec, **settings))
    default = list(make_loader(source, ENTITIES, tokenizer, SPEC, **settings))
    mask, several = tokenizer.mask_id, 0
    for batch, plain in zip(batches, default, strict=True):
        np.testing.assert_array_equal(batch["image"], plain["image"])
        np.testing.assert_array_equal(batch["caption_ids"], plain["caption_ids"])
        for row, other in zip(batch["masked_ids"], plain["masked_ids"], strict=True):
            hidden, all_hidden = (row == mask).sum(), (other == mask).sum()
            if masking == "single_entity":
                assert (hidden > 0) == (all_hidden > 0) and hidden <= all_hidden
                several += hidden < all_hidden
            else:
                assert hidden >= all_hidden
                several += hidden > all_hidden
        if masking != "mlm":
            continue
        targets = batch["masked_targets"]
        np.testing.assert_array_equal(targets >= 0, batch["masked_ids"] == mask)
        for at in np.argwhere(targets >= 0):
            # Nothing but the entities is masked, so the token that was there is the entity's name.
            assert NAMES[targets[tuple(at)]] == WORDS[batch["caption_ids"][tuple(at)]]
    assert several or masking == "mlm"
