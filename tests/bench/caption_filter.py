"""Captions a second with a fixed entity list, against the tokenizer and a set look-up.

    PYTHONPATH=. python tests/bench/caption_filter.py [CAPTIONS]

One process, 200 000 made-up captions by default, the published entities. In turns, 20 stretches of
the captions go through

  filter     `EntitySet.find`, which also says which entities a caption names
  prepare    the same with the checks of script, length and escapes before it
  look-up    `NLTKWordTokenizer().tokenize`, quotes blanked, each token freed of punctuation and
             looked up in the set of all forms: keeps the same captions (checked)
  bare       the same on raw tokens in lower case: misses "dog" in 'A "dog". A cat'

and the ratios of captions a second to the filter's are printed, with their range over stretches.
Exits with code 1 if the filter and the look-up differ in any caption. Not run by pytest.
"""

import sys
import time
from collections.abc import Callable

from caption_corpus import captions
from nltk.tokenize import NLTKWordTokenizer

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare.pairs import RawPair
from ovseg_jax.data.prepare.rules import Rules, clean_captions
from ovseg_jax.data.words import plurals, words

STRETCHES = 20
_BLANK = str.maketrans(dict.fromkeys('"`\u201c\u201d\u201e\u00ab\u00bb', " "))
_EDGE = ".,'-_*/\u2026"


def ways(entities: EntitySet) -> dict[str, Callable[[str], bool]]:
    """Name -> whether it keeps a caption."""
    rules, tokenizer = Rules(), NLTKWordTokenizer()
    listed = {form.lower() for forms in entities.table.values() for form in forms}
    forms = listed | {plural for form in listed for plural in plurals(form)}

    def prepare(caption: str) -> bool:
        return any(map(entities.find, clean_captions(RawPair("key", (caption,)), rules)))

    def look_up(caption: str) -> bool:
        tokens = tokenizer.tokenize(caption.translate(_BLANK))
        return any(token.strip(_EDGE).lower() in forms for token in tokens)

    def bare(caption: str) -> bool:
        return any(token.lower() in forms for token in tokenizer.tokenize(caption))

    return {
        "filter": lambda caption: bool(entities.find(caption)),
        "prepare": prepare,
        "look-up": look_up,
        "bare": bare,
    }


def main(count: int) -> int:
    """Prints the table; returns the exit code."""
    entities = EntitySet.published()
    assert all(len(words(form)) == 1 for forms in entities.table.values() for form in forms)
    corpus = list(captions(count))
    tried = ways(entities)
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    kept: dict[str, list[bool]] = {name: [] for name in tried}
    step = -(-count // STRETCHES)
    for start in range(0, count, step):
        stretch = corpus[start : start + step]
        for name, keeps in tried.items():
            begin = time.process_time()
            kept[name] += [keeps(caption) for caption in stretch]
            seconds[name].append(time.process_time() - begin)
    print(f"{count} captions, {sum(kept['filter'])} kept")
    for name in tried:
        total = sum(seconds[name])
        ratios = [s / f for s, f in zip(seconds[name], seconds["filter"], strict=True)]
        differ = sum(a != b for a, b in zip(kept[name], kept["filter"], strict=True))
        print(
            f"{name:8s} {count / total:12,.0f} captions/s  filter is "
            f"{total / sum(seconds['filter']):6.1f} x as fast ({min(ratios):.1f} to "
            f"{max(ratios):.1f})  {differ} kept otherwise"
        )
    same = kept["filter"] == kept["look-up"]
    print(f"the same captions kept as by the look-up: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000))
