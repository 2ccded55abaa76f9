"""Words of a caption with their positions: NLTK's word tokenizer, which needs no corpus."""

import functools
import re
from typing import Any

# Single characters that never belong to an English word and that the tokenizer would rewrite
# (it turns double quotes into `` and ''): blanked one for one, so that positions stay.
_BLANK = {ord(mark): " " for mark in '"`\u201c\u201d\u201e\u00ab\u00bb'}
_PLAIN = str.maketrans({"\u2019": "'", "\u2018": "'"})
# A run of quotes, and the tokenizer would join a pair of them into one token of its own.
_QUOTE_RUN = re.compile(r"'{2,}")
# Left on a token by the tokenizer inside a text of several sentences ("a dog. A cat").
_EDGE = ".,'-_*/\u2026"


@functools.cache
def _tokenizer() -> Any:
    # Imported on first use: the package takes a second to load, and cached texts need none.
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of every word of `text`, in order.

    Punctuation marks are words of their own; a sentence's last period, quotes and dashes at the
    edge of a word are left out of it, so such a span can be empty.
    """
    plain = text.translate(_BLANK).translate(_PLAIN)
    plain = _QUOTE_RUN.sub(lambda match: " " * len(match.group()), plain)
    spans = []
    for start, end in _tokenizer().span_tokenize(plain):
        word = plain[start:end]
        left = len(word) - len(word.lstrip(_EDGE))
        inner = word.strip(_EDGE)
        spans.append((start + left, start + left + len(inner)))
    return spans


def word_at(text: str, span: tuple[int, int]) -> str:
    """One word in lower case; a typographic apostrophe becomes a plain one."""
    return text[span[0] : span[1]].translate(_PLAIN).lower()


def words(text: str) -> list[str]:
    """The words of `text` in lower case."""
    return [word_at(text, span) for span in word_spans(text)]
