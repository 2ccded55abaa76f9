"""Images with several captions, and photographs of named classes: each epoch draws a caption."""

import numpy as np
import pytest
from memory_source import MemorySource
from small_set import ENTITIES, NAMES, SPEC, TEMPLATES, make_source, read_batches, text_ids

from ovseg_jax.data.examples import MOST_NAMES, caption_set
from ovseg_jax.data.records import ClassCaptions, Record
from ovseg_jax.data.sources import Mixture

CLASS = ClassCaptions(("bus", "tree"), ("a photo of a {}", "{}"))
PLAIN = 2  # the record with a single caption
COUNT, STEPS = 9, 36


def captions_of(index):
    if index == PLAIN:
        return ("a photo of a dog",)
    if index >= 6:
        return CLASS
    return tuple(f"a {NAMES[(index + k) % 4]} and a {NAMES[(index + 2 * k) % 4]}" for k in range(3))


@pytest.fixture(scope="module")
def source():
    images = [make_source()[0].image] * COUNT
    return MemorySource([Record(x, captions_of(i), f"k{i}") for i, x in enumerate(images)])


def drawn_in(source, tokenizer, steps):
    """(record, number of the caption, caption, example) of each example."""
    for batch in read_batches(source, tokenizer, batch_size=6, last_step=steps, threads=0):
        for at, index in enumerate(map(int, batch["record"])):
            captions = list(source[index].captions)
            ids = tokenizer.encode(captions, SPEC["text_length"])
            number = int((ids == batch["caption_ids"][at]).all(1).argmax())
            np.testing.assert_array_equal(ids[number], batch["caption_ids"][at])
            yield index, number, captions[number], {name: x[at] for name, x in batch.items()}


def test_every_caption_is_drawn_and_the_rest_follows_it(source, tokenizer):
    seen, partners = {}, 0
    for index, number, caption, example in drawn_in(source, tokenizer, STEPS):
        seen.setdefault(index, []).append(number)
        masked, prompts = text_ids(caption, tokenizer)
        np.testing.assert_array_equal(example["masked_ids"], masked)
        assert (prompts == example["prompt_ids"]).all(1).any()
        hashes = caption_set(source[index].captions, number)
        np.testing.assert_array_equal(example["caption_set"], hashes)
        if example["pair_weight"]:
            shared = [f"a photo of {NAMES[entity]}" for entity in ENTITIES.find(caption)]
            known = tokenizer.encode(shared, SPEC["text_length"])
            assert (known == example["shared_ids"]).all(1).any()
            partners += 1
    epochs = STEPS * 6 // COUNT
    for index in range(COUNT):
        assert len(seen[index]) == epochs
        assert set(seen[index]) == set(range(len(captions_of(index))))
    assert partners > 0.9 * STEPS * 6


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


def test_mixture_of_captions_and_class_names(source, tokenizer):
    photographs = MemorySource([source[index] for index in range(6, COUNT)], "photographs")
    captions = MemorySource([source[index] for index in range(6)], "captions")
    mixture = Mixture([captions, photographs], [1, 1])
    found = list(drawn_in(mixture, tokenizer, 6))
    assert sum(index >= 6 for index, *_ in found) == 18
    assert all(example["weight"] for *_, example in found)
    prompts = {example["prompt_ids"].tobytes() for *_, example in found}
    assert len(prompts) > len(TEMPLATES)
