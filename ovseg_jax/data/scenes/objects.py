"""The classes of scenes, and captions that name most of them, among words about nothing.

Label ids follow the table: 0 is background, 1..C the rows in order. The first nineteen rows are the
classes of PASCAL VOC (OpenMoji draws no dining table). A caption has 5 to 18 words; nine of ten or
more name a seen object; an unseen class is never named; every class that is named is in the scene.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np


@dataclass(frozen=True)
class SceneClass:
    """One class: `nouns[0]` is its canonical name, the rest are synonyms; (singular, plural).

    `drawings` are single code points, because sequences (joiners, skin tone modifiers) need a text
    layout library that not every build of Pillow has. `colors` are true of every drawing. `seen` is
    False for a class that no caption ever names, in any split.
    """

    name: str
    nouns: tuple[tuple[str, str], ...]
    drawings: tuple[str, ...]
    colors: tuple[str, ...]
    seen: bool

    def forms(self) -> tuple[str, ...]:
        """All surface forms, both numbers, without repeats, the canonical singular first."""
        return tuple(dict.fromkeys(form for noun in self.nouns for form in noun))


def _parse_row(row: str) -> SceneClass:
    nouns_text, drawings, colors = (part.strip() for part in row.split("|"))
    nouns = tuple(tuple(form.strip().split("/")) for form in nouns_text.lstrip("-").split(","))
    shades = tuple(color.strip() for color in colors.split(",") if color.strip())
    return SceneClass(nouns[0][0], nouns, tuple(drawings), shades, not nouns_text.startswith("-"))


_FOLDER = resources.files("ovseg_jax.data.scenes")
_ROWS = _FOLDER.joinpath("classes.txt").read_text("utf-8").splitlines()[1:]  # below a comment
CLASSES: tuple[SceneClass, ...] = tuple(map(_parse_row, _ROWS))
NUM_CLASSES: int = len(CLASSES)


def class_of(label: int) -> SceneClass:
    """The class of a label id in 1..C (0 is background and has none)."""
    return CLASSES[label - 1]


def scene_entity_table() -> dict[str, list[str]]:
    """Seen class name -> surface forms. Names of unseen ones must not reach the training text."""
    return {entry.name: list(entry.forms()) for entry in CLASSES if entry.seen}


# ---- captions

MIN_WORDS, MAX_WORDS = 5, 18
_OMITTED = 0.1  # of the classes in a scene
_NAMELESS = 0.04  # of the captions
_ATTEMPTS = 100  # at a sentence of the right length; about one in three fits at the worst

_WORDS = json.loads(_FOLDER.joinpath("captions.json").read_text("utf-8"))
# {objects} is the list of noun phrases, {are} agrees with it; fillers stand for the other words.
TEMPLATES, NAMELESS_TEMPLATES, FILLERS = (_WORDS[x] for x in ("templates", "nameless", "fillers"))
_COUNTS = {2: "two", 3: "three", 4: "four"}
_JOINS = ("and", "and", "and", "with", "next to", "beside", "near")


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun_phrase(rng: np.random.Generator, label: int, sides: list[float], plain: bool) -> str:
    """'a small red car', 'two kittens', 'several old houses': number and size are true."""
    entry = class_of(label)
    # The canonical name half of the time, else any of the nouns (it included).
    choice = 0 if rng.random() < 0.5 else int(rng.integers(len(entry.nouns)))
    singular, plural = entry.nouns[choice]
    words = []
    if not plain and rng.random() < 0.45:
        kind = rng.random()
        if kind < 0.35 and entry.colors:
            words.append(_pick(rng, entry.colors))
        elif kind < 0.6 and min(sides) > 0.42:
            words.append(_pick(rng, ("big", "large", "huge")))
        elif kind < 0.6 and max(sides) < 0.3:
            words.append(_pick(rng, ("small", "little", "tiny")))
        else:
            words.append(_pick(rng, _WORDS["qualities"]))
    if len(sides) == 1:
        phrase = " ".join([*words, singular])
        article = "an" if phrase[0] in "aeiou" else "a"
        return f"{'the' if rng.random() < 0.12 else article} {phrase}"
    number = _COUNTS[len(sides)] if rng.random() < 0.7 else _pick(rng, ("some", "several", "a few"))
    return " ".join([number, *words, plural])


def _joined(rng: np.random.Generator, phrases: list[str]) -> str:
    if len(phrases) > 2 and rng.random() < 0.4:
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    text = "".join(f"{phrase} {_pick(rng, _JOINS)} " for phrase in phrases[:-1])
    return text + "".join(phrases[-1:])


def _filled(rng: np.random.Generator, template: str, objects: str, are: str) -> str:
    # One slot at a time, so that a word used twice in a template is drawn twice.
    text = template
    for slot, options in FILLERS.items():
        while "{" + slot + "}" in text:
            text = text.replace("{" + slot + "}", _pick(rng, options), 1)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text.replace("{objects}", objects).replace("{are}", are)


def caption_of(rng: np.random.Generator, objects: Sequence[tuple[int, float]]) -> str:
    """One caption for objects given as (label id, side as a fraction of the image).

    Classes are mentioned in random order, each left out with probability 0.1, unseen ones always;
    the caption names nothing where no class is left, and one time in 25 anyway.
    """
    counts = Counter(label for label, _ in objects if class_of(label).seen)
    labels = [label for label in counts if rng.random() >= _OMITTED]
    if not labels and counts:
        labels = [next(iter(counts))]
    rng.shuffle(labels)
    if rng.random() < _NAMELESS:
        labels = []
    sides = {label: [side for other, side in objects if other == label] for label in labels}
    are = "is" if [counts[label] for label in labels] == [1] else "are"
    text = ""
    for attempt in range(_ATTEMPTS):
        # Long lists of objects leave no room for adjectives: drop them after a few tries.
        phrases = [_noun_phrase(rng, label, sides[label], attempt > 3) for label in labels]
        template = _pick(rng, TEMPLATES if labels else NAMELESS_TEMPLATES)
        text = _filled(rng, template, _joined(rng, phrases), are)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            break
    return text.capitalize() + "." if rng.random() < 0.3 else text
