"""Words of English text: where they are, their plurals and singulars, and bundled lists of them."""

import functools
import re
from importlib import resources

MASK_TOKEN = "[MASK]"
# Marks that are no words, alone or around a word.
EDGE = ".,'-_*/\u2026"
# A run of letters and digits, with the combining accents of its letters.
_RUN = r"[^\W_]+[\u0300-\u036f]*"
# Runs with one mark between them are one word (t-shirt, o'clock, and/or), but not "dog's".
_TOKEN = re.compile(
    rf"{re.escape(MASK_TOKEN)}|{_RUN}(?:(?:'-|[-/.*+=|~^\\_]|'(?![sS]\b))?{_RUN})*|'[sS]\b|\S"
)
_APOSTROPHES = str.maketrans("\u2019\u2018", "''")


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of every word of `text`, in order.

    A punctuation mark is a word, and so are the possessive 's and a mask token.
    """
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
    pairs = [pair.split("/") for pair in word_list("irregular_plurals")]
    return {one: many for one, many in pairs}, {many: one for one, many in pairs}


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
    if (
        word in word_list("invariant_plurals")
        or word in singulars_in_s
        or len(word) < 4
        or not word.replace("-", "").isalpha()
    ):
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
    if word.endswith("es") and (
        stem in singulars_in_s or stem.endswith(("ch", "sh", "ss", "x", "zz", "o"))
    ):
        return stem
    return word[:-1]


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
