"""Finding entities in captions, plurals, and building an entity set from captions."""

import json

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg_jax.data.entities import EntitySet, joined_tables, with_names
from ovseg_jax.data.words import (
    BundledNouns,
    NounCounts,
    WordNetNouns,
    choose_entities,
    noun_finder,
    plurals,
    singular,
    word_spans,
    words,
)
from ovseg_jax.errors import UserError

ENTITIES = EntitySet(
    {
        "dog": ["dog", "puppy"],
        "person": ["person", "man", "woman"],
        "fire hydrant": ["fire hydrant"],
        "fire": ["fire"],
        "t-shirt": ["t-shirt", "tee shirt"],
        "bus": ["bus"],
        "mouse": ["mouse"],
        "glass": ["glass"],
        "eyeglasses": ["glasses"],
    }
)


def names(caption):
    return [ENTITIES.names[identity] for _, _, identity in ENTITIES.spans(caption)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog.", ["dog"]),
        ("Two puppies and three BUSES", ["dog", "bus"]),
        ("mice, people; men (women)", ["mouse", "person", "person", "person"]),
        ("by the Fire  hydrants near a fire", ["fire hydrant", "fire"]),
        ("fire, hydrant", ["fire"]),
        ("T-Shirts and a tee shirt", ["t-shirt", "t-shirt"]),
        ("the dog's bowl, the dogs' bowl, the dog\u2019s bowl", ["dog", "dog", "dog"]),
        ('a "dog" and a \u201cpuppy\u201d', ["dog", "dog"]),
        ("''dog'' ``dog`` 'dog'", ["dog", "dog", "dog"]),
        ("A dog. A bus. A man", ["dog", "bus", "person"]),
        ("a dog\u2014a bus--a man", ["dog", "bus", "person"]),
        ("a glass, a pair of glasses", ["glass", "eyeglasses"]),
        ("a hot-dog, a doghouse, underdog, manual, bussing", []),
        ("", []),
        ("...", []),
    ],
)
def test_mentions(caption, expected):
    assert names(caption) == expected


def test_the_mask_token_is_no_mention_of_a_mask():
    entities = EntitySet({"mask": []})
    assert entities.find("a [MASK] here") == ()
    assert len(entities.spans("a [MASK] and a mask")) == 1


@settings(deadline=None)
@given(st.text())
def test_any_text_has_ordered_spans(text):
    spans = word_spans(text)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))
    assert len(words(text)) == len(spans)


def test_form_under_two_entities_is_an_error():
    with pytest.raises(UserError, match="'cat'.*'tiger'.*'feline'"):
        EntitySet({"tiger": ["cat"], "feline": ["cat"]})
    with pytest.raises(UserError, match="two entities"):
        EntitySet({"fire hydrant": [], "hydrant": ["Fire  Hydrant"]})


@pytest.mark.parametrize("table", [{"": []}, {"dog": ["..."]}, {"dog": "dog"}])
def test_forms_without_a_word_are_an_error(table):
    with pytest.raises(UserError, match="form"):
        EntitySet(table)


def test_a_file_of_bare_names_and_forms_is_read_too(tmp_path):
    path = tmp_path / "e.json"
    ENTITIES.to_json(path, source="a test", counts={"dog": 3})
    assert EntitySet.from_json(path).table == ENTITIES.table
    document = json.loads(path.read_text("utf-8"))
    assert (document["source"], document["counts"]) == ("a test", {"dog": 3})
    path.write_text(json.dumps({"TV Monitor": [], **document["entities"]}))
    assert EntitySet.from_json(path).find("a tv monitor, a bus, a dog and a bus") == (0, 1, 6)


BAD_FILES = ["{", "[]", '{"dog": "dog"}', '{"dog": [1]}', None]
BAD_FILES += [
    '{"format": "ovseg_jax entities", "version": 99, "entities": {}}',
    '{"format": "ovseg_jax entities", "version": 1}',
    '{"format": "ovseg_jax entities", "version": 1, "entities": ["dog"]}',
]


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_entity_file_is_a_user_error(tmp_path, content):
    path = tmp_path / "e.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"e\.json"):
        EntitySet.from_json(path)


PLURALS = """dog/dogs bus/buses box/boxes church/churches city/cities boy/boys knife/knives
bookshelf/bookshelves cliff/cliffs snowman/snowmen human/humans grandchild/grandchildren sheep/sheep
photo/photos shoe/shoes movie/movies headache/headaches horse/horses rose/roses lens/lenses
walrus/walruses zebra/zebras fox/foxes t-shirt/t-shirts"""


@pytest.mark.parametrize("pair", PLURALS.split())
def test_plural_and_back(pair):
    one, many = pair.split("/")
    assert many in plurals(one)
    assert singular(many) == singular(one) == one


CAPTIONS = [
    "a brown dog running on the beach", "two dogs and a cat in the garden",
    "a cat sleeping on a wooden chair", "the happiness of a beautiful morning",
    "three boxes on the table", "a dog under the table",
]  # fmt: skip


def counted(captions, finder):
    counts = NounCounts()
    for caption in captions:
        counts.add_caption(caption, finder)
    return counts


def test_frequent_concrete_nouns_become_entities():
    counts = counted(CAPTIONS, BundledNouns())
    chosen = choose_entities(counts, top=4)
    assert list(chosen.items()) == [("dog", 3), ("cat", 2), ("table", 2), ("beach", 1)]
    everything = choose_entities(counts, top=100)
    assert set(everything) == {"dog", "cat", "table", "beach", "garden", "chair", "box"}
    with pytest.raises(UserError, match="no nouns"):
        choose_entities(counted(["very quickly", ""], BundledNouns()), top=100)


def test_wordnet_is_used_where_it_is_installed(wordnet, monkeypatch):
    tags = {"horses": "NNS", "ideas": "NNS", "qwerty": "NN", "test": "NN"}
    monkeypatch.setattr(nltk, "pos_tag", lambda tokens: [(t, tags.get(t, "DT")) for t in tokens])
    finder = noun_finder()
    assert isinstance(finder, WordNetNouns)
    assert choose_entities(counted(["some horses and ideas, qwerty"], finder), 9) == {"horse": 1}


def test_without_corpora_the_word_lists_are_used(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    assert isinstance(noun_finder(), BundledNouns)


def test_joined_tables_have_each_name_and_form_once():
    first = {"dog": ["dog", "puppy"], "couch": []}
    second = {"puppy": ["whelp"], "sofa": ["couch", "settee"], "dog": ["hound"]}
    joined = joined_tables([first, second])
    assert joined == {"dog": ["dog", "puppy", "whelp", "hound"], "couch": [], "sofa": ["settee"]}
    EntitySet(joined)
    assert list(joined_tables([first, dict(first)]).items()) == list(first.items())


def test_names_that_are_forms_already_are_not_added():
    table = {"dog": ["puppy"]}
    names = ["Puppy", "dogs", "sorrel", "horse", "Horse", "!", "studio couch"]
    added = {"sorrel": [], "horse": [], "studio couch": []}
    assert with_names(table, names) == {**table, **added}
    assert with_names(table, []) == table


def test_the_published_list_is_the_published_one():
    entities = EntitySet.published()
    assert len(entities) == 73
    assert sum(len(forms) for forms in entities.table.values()) == 100
    assert entities.table["house"] == ["house", "building", "hotel"]
    assert entities.names[0] == "people"
    named = entities.find("Two women in T-shirts on motorbikes by the desks")
    assert [entities.names[i] for i in named] == ["people", "motorcycle", "table", "shirt"]
