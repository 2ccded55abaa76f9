"""Tokenizers of other families than BERT's lower-case one, from the files that people have."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from tokenizers import Tokenizer as Backend

from ovseg_jax.data.captions import texts_of
from ovseg_jax.data.entities import EntitySet, unmasked
from ovseg_jax.data.token_files import BERT, ROBERTA
from ovseg_jax.data.tokens import Tokenizer
from ovseg_jax.errors import UserError

TEXTS = [
    "A photo of dogs.",
    "a [MASK] on the grass",
    "",
    "a " * 30,
    "zebré\U0001f600 [MASK] [MASK], x",
]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """vocab.json and merges.txt of a byte-pair vocabulary with RoBERTa's special tokens."""
    folder = tmp_path_factory.mktemp("roberta")
    trained = ByteLevelBPETokenizer()
    lines = ["a photo of a dog and a cat", "two dogs on the grass, one cat's bed"] * 20
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        lines, vocab_size=320, min_frequency=2, special_tokens=special, show_progress=False
    )
    trained.save_model(str(folder))
    return folder


def test_roberta_frames_pads_masks_and_cuts(roberta):
    tokenizer = Tokenizer(roberta)
    assert tokenizer.family == ROBERTA
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.end_id) == (1, 4, 2)
    ids, cut = tokenizer.encode_and_tell(TEXTS, 12)
    assert (ids[:, 0] == 0).all()
    assert ids[2].tolist() == [0, 2] + [1] * 10
    assert ids[3:, -1].tolist() == [2, 2] and cut.nonzero()[0].tolist() == [3, 4]
    # The mask swallows the blank before it: "a", mask, then " on".
    assert ids[1, 2] == 4 and ids[1, 3] == tokenizer.encode(["x on"], 4)[0, 2]
    assert (tokenizer.encode(TEXTS[4:], 24) == 4).sum() == 2
    assert tokenizer.lengths(["a [MASK]"]).tolist() == [4]


def test_roberta_ids_are_those_of_transformers(roberta, tmp_path):
    """In a process of its own: importing transformers prints, and warns without torch."""
    Tokenizer(roberta).save(tmp_path / "saved")
    np.testing.assert_array_equal(
        Tokenizer(tmp_path / "saved").encode(TEXTS, 12), Tokenizer(roberta).encode(TEXTS, 12)
    )
    code = f"""
from transformers import AutoTokenizer
texts = [text.replace("[MASK]", "<mask>") for text in {TEXTS!r}]
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "saved")!r})
assert type(tokenizer).__name__ == "RobertaTokenizer", type(tokenizer)
print(tokenizer(texts, padding="max_length", truncation=True, max_length=12)["input_ids"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert Tokenizer(roberta).encode(TEXTS, 12).tolist() == theirs


def test_a_cased_vocabulary_keeps_its_case(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "Dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    assert Tokenizer(tmp_path).encode(["Dog"], 3).tolist() == [[2, 5, 3]]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer(tmp_path).encode(["Dog"], 3).tolist() == [[2, 6, 3]]
    assert Tokenizer(tmp_path).family == BERT
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer(tmp_path)


def test_files_of_no_family_are_refused(roberta, tmp_path):
    backend = Backend.from_str(Tokenizer(roberta)._backend.to_str())
    unframed = json.loads(backend.to_str())
    unframed["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(unframed))
    with pytest.raises(UserError, match="<s> and </s> around"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "a": 1}')
    with pytest.raises(UserError, match="<pad>"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="no byte-pair vocabulary"):
        Tokenizer(tmp_path)


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "a", "dog", "pad", "sep", "cls"]
PIECES += ["mask", "<", ">", "s", "pad", "/"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(PIECES)) + "\n")
    return folder


SPECIAL = ["[PAD]", "[SEP]", "[CLS]", "[MASK]", "[UNK]", "<s>", "</s>", "<pad>", "<mask>", "<unk>"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([*SPECIAL, "a", "dog", " ", "[", "]"]), max_size=8))
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_people_type_is_never_a_special_token(bert, roberta, family, words):
    tokenizer = Tokenizer(bert if family == "bert" else roberta)
    caption = unmasked("".join(words))
    row = tokenizer.encode([caption], 64)[0]
    end = int(np.flatnonzero(row == tokenizer.end_id)[0])
    # One end, after which all is padding, and nothing before it pads, ends or masks.
    assert (row[end + 1 :] == tokenizer.pad_id).all()
    typed = row[1:end]
    first = row[0]
    assert not np.isin(typed, [tokenizer.pad_id, tokenizer.end_id, tokenizer.mask_id, first]).any()
    assert tokenizer.lengths([caption])[0] == end + 1


def test_our_own_mask_stays_a_mask(bert):
    tokenizer, entities = Tokenizer(bert), EntitySet({"dog": []})
    texts = texts_of("a dog [MASK] [SEP]", entities, ["a {}"])
    assert texts["masked"] == "a [MASK] [ MASK ] [SEP]"
    ids = tokenizer.encode([texts["masked"]], 16)[0]
    assert (ids == tokenizer.mask_id).sum() == 1 and (ids == tokenizer.end_id).sum() == 1
    plain = tokenizer.encode(["a dog [ mask ] [ sep ]"], 16)
    np.testing.assert_array_equal(tokenizer.encode([texts["caption"]], 16), plain)
