"""Words, the classes they stand for, and label maps made from them."""

import pytest

from ovseg_jax.data.benchmarks import OPENERS
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.vocabulary import (
    BACKGROUND,
    LISTS,
    Vocabulary,
    competition,
    read_words,
    word_list,
)


def test_synonyms_and_background():
    found = Vocabulary.of(["cat|kitten| tabby", "dog"], ["wall", "sky"])
    assert found.classes == ("cat", "dog")
    assert found.words == ("cat", "kitten", "tabby", "dog", "wall", "sky")
    assert found.word_to_class == (0, 0, 0, 1, BACKGROUND, BACKGROUND)
    assert found.lines() == ("cat|kitten|tabby", "dog", "background: wall|sky")
    assert Vocabulary.of(["cat"]).lines() == ("cat",)


@pytest.mark.parametrize(
    "entries, background, said",
    [
        ([], (), "no classes"),
        ("cat", (), "not one text"),
        (["cat|", "dog"], (), "empty class name"),
        (["cat|kitten", "Kitten "], (), "twice"),
        (["cat", "wall"], ["wall"], "twice"),
    ],
)
def test_bad_lists(entries, background, said):
    with pytest.raises(UserError, match=said):
        Vocabulary.of(entries, background)


def test_lists_by_name_and_from_a_file(tmp_path):
    assert set(LISTS) == {"coco", *OPENERS}
    assert len(word_list("voc")) == 20 and len(word_list("ade20k")) == 150
    assert word_list("coco") == word_list("coco_object") and len(word_list("coco")) == 80
    path = tmp_path / "words.txt"
    path.write_text("cat|kitten\n\n dog \n")
    assert word_list(str(path)) == ("cat|kitten", "dog")
    path.write_text("\n")
    with pytest.raises(UserError, match="lists no classes"):
        word_list(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text file"):
        word_list(str(path))
    path.write_text("1: cat\n2: dog\n")
    assert word_list(str(path)) == ("cat", "dog")
    with pytest.raises(UserError, match="did you mean 'ade20k'"):
        word_list("ade20")


@pytest.mark.parametrize(
    "text, entries, background",
    [
        ("cat, dog,", ("cat", "dog"), False),
        ("salt\\, pepper,cat", ("salt, pepper", "cat"), False),
        ("cat\n\n# birds\ncrow|raven\n", ("cat", "crow|raven"), False),
        ("Background\ncat", ("cat",), True),
        ("__ignore__\n_background_\ncat", ("cat",), True),
        ("0: cat\n1: dog", ("cat", "dog"), False),
        ("background\n1\tcat\n2\tdog", ("cat", "dog"), True),
        ("background\n0\tcat\n1\tdog", "do not count up", None),
        ("0 background\n1 cat\n2 sea lion", ("cat", "sea lion"), True),
        ("0. cat\n1. dog", ("cat", "dog"), False),
        ("background: 0\ncat: 1", ("cat",), True),
        ("background\n1 cat\n2 dog", ("cat", "dog"), True),
        ("7 up", ("7 up",), False),
        ("0,1,2", ("0", "1", "2"), False),
        ("cat\n7 up", ("cat", "7 up"), False),
        ("1 cat\n3 dog", "do not count up", None),
        ("0,cat", "'0' is no name", None),
        ("- background\n- cat", "is no name", None),
        ('"background"\n"cat"', "is no name", None),
        ('["background","cat"]', "is no name", None),
        ("cat;dog", "is no name", None),
        ("background\tx\ncat\ty", "has a tab", None),
        ("cat,,dog", "an empty name", None),
        ("cat,dog\nbird", "has a comma", None),
        ("cat\n_background_", "only the first entry", None),
        ("0: cat\n2: dog", "do not count up", None),
        ("0: cat\ndog", "but not 'dog'", None),
        ("background", "lists no classes", None),
    ],
)
def test_what_people_write_as_a_list(text, entries, background):
    if background is None:
        with pytest.raises(UserError, match=entries):
            read_words(text, "here")
    else:
        assert read_words(text, "here") == (entries, background)


def test_words_for_surroundings():
    vocabulary = Vocabulary.of(["dog", "Dirt Road|street", "rock band", "sea lion"], ["sky", "cat"])
    # By the last noun: a rock band and a sea lion are things.
    assert vocabulary.things == (True, False, False, True, True, False, True)


# ---- competitors


def competing(names, words):
    """The words of a list of classes when so many are asked for."""
    protocol = Protocol(threshold=0.0, competing_words=words)
    return competition(Vocabulary.of(names), protocol).words


def test_a_distractor_never_competes_with_its_own_class():
    related = {
        "dog": "dog", "Dogs": "dog", "puppy": "dog", "animal": "cat", "couch": "sofa",
        "buses": "bus", "tv monitor": "television", "potted plant": "tree", "fire truck": "truck",
    }  # fmt: skip
    for name, noun in related.items():
        words = competing([name], 1000)
        assert noun not in words[1:] and 40 < len(words) == len(set(words)) < 1000


def test_competition():
    few = Vocabulary.of(["zebra", "lion|big cat"])
    protocol = Protocol(threshold=0.3, competing_words=9)
    words = competition(few, protocol)
    assert words.words[:4] == (*few.words, "sky") and len(words.words) == 9
    assert words.classes == few.classes
    assert words.word_to_class == (0, 1, 1) + (BACKGROUND,) * 6
    assert competition(few, protocol.replace(threshold=None)) == few
    assert competition(few, protocol.replace(competing_words=0)) == few
    behind = Vocabulary.of(["zebra"], ["sky"])
    assert competition(behind, protocol) == behind
    many = Vocabulary.of([f"class {i}" for i in range(1000)])
    assert competition(many, protocol) == many
    assert Protocol(threshold=0.3).for_benchmark("folder").competing_words == 20
    assert Protocol(threshold=0.3).for_benchmark("voc").competing_words == 0
