"""What is in a scene, where, and its caption: a pure function of (seed, split, index).

All lengths are fractions of the image side, so a layout can be drawn at any size. Label ids follow
the table of classes: 0 is background, 1..C the rows in order. The first nineteen rows are the
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

from ovseg_jax.data.scenes.backgrounds import FAMILIES, Background
from ovseg_jax.errors import UserError


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


# ---- the layout

# Part of every random key and of every fingerprint: raise it when any picture or caption changes.
VERSION = 1
# The split enters the random key, so splits share no random stream.
SPLITS: dict[str, int] = {"train": 0, "tune": 1, "test": 2}

_OBJECTS, _CAPTION = 0, 1  # streams: captions may change their draws without moving an object

_COUNT_SHARES = (0.28, 0.44, 0.20, 0.08)  # of scenes with one to four objects
_REPEATED_CLASS = 0.1
_SIDE = (0.32, 0.56)
_SIDE_BY_COUNT = (1.15, 1.1, 1.05, 1.0)  # one object alone is larger, as in photographs
_CUT_BY_FRAME = 0.15
_FREELY_PLACED = 0.25
_PLACES_TRIED = 8
_PATCH = 0.3
_LARGEST_TURN = 25.0
NUM_SKINS = 6  # of people; 0 is the font's symbolic yellow


@dataclass(frozen=True)
class PlacedObject:
    """One object. `side` is the geometric mean of width and height; `angle` in degrees."""

    label: int
    emoji: str
    skin: int
    center: tuple[float, float]  # across, down
    side: float
    angle: float
    flip: bool
    hue: float  # radians
    brightness: float


@dataclass(frozen=True)
class Patch:
    """A textured blob that belongs to the background, drawn behind object number `below`."""

    center: tuple[float, float]
    radius: float
    below: int
    rim: bool
    seed: int


@dataclass(frozen=True)
class SceneLayout:
    """A whole scene; `objects` from back to front."""

    objects: tuple[PlacedObject, ...]
    patches: tuple[Patch, ...]
    background: Background
    caption: str


def _rng(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of scenes: use one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"scenes need a seed and an index of 0 or more, got {seed} and {index}")
    key = np.random.SeedSequence([VERSION, SPLITS[split], seed, index, stream])
    return np.random.Generator(np.random.Philox(key))


def _crowding(point: np.ndarray, side: float, placed: list[PlacedObject]) -> float:
    """Area shared by a square of this side about a point and the squares of what is there."""
    total = 0.0
    for other in placed:
        reach = 0.5 * (side + other.side)
        across = max(0.0, reach - abs(point[0] - other.center[0]))
        down = max(0.0, reach - abs(point[1] - other.center[1]))
        total += across * down
    return total


def _place(
    rng: np.random.Generator, side: float, placed: list[PlacedObject]
) -> tuple[float, float]:
    """A center: mostly the least crowded of a few, sometimes the first that comes (occlusion)."""
    margin = side * (0.25 if rng.random() < _CUT_BY_FRAME else 0.5)
    tries = 1 if rng.random() < _FREELY_PLACED else _PLACES_TRIED
    points = margin + (1 - 2 * margin) * rng.random((tries, 2))
    best = min(points, key=lambda point: _crowding(point, side, placed))
    return float(best[0]), float(best[1])


def _objects(rng: np.random.Generator) -> tuple[PlacedObject, ...]:
    count = 1 + int(np.searchsorted(np.cumsum(_COUNT_SHARES)[:-1], rng.random(), side="right"))
    placed: list[PlacedObject] = []
    for _ in range(count):
        repeat = bool(placed) and rng.random() < _REPEATED_CLASS
        label = placed[-1].label if repeat else 1 + int(rng.integers(NUM_CLASSES))
        entry = class_of(label)
        side = float(rng.uniform(*_SIDE)) * _SIDE_BY_COUNT[count - 1]
        placed.append(
            PlacedObject(
                label=label,
                emoji=entry.drawings[int(rng.integers(len(entry.drawings)))],
                skin=int(rng.integers(NUM_SKINS)) if entry.name == "person" else 0,
                center=_place(rng, side, placed),
                side=side,
                angle=float(rng.uniform(-_LARGEST_TURN, _LARGEST_TURN)),
                flip=bool(rng.random() < 0.5),
                hue=float(rng.uniform(-0.2, 0.2)),
                brightness=float(rng.uniform(0.8, 1.12)),
            )
        )
    return tuple(placed)


def _patches(rng: np.random.Generator, count: int) -> tuple[Patch, ...]:
    if rng.random() >= _PATCH:
        return ()
    across, down = rng.uniform(0.1, 0.9, 2)
    patch = Patch(
        center=(float(across), float(down)),
        radius=float(rng.uniform(0.07, 0.16)),
        below=int(rng.integers(count + 1)),
        rim=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**62)),
    )
    return (patch,)


def layout_at(seed: int, split: str, index: int) -> SceneLayout:
    """The layout of one scene, in about 0.2 ms and without drawing."""
    rng = _rng(seed, split, index, _OBJECTS)
    objects = _objects(rng)
    patches = _patches(rng, len(objects))
    family = FAMILIES[int(rng.integers(len(FAMILIES)))]
    background = Background(family, int(rng.integers(2**62)), float(rng.uniform(2, 9)))
    sides = [(item.label, item.side) for item in objects]
    caption = caption_of(_rng(seed, split, index, _CAPTION), sides)
    return SceneLayout(objects, patches, background, caption)
