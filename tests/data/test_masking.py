"""What each objective masks in a caption, and the targets of the masked tokens."""

import numpy as np
import pytest

from ovseg_jax.data.captions import texts_of
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.masking import NO_TARGET, Masking, masked_texts, token_targets
from ovseg_jax.data.nouns import BundledNouns

ENTITIES = EntitySet({"dog": ["puppy"], "cat": [], "glass": [], "glasses": ["spectacles"]})
TEMPLATE = "a photo of a {}."
CAPTION = "Two dogs and a cat, a puppy near the window."


def masked(masking, caption=CAPTION, seed=0):
    rng = np.random.default_rng(seed)
    return masked_texts(caption, ENTITIES, TEMPLATE, masking, rng, BundledNouns())


def test_all_entities_as_everywhere_else():
    found, plain = masked(Masking.ALL_ENTITIES), texts_of(CAPTION, ENTITIES, [TEMPLATE])
    assert found.masked == plain["masked"] == "Two [MASK] and a [MASK], a [MASK] near the window."
    assert [found.prompt] == plain["prompts"] and found.answer == plain["entities"] == (0, 1)
    assert found.mentions is None


def test_a_single_entity_with_all_its_mentions():
    seen = {masked(Masking.SINGLE_ENTITY, seed=seed) for seed in range(30)}
    assert {(one.masked, one.prompt, one.answer) for one in seen} == {
        ("Two [MASK] and a cat, a [MASK] near the window.", "a photo of a dog.", (0,)),
        ("Two dogs and a [MASK], a puppy near the window.", "a photo of a cat.", (1,)),
    }


def test_a_single_entity_leaves_forms_of_others():
    """'glasses' is a plural of 'glass' only where no other entity lists it."""
    caption = "a glass beside glasses"
    found = {masked(Masking.SINGLE_ENTITY, caption, seed).masked for seed in range(20)}
    assert found == {"a [MASK] beside glasses", "a glass beside [MASK]"}


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


def test_what_each_needs():
    completes = {one for one in Masking if one.completes}
    assert completes == {Masking.ALL_ENTITIES, Masking.SINGLE_ENTITY, Masking.ALL_NOUNS}
    assert {one for one in Masking if one.classifies} == {Masking.MLM, Masking.MLM_GROUPS}
    assert {one for one in Masking if one.needs_decoder} == completes | {Masking.MLM_GROUPS}
