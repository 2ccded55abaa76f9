"""Words of English text: where they are, their plurals and singulars, and which are nouns.

Where NLTK's WordNet and tagger data are installed, they find nouns and physical things. Elsewhere
bundled word lists and the position of a word decide: a noun follows a determiner, a number or a
preposition, perhaps with adjectives between, and no other open-class word follows it.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ovseg_jax.data.tokenizer import MASK_TOKEN
from ovseg_jax.errors import UserError

# A run of letters and digits, with the combining accents of its letters.
_RUN = r"[^\W_]+[\u0300-\u036f]*"
# Runs with one mark between them are one word (t-shirt, o'clock, and/or), but not "dog's".
_TOKEN = re.compile(
    rf"{re.escape(MASK_TOKEN)}|{_RUN}(?:(?:'-|[-/.*+=|~^\\_]|'(?![sS]\b))?{_RUN})*|'[sS]\b|\S"
)
_APOSTROPHES = str.maketrans("\u2019\u2018", "''")
# A word is a noun if at least this share of its uses is in the position of a noun.
_LEAST_EVIDENCE = 0.2
_PARTICIPLE_ENDINGS = ("ing", "ed", "ly", "ful", "ous", "less", "est")
_SHORTEST = 3
# Kinds this near to the top of WordNet, 'entity', say nothing of how a thing looks: object, whole,
# artifact (depth 4), instrumentality, organism (5), animal, device, container, food (4 to 6).
_TOP = 6
# Nor do these, which lie deeper.
_TOO_WIDE = frozenset(
    "vertebrate.n.01 mammal.n.01 domestic_animal.n.01 craft.n.02 instrument.n.01 barrier.n.01 "
    "game.n.04 electronic_equipment.n.01 percussion_instrument.n.01".split()
)
_EVERYDAY = re.compile(r"[a-z-]+(_[a-z-]+)?")


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of every word, of which punctuation marks, 's and the mask token are some."""
    return [match.span() for match in _TOKEN.finditer(text.translate(_APOSTROPHES))]


def words(text: str) -> list[str]:
    """The words of `text` in lower case, with plain apostrophes."""
    return [word.lower() for word in _TOKEN.findall(text.translate(_APOSTROPHES))]


