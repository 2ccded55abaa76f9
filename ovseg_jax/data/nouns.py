"""Which words of a caption are nouns for visible things, and an entity set made of them.

Where NLTK's WordNet and tagger data are installed, the tagger finds nouns, and WordNet says whether
a noun's first sense is a physical thing. Elsewhere bundled word lists and the position of a word
decide: a noun follows a determiner, a number or a preposition, with adjectives between them or not,
and no other open-class word follows it.
"""

import functools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ovseg_jax.data.words import singular, word_list, words
from ovseg_jax.errors import UserError

# A word is a noun if at least this share of its uses is in the position of a noun.
_LEAST_EVIDENCE = 0.2
_PARTICIPLE_ENDINGS = ("ing", "ed", "ly", "ful", "ous", "less", "est")
_SHORTEST = 3


@runtime_checkable
class NounFinder(Protocol):
    """Finds the nouns of a tokenized caption."""

    name: str

    def nouns(self, tokens: Sequence[str]) -> list[tuple[str, bool]]:
        """(singular, whether it has the position of a noun) for each word that may be a noun."""
        ...


class BundledNouns:
    """Word lists and position in the sentence."""

    name = "bundled word lists"

    def __init__(self) -> None:
        self._function = word_list("function")
        self._determiners = word_list("determiners")
        self._adjectives = word_list("adjectives")
        self._verbs = word_list("verbs")
        self._exceptions = word_list("shape_exceptions")
        self._known = self._function | self._adjectives | self._verbs

    def nouns(self, tokens: Sequence[str]) -> list[tuple[str, bool]]:
        nouns = []
        for at, token in enumerate(tokens):
            lemma = singular(token)
            if self._may_be_noun(token, lemma):
                nouns.append((lemma, self._opens(tokens, at) and self._closes(tokens, at)))
        return nouns

    def _may_be_noun(self, token: str, lemma: str) -> bool:
        if len(lemma) < _SHORTEST or not lemma.replace("-", "").isalpha():
            return False
        if lemma in self._exceptions:
            return True
        # A form such as "leaves" is a verb as well as a plural; the lemma "leaf" speaks for itself.
        if lemma in self._known or (
            token in self._known and token in (lemma, lemma + "s", lemma + "es")
        ):
            return False
        return not lemma.endswith(_PARTICIPLE_ENDINGS)

    def _opens(self, tokens: Sequence[str], at: int) -> bool:
        left = at - 1
        while left >= 0 and tokens[left] in self._adjectives:
            left -= 1
        # A caption may begin with the bare noun: "white dogs", "dogs".
        return left < 0 or tokens[left] in self._determiners or not tokens[left].isalnum()

    def _closes(self, tokens: Sequence[str], at: int) -> bool:
        if at + 1 == len(tokens):
            return True
        following = tokens[at + 1]
        return (
            not following.isalpha()
            or following in self._function
            or following in self._verbs
            or (following.endswith(("ing", "ed")) and following not in self._exceptions)
        )


class WordNetNouns:
    """NLTK's tagger for nouns, WordNet for singulars and for physical things.

    Raises:
      LookupError: the data are not installed.
    """

    name = "WordNet and the tagger"

    def __init__(self) -> None:
        import nltk
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
        nltk.pos_tag(["test"])
        self._nltk, self._wordnet = nltk, wordnet
        self._physical: dict[str, bool] = {}

    def nouns(self, tokens: Sequence[str]) -> list[tuple[str, bool]]:
        nouns = []
        for token, tag in self._nltk.pos_tag(list(tokens)):
            if tag in ("NN", "NNS") and token.replace("-", "").isalpha():
                lemma = self._wordnet.morphy(token, "n") or singular(token)
                if len(lemma) >= _SHORTEST and self._is_physical(lemma):
                    nouns.append((lemma, True))
        return nouns

    def _is_physical(self, lemma: str) -> bool:
        if lemma not in self._physical:
            senses = self._wordnet.synsets(lemma, "n")
            above = list(senses[0].closure(lambda sense: sense.hypernyms())) if senses else []
            self._physical[lemma] = self._wordnet.synset("physical_entity.n.01") in above
        return self._physical[lemma]


def noun_finder() -> NounFinder:
    """WordNet's finder if its data are installed, else the bundled one. Downloads nothing."""
    try:
        return WordNetNouns()
    except LookupError:
        return BundledNouns()


@functools.cache
def _finder() -> NounFinder:
    # WordNet takes a while to load.
    return noun_finder()


def caption_nouns(caption: str, finder: NounFinder | None = None) -> list[str]:
    """The different nouns of a caption in the singular, in the order of the caption.

    Args:
      finder: `noun_finder()` by default.
    """
    nouns = (finder or _finder()).nouns(words(caption))
    return list(dict.fromkeys(lemma for lemma, stands_like_noun in nouns if stands_like_noun))


@dataclass
class NounCounts:
    """How often captions use each noun.

    Attributes:
      uses: noun, in the singular -> mentions.
      evidence: noun -> mentions in the position of a noun.
    """

    uses: Counter[str] = field(default_factory=Counter)
    evidence: Counter[str] = field(default_factory=Counter)

    def add_caption(self, caption: str, finder: NounFinder) -> None:
        """Counts the nouns of one caption."""
        for lemma, stands_like_noun in finder.nouns(words(caption)):
            self.uses[lemma] += 1
            self.evidence[lemma] += stands_like_noun


def choose_entities(
    counts: NounCounts, top: int, abstract: Collection[str] | None = None
) -> dict[str, int]:
    """The `top` most frequent nouns with their counts, abstract ones left out (Sec. 3.1.2).

    Args:
      abstract: nouns to leave out, in the singular; the bundled list by default.

    Raises:
      UserError: there is no noun.
    """
    abstract = word_list("abstract") if abstract is None else frozenset(abstract)
    # Alphabetical among equals, so that the order of the captions does not matter.
    ranked = sorted(
        (
            (count, lemma)
            for lemma, count in counts.uses.items()
            if lemma not in abstract and counts.evidence[lemma] >= max(1, _LEAST_EVIDENCE * count)
        ),
        key=lambda item: (-item[0], item[1]),
    )[:top]
    if not ranked:
        raise UserError("no nouns were found in the captions; give a list of entities instead")
    return {lemma: count for count, lemma in ranked}
