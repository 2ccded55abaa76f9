"""Made-up captions with the word statistics of alt texts; a function of the seed alone."""

from collections.abc import Iterator

import numpy as np

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.words import word_list

_RARE = 100_000  # made-up words, most of them seldom
_FREQUENT = 300  # words that the entities' names stand among
_AT_ONCE = 1000
_SYLLABLES = "ba ko ri tel man dor vi sha pen lo gar mi tu nes".split()
_ENDINGS = ["", "", "", "", ".", "!", " ...", " | shop", " - stock photo"]
# How words are dressed, one of 400 each time; most are bare.
_FORMS = ["{},"] * 40 + ["{}s"] * 20 + ["({})"] * 8 + ["{}'s"] * 8 + ['"{}"'] * 6
_FORMS += ["\u201c{}\u201d"] * 4 + ["{}/{}"] * 3 + ["{}\u2019s"] * 2 + ["{}.", "'{}'"]
_OF = 400


def _vocabulary(rng: np.random.Generator) -> list[str]:
    """Words, the frequent ones first."""
    common = sorted(filter(str.isalpha, word_list("function") | word_list("determiners")))
    listed = sorted(word_list("adjectives") | word_list("verbs") | word_list("abstract"))
    rng.shuffle(listed)
    forms = {form for forms in EntitySet.published().table.values() for form in forms}
    frequent = [*sorted(forms), *listed[:_FREQUENT], "<PERSON>", "2019", "5,000"]
    rng.shuffle(frequent)
    rare = ["".join(rng.choice(_SYLLABLES, n)) for n in rng.integers(2, 6, _RARE)]
    return [*common, *frequent, *listed[_FREQUENT:], *rare]


def captions(count: int, seed: int = 0) -> Iterator[str]:
    """`count` captions of 4 to 30 words."""
    vocabulary = _vocabulary(np.random.default_rng(0))
    rng = np.random.default_rng(seed)
    # Zipf's law, as in text: the k-th word has a probability like 1 / k.
    below = np.cumsum(1 / np.arange(1, len(vocabulary) + 1))
    for start in range(0, count, _AT_ONCE):
        lengths = rng.integers(4, 31, min(_AT_ONCE, count - start))
        total = int(lengths.sum())
        ranks = np.searchsorted(below, rng.random(total) * below[-1]).tolist()
        forms = rng.integers(0, _OF, total).tolist()
        endings = rng.integers(0, len(_ENDINGS), len(lengths)).tolist()
        at = 0
        for length, ending in zip(lengths.tolist(), endings, strict=True):
            found = [
                _FORMS[form].replace("{}", vocabulary[rank])
                if form < len(_FORMS)
                else vocabulary[rank]
                for rank, form in zip(ranks[at : at + length], forms[at : at + length], strict=True)
            ]
            at += length
            text = " ".join(found) + _ENDINGS[ending]
            yield text[:1].upper() + text[1:]
