"""Batches: the same however they are read, and complete however bad the data."""

import logging

import numpy as np
import pytest
from memory_source import MemorySource
from small_set import BROKEN, ENTITIES, NAMES, SPEC, WORDS, assert_same, joined, load, text_ids

from ovseg_jax.data.captions import mask_entities
from ovseg_jax.data.examples import MOST_NAMES, caption_set, entity_set_hash
from ovseg_jax.data.records import ClassCaptions, Record
from ovseg_jax.data.sources import Mixture
from ovseg_jax.data.words import caption_nouns
from ovseg_jax.errors import UserError


def test_shapes_and_types(read):
    batch = read(last_step=1)[0]
    kinds = dict.fromkeys(("image", "image2"), ("uint8", (8, 16, 16, 3)))
    ids = ("caption_ids", "masked_ids", "prompt_ids", "shared_ids")
    kinds |= dict.fromkeys(ids, ("int32", (8, 12)))
    kinds |= dict.fromkeys(("weight", "entity_weight", "pair_weight"), ("float32", (8,)))
    kinds |= dict.fromkeys(("entity_set", "record", "data_set"), ("int32", (8,)))
    kinds |= {"caption_set": ("int32", (8, 4)), "truncated": ("bool", (8,))}
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == kinds
    plain = read(last_step=1, with_pairs=False)[0]
    assert set(batch) - set(plain) == {"image2", "shared_ids", "pair_weight"}


