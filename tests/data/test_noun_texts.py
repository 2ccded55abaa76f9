"""Nouns of a caption as sentences of their own."""

import io

import numpy as np
from PIL import Image

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import Examples
from ovseg_jax.data.noun_texts import caption_nouns, noun_sentences
from ovseg_jax.data.nouns import BundledNouns
from ovseg_jax.data.records import Record
from ovseg_jax.data.tokenizer import Tokenizer

CAPTION = "A dog and two cats sit on the sofa, a dog sleeps near the window."
FINDER = BundledNouns()
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


def draw(seed, count=3, caption=CAPTION):
    rng = np.random.default_rng(seed)
    return noun_sentences(caption, count, TEMPLATES, rng, FINDER)


def test_nouns_once_each_in_their_order():
    assert caption_nouns(CAPTION, FINDER) == ["dog", "cat", "sofa", "window"]
    assert caption_nouns("", FINDER) == []


def test_drawn_without_repetition_and_each_in_a_template():
    possible = {t.replace("{}", noun) for t in TEMPLATES for noun in caption_nouns(CAPTION, FINDER)}
    seen = set()
    for seed in range(60):
        sentences = draw(seed)
        nouns = [s.rstrip(".").split()[-1] for s in sentences]
        assert len(sentences) == 3 == len(set(nouns)) and set(sentences) <= possible
        seen |= set(sentences)
    assert seen == possible
    assert draw(5) == draw(5)


def test_fewer_nouns_than_asked_for():
    assert len(draw(0, count=9)) == 4
    assert draw(0, caption="and so on") == []


# ---- in examples


class Captions:
    """Two records: one with nouns, one that cannot be read."""

    name = "captions"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = TINY_PNG if index == 0 else b"no image"
        return Record(image, ("a dog and a cat on the sofa",), f"key {index}", ())

    def captions(self):
        return [("a dog and a cat on the sofa",)] * 2

    def fingerprint(self):
        return "captions"


def tiny_png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


TINY_PNG = tiny_png()


class Letters(Tokenizer):
    """A tokenizer of letters."""

    def __init__(self):
        self.pad_id = 0

    def encode_with_cuts(self, texts, length):
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = [ord(letter) for letter in text][:length]
        return ids, np.array([len(text) > length for text in texts])


def test_examples_hold_nouns_or_say_that_they_are_absent():
    examples = Examples(
        Captions(),
        EntitySet({"dog": ["dog"]}),
        Letters(),
        {
            "text_length": 40,
            "transform": {"kind": "none", "size": 8},
            "templates": ("a {}",),
            "nouns": 4,
        },
        batch_size=2,
        seed=0,
        first_step=0,
        last_step=1,
        with_pairs=False,
        slots=None,
        image_store=None,
        text_store=None,
        pairs=None,
    )
    found = {int(one["record"]): one for one in (examples[0], examples[1])}
    words = ["".join(map(chr, row[row > 0])) for row in found[0]["noun_ids"]]
    assert set(words[:3]) == {"a dog", "a cat", "a sofa"} and words[3] == ""
    np.testing.assert_array_equal(found[0]["noun_present"], [True, True, True, False])
    assert found[1]["weight"] == 0 and not found[1]["noun_present"].any()
    assert found[1]["noun_ids"].shape == found[0]["noun_ids"].shape
