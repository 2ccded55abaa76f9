"""Masked captions, prompts and templates."""

import json
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg_jax.data import words
from ovseg_jax.data.captions import (
    NO_TARGET,
    Masking,
    distinct_captions,
    distinct_prompts,
    mask_entities,
    masked_texts,
    noun_sentences,
    prompt,
    shared_prompt,
    token_targets,
)
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.records import ClassCaptions
from ovseg_jax.data.tokenizer import CLIP_TEMPLATES as CLIP
from ovseg_jax.data.tokenizer import TRAINING_TEMPLATES as TRAINING
from ovseg_jax.data.tokenizer import expand_templates, fill
from ovseg_jax.data.words import BundledNouns, caption_nouns
from ovseg_jax.errors import UserError

ENTITIES = EntitySet({"dog": ["puppy"], "fire hydrant": [], "fire": [], "mask": [], "bus": []})


def test_mask_keeps_everything_else():
    caption = 'Two puppies, a "dog"; the dog\'s fire hydrant & a mask!'
    expected = 'Two [MASK], a "[MASK]"; the [MASK]\'s [MASK] & a [MASK]!'
    assert mask_entities(caption, ENTITIES) == expected
    assert mask_entities("no entity", ENTITIES) == "no entity"


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
    assert prompt(["dog", "bus"], "a photo of a {}.") == "a photo of a dog and bus."
    assert prompt([], "a photo of a {}.") == ""
    assert shared_prompt("dog") == "a photo of dog"


def test_templates_are_many_different_and_fillable():
    assert len(set(TRAINING)) == len(TRAINING) >= 20
    assert len(set(CLIP)) == len(CLIP) == 80
    assert set(TRAINING) <= set(CLIP)
    assert all("dog" in fill(template, ["dog"]) for template in CLIP)
    with pytest.raises(UserError, match="needs {} once"):
        fill("a photo", ["dog"])
    assert expand_templates(()) == TRAINING
    assert expand_templates(["clip"]) == CLIP
    assert expand_templates(["{} here", "clip", "a photo of a {}."]) == ("{} here", *CLIP)
    with pytest.raises(UserError, match="once, where the names go; did you mean 'clip'"):
        expand_templates(["clipp"])
    text = resources.files("ovseg_jax.data").joinpath("clip_templates.json").read_text()
    notice = " ".join(json.loads(text)["license"])
    assert "Copyright (c) 2021 OpenAI" in notice and "Permission is hereby granted" in notice


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
        names = [ENTITIES.names[identity] for identity in ENTITIES.find(caption)]
        assert [sentences[i] for i in row] == [prompt(names, template) for template in TRAINING]


# ---- what each objective masks

MASKABLE = EntitySet({"dog": ["puppy"], "cat": [], "glass": [], "glasses": ["spectacles"]})
TEMPLATE = "a photo of a {}."
CAPTION = "Two dogs and a cat, a puppy near the window."


@pytest.fixture(autouse=True)
def bundled_nouns(monkeypatch):
    """Whatever is installed."""
    monkeypatch.setattr(words, "_finder", BundledNouns)


def masked(masking, caption=CAPTION, seed=0):
    rng = np.random.default_rng(seed)
    return masked_texts(caption, MASKABLE, TEMPLATE, masking, rng)


def test_all_entities():
    found = masked(Masking.ALL_ENTITIES)
    assert found.masked == "Two [MASK] and a [MASK], a [MASK] near the window."
    assert (found.prompt, found.answer) == ("a photo of a dog and cat.", (0, 1))
    assert found.mentions is None


def test_a_single_entity_with_all_its_mentions():
    seen = {masked(Masking.SINGLE_ENTITY, seed=seed) for seed in range(30)}
    assert {(one.masked, one.prompt, one.answer) for one in seen} == {
        ("Two [MASK] and a cat, a [MASK] near the window.", "a photo of a dog.", (0,)),
        ("Two dogs and a [MASK], a puppy near the window.", "a photo of a cat.", (1,)),
    }


def test_all_nouns_whether_entities_or_not():
    found = masked(Masking.ALL_NOUNS)
    assert found.masked == "Two [MASK] and a [MASK], a [MASK] near the [MASK]."
    assert found.prompt == "a photo of a dog and cat and puppy and window."
    assert found.answer == ("dog", "cat", "puppy", "window")


@pytest.mark.parametrize("masking", list(Masking))
def test_captions_without_entities_or_nouns(masking):
    found = masked(masking, "and so on")
    assert (found.masked, found.prompt, found.answer) == ("and so on", "", ())


@pytest.mark.parametrize("masking", [Masking.MLM, Masking.MLM_GROUPS])
def test_mentions_in_their_order(masking):
    assert masked(masking).mentions == (0, 1, 0)
    assert masked(masking, "and so on").mentions == ()
    # The literal token cannot be told from ours.
    assert masked(masking, "a [MASK] and a dog").mentions is None


def test_targets_stand_at_the_mask_tokens():
    ids = np.array([1, 9, 5, 9, 6, 9, 2, 0], np.int32)
    assert token_targets(ids, 9, (4, 0, 4)).tolist() == [-1, 4, -1, 0, -1, 4, -1, -1]
    cut = np.array([1, 9, 5, 9, 2], np.int32)
    assert token_targets(cut, 9, (4, 0, 4)).tolist() == [-1, 4, -1, 0, -1]
    for mentions in (None, (4,)):
        assert (token_targets(ids, 9, mentions) == NO_TARGET).all()


# ---- sentences of single nouns

SOFA_CAPTION = "A dog and two cats sit on the sofa, a dog sleeps near the window."
NOUN_TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


def test_nouns_are_drawn_without_repetition_and_each_in_a_template():
    found = caption_nouns(SOFA_CAPTION)
    assert found == ["dog", "cat", "sofa", "window"] and caption_nouns("") == []
    seen = set()
    for seed in range(60):
        rngs = (np.random.default_rng(seed) for _ in range(2))
        sentences, again = (noun_sentences(SOFA_CAPTION, 3, NOUN_TEMPLATES, rng) for rng in rngs)
        nouns = [s.rstrip(".").split()[-1] for s in sentences]
        assert len(sentences) == 3 == len(set(nouns)) and sentences == again
        seen |= set(sentences)
    assert seen == {template.replace("{}", noun) for template in NOUN_TEMPLATES for noun in found}
