"""The fast filter finds exactly what the entity set finds, in any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg_jax.data import caption_filter
from ovseg_jax.data.caption_filter import CaptionFilter
from ovseg_jax.data.entities import EntitySet

TABLE = {
    "dog": ["dog", "puppy"],
    "fire": [],
    "fire hydrant": [],
    "can": [],
    "t-shirt": ["tee shirt"],
    "not": [],
    "wan": [],
    "s": [],
    "mask": [],
    "glass of water": [],
}
SET = EntitySet(TABLE)
# Without words that the tokenizer cuts off others, most captions are settled at a glance.
GLANCE_SET = EntitySet({"dog": [], "t-shirt": [], "fire hydrant": [], "glass of water": []})
BOTH = [(CaptionFilter(SET), SET), (CaptionFilter(GLANCE_SET), GLANCE_SET)]


def assert_read_alike(text):
    for fast, exact in BOTH:
        assert fast.find(text) == exact.find(text)


def test_both_ways_are_tried():
    assert [fast._runs is None for fast, _ in BOTH] == [True, False]


# Everything that a rule of the tokenizer looks at, and words that the rules cut.
PARTS = st.sampled_from(
    "dog Dogs puppies fire hydrants can not cannot wanna gonna gimme more'n d'ye 't is tis 'tis "
    "'twas T-shirt tee shirts glass of water don't dog's dogs' o'clock s mask [MASK] x 5 "
    "5,000 e.g. \u00e9t\u00e9 \U0001f415 \u72ac \u2026 \u2013 \u2019 \u201c \u201d \u00ab \u2018 "
    "\u201a \u2032".split()
    + list(" \t\n\u00a0\u2003\x1c,.;:!?()[]{}<>\"'`-_/*&@#$%+=|~^\\")
    + [
        "--",
        "...",
        "''",
        "``",
        "n't",
        "N\u2019T ",
        "_",
        ". ",
        ", ",
        " 's ",
        "' ",
        " '",
        ".)",
        "). ",
        "fire. hydrant",
    ]
)


@settings(max_examples=1500)
@given(st.lists(PARTS, max_size=14).map("".join))
def test_any_mixture_of_signs_is_read_alike(text):
    assert_read_alike(text)


ENDS = st.sampled_from(
    [".", ". )", ".)>", "..", "'s.", "'s. ]", "n't.", " wanna.", "\u2019s.", "'.", ".'", ". )."]
)


@settings(max_examples=600)
@given(st.lists(PARTS, max_size=3).map("".join), ENDS)
def test_any_end_is_read_alike(text, end):
    assert_read_alike(text + end)
    assert_read_alike(text + " dog" + end)
    assert_read_alike(text + " fire" + end)


@settings(max_examples=300)
@given(st.lists(PARTS, max_size=12).map(" ".join))
def test_any_mixture_of_words_is_read_alike(text):
    assert_read_alike(text)


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_any_text_is_read_alike(text):
    assert_read_alike(text)


def test_the_fast_way_is_taken(monkeypatch):
    captions = [
        "A dog's bowl, (near) the fire hydrants.",
        'the "puppy" don\u2019t',
        "no such thing",
    ]
    expected = [SET.find(caption) for caption in captions]
    fast = CaptionFilter(SET)
    monkeypatch.setattr(SET, "find", None)
    assert [fast.find(caption) for caption in captions] == expected
    assert [len(found) for found in expected] == [3, 1, 0]


@pytest.mark.parametrize("most", [1, 3])
def test_forgetting_changes_nothing(monkeypatch, most):
    monkeypatch.setattr(caption_filter, "_MOST_PIECES", most)
    fast = CaptionFilter(SET)
    text = "a dog and a fire hydrant and a dog and two glasses of water, a glass of water"
    for _ in range(3):
        assert fast.find(text) == SET.find(text) == (0, 2, 9)
    assert len(fast._words) <= most


def test_forms_of_signs_are_found_too():
    entities = EntitySet({"smile": [":)"], "dog": ["dog )"]})
    fast = CaptionFilter(entities)
    for text in ["a :) here", "dog. )", "dog )", "(: dog :)."]:
        assert fast.find(text) == entities.find(text)


def test_the_published_list_is_the_published_one():
    entities = EntitySet.published()
    assert len(entities) == 73
    assert sum(len(forms) for forms in entities.table.values()) == 100
    assert entities.table["house"] == ["house", "building", "hotel"]
    assert entities.names[0] == "people"
    found = CaptionFilter(entities).find("Two women in T-shirts on motorbikes by the desks")
    assert [entities.names[i] for i in found] == ["people", "motorcycle", "table", "shirt"]