def test_workers_and_threads_change_nothing(read):
    expected = read()
    # Seven batches over two workers: an uneven split must lose none.
    assert_same(read(workers=2), expected)
    assert_same(read(threads=0), expected)
    records = np.concatenate([batch["record"] for batch in expected])
    for epoch in range(2):
        assert sorted(records[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_examples_that_lose_words_are_marked(read, source, tokenizer, monkeypatch):
    monkeypatch.setitem(SPEC, "text_length", 8)
    marked = 0
    for batch in read(last_step=3):
        for at, index in enumerate(batch["record"]):
            if index == BROKEN:
                assert not batch["truncated"][at]
                continue
            (caption,) = source[int(index)].captions
            long = tokenizer.lengths([caption, mask_entities(caption, ENTITIES)]).max() > 8
            # Every template here is shorter than the caption it is filled from.
            assert batch["truncated"][at] == long
            marked += long
    assert 0 < marked < 23


def test_processes_read_their_slots(read):
    slots = [[0, 5, 2], [1, 3, 4, 6, 7]]
    assert_same(joined([read(slots=some) for some in slots], slots), read())


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


def test_broken_image_keeps_its_slot(source, tokenizer, caplog):
    loader = load(source, tokenizer)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    assert dict(loader.failures) == {f"key-{BROKEN}": "not an image: 7 bytes"}
    assert len([line for line in caplog.messages if "key-3" in line]) == 1
    empty = tokenizer.encode([""], 12)[0]
    for batch in batches:
        broken = batch["record"] == BROKEN
        np.testing.assert_array_equal(batch["weight"], 1.0 - broken)
        weights = ("entity_weight", "pair_weight")
        for name in ("image", "image2", *weights, "entity_set", "caption_set"):
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
    no_text = Record(source[1].image, ("\udc80",), "u")
    flaky = _Flaky([source[index] for index in range(6)] + [no_text])
    loader = load(flaky, tokenizer, batch_size=7, last_step=1)
    (batch,) = loader
    lost = batch["record"][batch["weight"] == 0]
    assert sorted(lost) == [BROKEN, 4, 6]
    assert "the disk is gone" in loader.failures["#4"]
    assert "Unicode" in loader.failures["u"]


def test_a_set_without_records_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match="no records"):
        load(MemorySource([]), tokenizer)


def test_entity_set_hash_is_stable():
    assert entity_set_hash(()) == 0
    assert entity_set_hash((2, 1)) == entity_set_hash((1, 2)) == 894637353
    hashes = {entity_set_hash((one, other)) for one in range(40) for other in range(one)}
    assert len(hashes) == 40 * 39 // 2
    assert all(-(2**31) <= value < 2**31 for value in hashes)


@pytest.mark.parametrize("masking", ["single_entity", "all_nouns", "mlm"])
def test_masking_objectives_in_batches(read, tokenizer, masking):
    batches = read(spec={**SPEC, "masking": masking}, last_step=3)
    default = read(last_step=3)
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


def test_examples_hold_nouns_or_say_that_they_are_absent(read, source, tokenizer):
    spec = {**SPEC, "templates": ("a {}",), "nouns": 4}
    (batch,) = read(spec=spec, batch_size=23, last_step=1)
    columns = (batch["record"], batch["noun_ids"], batch["noun_present"])
    for index, ids, present in zip(*columns, strict=True):
        nouns = [] if index == BROKEN else caption_nouns(source[int(index)].captions[0])
        expected = [f"a {noun}" for noun in nouns] + [""] * (4 - len(nouns))
        assert present.tolist() == [True] * len(nouns) + [False] * (4 - len(nouns))
        assert sorted(map(tuple, ids)) == sorted(map(tuple, tokenizer.encode(expected, 12)))
    assert batch["noun_present"].any()


# ---- several captions, and photographs of named classes: each epoch draws a caption

CLASS = ClassCaptions(("bus", "tree"), ("a photo of a {}", "{}"))
SINGLE = {2: "a photo of a dog", 4: "a sky"}  # the records with a single caption
COUNT, STEPS = 9, 36


def captions_of(index):
    if index in SINGLE:
        return (SINGLE[index],)
    if index >= 6:
        return CLASS
    return tuple(f"a {NAMES[(index + k) % 4]} and a {NAMES[(index + 2 * k) % 4]}" for k in range(3))


@pytest.fixture(scope="module")
def several(source):
    images = [source[0].image] * COUNT
    return MemorySource([Record(x, captions_of(i), f"k{i}") for i, x in enumerate(images)])


def drawn_in(source, tokenizer, steps):
    """(record, number of the caption, caption, example) of each example."""
    for batch in load(source, tokenizer, batch_size=6, last_step=steps, threads=0):
        for at, index in enumerate(map(int, batch["record"])):
            captions = list(source[index].captions)
            ids = tokenizer.encode(captions, SPEC["text_length"])
            number = int((ids == batch["caption_ids"][at]).all(1).argmax())
            np.testing.assert_array_equal(ids[number], batch["caption_ids"][at])
            yield index, number, captions[number], {name: x[at] for name, x in batch.items()}


def test_every_caption_is_drawn_and_the_rest_follows_it(several, tokenizer):
    seen, templates, named, partners = {}, set(), 0, 0
    for index, number, caption, example in drawn_in(several, tokenizer, STEPS):
        seen.setdefault(index, []).append(number)
        masked, prompts = text_ids(caption, tokenizer)
        np.testing.assert_array_equal(example["masked_ids"], masked)
        matches = (prompts == example["prompt_ids"]).all(1)
        assert matches.any()
        if matches.sum() == 1:
            templates.add(int(matches.argmax()))
        entities = ENTITIES.find(caption)
        named += bool(entities)
        assert example["entity_weight"] == bool(entities)
        assert example["entity_set"] == entity_set_hash(entities)
        hashes = caption_set(several[index].captions, number)
        np.testing.assert_array_equal(example["caption_set"], hashes)
        if example["pair_weight"]:
            shared = [f"a photo of {NAMES[entity]}" for entity in entities]
            known = tokenizer.encode(shared, SPEC["text_length"])
            assert (known == example["shared_ids"]).all(1).any()
            partners += 1
    epochs = STEPS * 6 // COUNT
    for index in range(COUNT):
        assert len(seen[index]) == epochs
        assert set(seen[index]) == set(range(len(captions_of(index))))
    assert STEPS * 6 > named >= partners > 0.9 * named and templates == {0, 1, 2}


def test_photographs_of_a_class_are_alike_whatever_was_drawn():
    sets = [caption_set(CLASS, number) for number in range(4)]
    assert all(x.shape == (MOST_NAMES,) and x.dtype == np.int32 for x in sets)
    assert all(set(x) == set(sets[0]) for x in sets)
    # The drawn name comes first; templates are no part of it.
    assert sets[0][0] == sets[1][0] != sets[2][0] == sets[3][0]
    (plain,) = {tuple(caption_set(("a dog", "x"), 0)), tuple(caption_set(("a dog",), 0))}
    assert len(set(plain)) == 1 and plain != tuple(caption_set(("a dog", "x"), 1))
    # A class that shares a name with this one.
    other = caption_set(ClassCaptions(("tree",), ("{}",)), 0)
    assert other[0] in sets[0] and other[0] == sets[2][0]


def test_mixture_of_captions_and_class_names(several, tokenizer):
    photographs = MemorySource([several[index] for index in range(6, COUNT)], "photographs")
    captions = MemorySource([several[index] for index in range(6)], "captions")
    mixture = Mixture([captions, photographs], [1, 1])
    found = list(drawn_in(mixture, tokenizer, 6))
    assert sum(index >= 6 for index, *_ in found) == 18
    assert all(example["weight"] for *_, example in found)
    prompts = {example["prompt_ids"].tobytes() for *_, example in found}
    assert len(prompts) > len(SPEC["templates"])
