"""Sentences for single nouns of a caption: GroupViT's further positives (Xu et al., 2022, 3.2)."""

import functools
from collections.abc import Sequence

import numpy as np

from ovseg_jax.data.nouns import NounFinder, noun_finder
from ovseg_jax.data.templates import fill
from ovseg_jax.data.words import words


@functools.cache
def _finder() -> NounFinder:
    # Once a process: WordNet takes a while to load.
    return noun_finder()


def caption_nouns(caption: str, finder: NounFinder | None = None) -> list[str]:
    """The different nouns of a caption, in the singular, in their order.

    Args:
      finder: how to find them; the best that is installed by default.
    """
    found = (finder or _finder()).nouns(words(caption))
    return list(dict.fromkeys(lemma for lemma, stands_like_noun in found if stands_like_noun))


def noun_sentences(
    caption: str,
    count: int,
    templates: Sequence[str],
    rng: np.random.Generator,
    finder: NounFinder | None = None,
) -> list[str]:
    """Up to `count` nouns drawn from a caption without repetition, each in a template drawn for it.

    Fewer where the caption has fewer; there is no noun twice.
    """
    nouns = caption_nouns(caption, finder)
    chosen = rng.permutation(len(nouns))[:count]
    return [fill(templates[int(rng.integers(len(templates)))], [nouns[i]]) for i in chosen]
