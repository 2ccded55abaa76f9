"""CLIP's byte pairs, against the tokenizer of transformers on a small vocabulary."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovseg_jax.data import clip_tokens
from ovseg_jax.data.token_files import load_backend
from ovseg_jax.data.tokens import Tokenizer, find_tokenizer
from ovseg_jax.errors import UserError

SPECIAL = [clip_tokens.START, clip_tokens.END]
TEXTS = [
    "A photo of a dog.",
    "the dog's 12 photos,   don't  stop!",
    "UPPER caf\u00e9 \u00fcber \u732b \U0001f600",
    "",
    "dogdog dog-dog photo(s)",
]


def byte_letters():
    """Bytes as the printable letters that byte-level vocabularies write them with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {b: chr(b) for b in plain}, 256
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(extra)
            extra += 1
    return list(table.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    merges = ["d o", "do g</w>", "p h", "o t", "ph ot", "phot o</w>", "t h", "th e</w>", "do g"]
    tokens = [*byte_letters(), *(letter + "</w>" for letter in byte_letters())]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [clip_tokens.START, clip_tokens.END]
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
    assert [load_backend(folder).encode(text).ids for text in TEXTS] == expected
    ids = tokenizer.encode(TEXTS, 40)
    for row, want in zip(ids, expected, strict=True):
        np.testing.assert_array_equal(row[: len(want)], want)
        assert (row[len(want) :] == tokenizer.end_id).all()


def test_special_tokens(tokenizer):
    assert tokenizer.family.name == "CLIP" and tokenizer.mask_id == -1
    assert tokenizer.pad_id == tokenizer.end_id == tokenizer.vocab_size - 1
    start = tokenizer.vocab_size - 2
    np.testing.assert_array_equal(tokenizer.encode([""], 3)[0], [start] + [start + 1] * 2)
    (cut,), told = tokenizer.encode_and_tell(["dog dog dog dog"], 4)
    assert cut[0] == start and cut[-1] == tokenizer.end_id and told.tolist() == [True]
    masked, without = tokenizer.encode(["a [MASK] dog", "a dog"], 8)
    np.testing.assert_array_equal(masked, without)


def test_there_and_back_through_a_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = find_tokenizer(str(tmp_path))
    np.testing.assert_array_equal(again.encode(TEXTS, 24), tokenizer.encode(TEXTS, 24))
    assert again.family == tokenizer.family


def test_damaged_files(folder, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({clip_tokens.START: 0, "a": 1}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="endoftext"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="byte-pair"):
        Tokenizer(tmp_path)


@given(st.lists(st.sampled_from([*"<|>", *SPECIAL, "[MASK]", "endof", "text", "dog", " "])))
def test_what_people_type_is_never_a_special_token(tokenizer, pieces):
    text = "".join(pieces)
    length = int(tokenizer.lengths([text])[0])
    typed = tokenizer.encode([text], length)[0, 1:-1]
    # The end token is the unknown token too, but byte pairs know all letters.
    assert not np.isin(typed, [tokenizer.end_id, tokenizer.vocab_size - 2]).any()


def test_what_surrounds_a_dropped_mask_does_not_join(tokenizer):
    ids = tokenizer.encode(["<|endof[MASK]text|>"], 24)[0]
    assert np.flatnonzero(ids == tokenizer.end_id)[0] > 5