@functools.cache
def word_list(name: str) -> frozenset[str]:
    """The words of a bundled list; lines that begin with # are comments."""
    text = resources.files("ovseg_jax.data").joinpath(f"wordlists/{name}.txt").read_text("utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return frozenset(word for line in lines for word in line.split())


@functools.cache
def _irregular() -> tuple[dict[str, str], dict[str, str]]:
    """Singular -> plural of irregular nouns, and the way back."""
    table = dict(pair.split("/") for pair in word_list("irregular_plurals"))
    return table, {many: one for one, many in table.items()}


def plurals(word: str) -> tuple[str, ...]:
    """The plurals of a lower-case noun, the usual one first ("mango": mangos, mangoes)."""
    if word in word_list("invariant_plurals"):
        return (word, word + "es") if word.endswith(("fish", "squid")) else (word,)
    irregular = _compound(word, _irregular()[0])
    if irregular is not None:
        return (irregular, _regular(word))
    if word.endswith("o"):
        return (word + "s", word + "es")
    if word.endswith(("bus", "gas")):
        return (word + "es", word + "ses")
    return (_regular(word),)


@functools.lru_cache(maxsize=100_000)
def singular(word: str) -> str:
    """The singular of a lower-case noun; a word that is no plural does not change."""
    singulars_in_s = word_list("singulars_in_s")
    is_fixed = word in word_list("invariant_plurals") or word in singulars_in_s
    if is_fixed or len(word) < 4 or not word.replace("-", "").isalpha():
        return _irregular()[1].get(word, word)
    irregular = _compound(word, _irregular()[1])
    if irregular is not None:
        return irregular
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word[:-1] in word_list("singulars_in_e"):
        return word[:-1]
    if word.endswith("ies"):
        return word[:-3] + "y"
    stem = word[:-2]
    adds_e = stem in singulars_in_s or stem.endswith(("ch", "sh", "ss", "x", "zz", "o"))
    return stem if word.endswith("es") and adds_e else word[:-1]


def _regular(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in ("", *"aeiou"):
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word + "s"


def _compound(word: str, table: dict[str, str]) -> str | None:
    """`table[word]`, or the same for the last noun of a compound ("snowman")."""
    if word in table:
        return table[word]
    regular = word_list("regular_plurals")
    if word in regular or (word.endswith("s") and word[:-1] in regular):
        return None
    for cut in range(2, len(word) - 2):
        if word[cut:] in table and len(word) - cut > 2 and word[cut:] not in ("die", "dice"):
            return word[:cut] + table[word[cut:]]
    return None


# ---- nouns


class BundledNouns:
    """Finds nouns by word lists and by their position in the sentence."""

    name = "bundled word lists"

    def __init__(self) -> None:
        self._function, self._determiners = word_list("function"), word_list("determiners")
        self._adjectives, self._verbs = word_list("adjectives"), word_list("verbs")
        self._exceptions = word_list("shape_exceptions")
        self._known = self._function | self._adjectives | self._verbs

    def nouns(self, tokens: Sequence[str]) -> list[tuple[str, bool]]:
        """(singular, whether it has the position of a noun) for each word that may be a noun."""
        lemmas = [(at, token, singular(token)) for at, token in enumerate(tokens)]
        return [
            (lemma, self._opens(tokens, at) and self._closes(tokens, at))
            for at, token, lemma in lemmas
            if self._may_be_noun(token, lemma)
        ]

    def _may_be_noun(self, token: str, lemma: str) -> bool:
        if len(lemma) < _SHORTEST or not lemma.replace("-", "").isalpha():
            return False
        # A form such as "leaves" is a verb as well as a plural; the lemma "leaf" speaks for itself.
        is_form = token in self._known and token in (lemma, lemma + "s", lemma + "es")
        is_other = lemma in self._known or is_form or lemma.endswith(_PARTICIPLE_ENDINGS)
        return lemma in self._exceptions or not is_other

    def _opens(self, tokens: Sequence[str], at: int) -> bool:
        left = at - 1
        while left >= 0 and tokens[left] in self._adjectives:
            left -= 1
        # A caption may begin with the bare noun: "white dogs", "dogs".
        return left < 0 or tokens[left] in self._determiners or not tokens[left].isalnum()

    def _closes(self, tokens: Sequence[str], at: int) -> bool:
        if at + 1 == len(tokens):
            return True
        word = tokens[at + 1]
        is_participle = word.endswith(("ing", "ed")) and word not in self._exceptions
        is_closed = word in self._function or word in self._verbs
        return not word.isalpha() or is_closed or is_participle


class WordNetNouns:
    """NLTK's tagger and WordNet; a LookupError where their data are not installed."""

    name = "WordNet and the tagger"

    def __init__(self) -> None:
        import nltk
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
        nltk.pos_tag(["test"])
        self._nltk, self._wordnet = nltk, wordnet
        self._physical: dict[str, bool] = {}

    def nouns(self, tokens: Sequence[str]) -> list[tuple[str, bool]]:
        """As `BundledNouns.nouns`."""
        tagged = self._nltk.pos_tag(list(tokens))
        nouns = [t for t, tag in tagged if tag in ("NN", "NNS") and t.replace("-", "").isalpha()]
        lemmas = [self._wordnet.morphy(token, "n") or singular(token) for token in nouns]
        return [(x, True) for x in lemmas if len(x) >= _SHORTEST and self._is_physical(x)]

    def _is_physical(self, lemma: str) -> bool:
        if lemma not in self._physical:
            senses = self._wordnet.synsets(lemma, "n")
            above = list(senses[0].closure(lambda sense: sense.hypernyms())) if senses else []
            self._physical[lemma] = self._wordnet.synset("physical_entity.n.01") in above
        return self._physical[lemma]


NounFinder = BundledNouns | WordNetNouns


def noun_finder() -> NounFinder:
    """WordNet's finder if its data are installed, else the bundled one. Downloads nothing."""
    try:
        return WordNetNouns()
    except LookupError:
        return BundledNouns()


_finder = functools.cache(noun_finder)  # WordNet takes a while to load


def caption_nouns(caption: str) -> list[str]:
    """The different nouns of a caption in the singular, in its order; by `noun_finder()`."""
    nouns = _finder().nouns(words(caption))
    return list(dict.fromkeys(lemma for lemma, in_place in nouns if in_place))


@dataclass
class NounCounts:
    """Mentions of each noun (singular): all `uses`, and `evidence`, those in a noun's position."""

    uses: Counter[str] = field(default_factory=Counter)
    evidence: Counter[str] = field(default_factory=Counter)

    def add_caption(self, caption: str, finder: NounFinder) -> None:
        """Counts the nouns of one caption."""
        for lemma, in_place in finder.nouns(words(caption)):
            self.uses[lemma] += 1
            self.evidence[lemma] += in_place


def choose_entities(counts: NounCounts, top: int) -> dict[str, int]:
    """The `top` most frequent nouns with their counts, abstract ones left out (Sec. 3.1.2)."""
    chosen = {
        lemma: count
        for lemma, count in counts.uses.items()
        if lemma not in word_list("abstract")
        and counts.evidence[lemma] >= max(1, _LEAST_EVIDENCE * count)
    }
    if not chosen:
        raise UserError("no nouns were found in the captions; give a list of entities instead")
    # Alphabetical among equals, so that the order of the captions does not matter.
    return dict(sorted(chosen.items(), key=lambda item: (-item[1], item[0]))[:top])


# ---- wider words of WordNet


def load_wordnet() -> Any:
    """NLTK's reader of WordNet; a UserError where its data are not installed."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:
        get = "python -m nltk.downloader wordnet"
        raise UserError(f"--hypernyms needs the data of WordNet; get them with: {get}") from error
    return wordnet


def wider_names(wordnet: Any, name: str, offset: int | None) -> tuple[str, ...]:
    """The name itself and everyday words for it, the nearest first.

    These are lemmas of the name's synset and of those above it that occur in WordNet's own texts,
    have one or two words, and are in small letters. The synset is that at `offset`, the digits of a
    WordNet id; by default the first noun synset that spells the name like this and is a kind of
    thing, not a single person or place. `name` is empty where only `offset` is known.
    """
    if offset is None:
        spelled = name.replace(" ", "_")
        kinds = [s for s in wordnet.synsets(spelled, "n") if not s.instance_hypernyms()]
        alike = [synset for synset in kinds if spelled in synset.lemma_names()]
        level = (alike or kinds)[:1]
    else:
        try:
            level = [wordnet.synset_from_pos_and_offset("n", offset)]
        except Exception as error:  # NLTK fails in many ways where no synset begins there
            wrong = f"n{offset:08d} is no WordNet 3.0 id of a noun"
            raise UserError(f"{wrong}; correct the names of folders and files") from error
    lemmas = [name or level[0].lemma_names()[0]]
    while level:
        for kind in level:
            if kind.min_depth() > _TOP and kind.name() not in _TOO_WIDE:
                used = [lemma.name() for lemma in kind.lemmas() if lemma.count()]
                lemmas += [lemma for lemma in used if _EVERYDAY.fullmatch(lemma)]
        level = list(dict.fromkeys(above for kind in level for above in kind.hypernyms()))
    names: dict[str, str] = {}
    for lemma in lemmas:
        names.setdefault(lemma.replace("_", " ").lower(), lemma.replace("_", " "))
    return tuple(names.values())
