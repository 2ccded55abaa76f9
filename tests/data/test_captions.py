"""Masked captions, prompts and templates."""

import json
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg_jax.data.captions import (
    distinct_captions,
    distinct_prompts,
    mask_entities,
    prompt,
    shared_prompt,
    texts_of,
)
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.records import ClassCaptions
from ovseg_jax.data.templates import CLIP, TRAINING, chosen, fill, join_entities
from ovseg_jax.errors import UserError

ENTITIES = EntitySet({"dog": ["puppy"], "fire hydrant": [], "fire": [], "mask": [], "bus": []})


def test_mask_keeps_everything_else():
    caption = 'Two puppies, a "dog"; the dog\'s fire hydrant & a mask!'
    expected = 'Two [MASK], a "[MASK]"; the [MASK]\'s [MASK] & a [MASK]!'
    assert mask_entities(caption, ENTITIES) == expected
    assert mask_entities("no entity", ENTITIES) == "no entity"
    assert mask_entities("a dog", ENTITIES, mask_token="thing") == "a thing"


def test_own_mask_token_must_not_be_an_entity():
    with pytest.raises(UserError, match="names an entity"):
        mask_entities("a dog", ENTITIES, mask_token="mask")


PIECES = st.sampled_from(
    [*"  ,.-'\"", "dog", "dogs", "fire", "hydrant", "bus", "mask", "[MASK]", "the", "can", "not"]
)


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join)))
def test_masking_leaves_no_mention_and_touches_nothing_else(caption):
    masked = mask_entities(caption, ENTITIES)
    assert ENTITIES.find(masked) == ()
    # Everything that stayed is found in the caption, in order.
    at = 0
    for part in masked.split("[MASK]"):
        at = caption.find(part, at)
        assert at >= 0
        at += len(part)


def test_prompt_of_several_entities():
    assert join_entities(["a", "b", "c"]) == "a and b and c"
    assert prompt(["dog", "bus"], "a photo of a {}.") == "a photo of a dog and bus."
    assert prompt([], "a photo of a {}.") == ""
    assert shared_prompt("dog") == "a photo of dog"


def test_templates_are_many_different_and_fillable():
    assert len(set(TRAINING)) == len(TRAINING) >= 20
    assert len(set(CLIP)) == len(CLIP) == 80
    assert set(TRAINING) <= set(CLIP)
    assert all("dog" in fill(template, ["dog"]) for template in CLIP)
    with pytest.raises(UserError, match="must have {} once"):
        fill("a photo", ["dog"])


def test_templates_of_a_config():
    assert chosen(()) == TRAINING
    assert chosen(["clip"]) == CLIP
    assert chosen(["{} here", "clip", "a photo of a {}."]) == ("{} here", *CLIP)
    with pytest.raises(UserError, match="once, where the names go; did you mean 'clip'"):
        chosen(["clipp"])


def test_the_list_of_clip_keeps_its_license():
    text = resources.files("ovseg_jax.data").joinpath("clip_templates.json").read_text()
    notice = " ".join(json.loads(text)["license"])
    assert "Copyright (c) 2021 OpenAI" in notice and "Permission is hereby granted" in notice


def test_texts_of_a_caption():
    texts = texts_of("a bus and two puppies", ENTITIES, ["{}", "a {}."])
    assert texts == {
        "caption": "a bus and two puppies",
        "masked": "a [MASK] and two [MASK]",
        "prompts": ["dog and bus", "a dog and bus."],
        "entities": (0, 4),
    }


def test_distinct_captions_are_those_of_each_record():
    records = [("a dog", "a cat"), ClassCaptions(("cat",), ("a {}", "the {}")), ("a dog",)]
    captions, starts, rows = distinct_captions([*records, records[1]])
    assert captions == ["a dog", "a cat", "the cat"] and starts.tolist() == [0, 2, 4, 5, 7]
    assert rows.tolist() == [0, 1, 1, 2, 0, 1, 2]


def test_distinct_prompts_are_those_of_each_caption():
    captions = ["a dog", "the puppy", "a bus", "nothing", "dog and bus"]
    sentences, table = distinct_prompts(captions, ENTITIES, TRAINING)
    assert len(set(sentences)) == len(sentences) == 3 * len(TRAINING) + 1
    for caption, row in zip(captions, table, strict=True):
        assert [sentences[i] for i in row] == texts_of(caption, ENTITIES, TRAINING)["prompts"]
