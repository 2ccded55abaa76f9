"""Captions of scenes: short, varied sentences that name most objects, among words about nothing.

What a caption promises, and the tests check: 5 to 18 words; a seen object is named in at least nine
of ten; an unseen class is never named; every class it names is in the scene.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ovseg_jax.data.scenes.vocabulary import class_of

MIN_WORDS = 5
MAX_WORDS = 18
_OMITTED = 0.1  # of the classes in a scene
_NAMELESS = 0.04  # of the captions
_ATTEMPTS = 100  # at a sentence of the right length; about one in three fits at the worst

# {objects} is the list of noun phrases, {are} agrees with it.
TEMPLATES = (
    "a photo of {objects}",
    "a {mood} photo of {objects}",
    "{objects} {place}",
    "{objects} on a {mood} {time}",
    "there {are} {objects} {place}",
    "a picture of {objects} {place}",
    "{objects} in this {mood} {work}",
    "a close view of {objects}",
    "look at {objects} {place}",
    "this {work} shows {objects}",
    "{objects} against a {mood} background",
    "{time} {work} with {objects}",
    "{objects}, what a {mood} {time}",
    "we saw {objects} {place} that {time}",
    "a {mood} {idea} with {objects}",
    "stock {work} of {objects} {place}",
    "{objects} as seen {place}",
    "here {are} {objects}, {mood} as always",
    "{work} of {objects} for your {idea}",
    "my favorite {work}: {objects} {place}",
    "{objects}. a {mood} {idea}",
    "an idea for the {time}: {objects}",
    "the {time} began with {objects}",
    "{mood} art with {objects}",
    "{objects} {are} waiting {place}",
    "nothing but {objects} {place}",
    "{objects} {are} part of the {mood} scene",
    "can you find {objects} in the {work}",
    "in the {work} you can see {objects}",
    "{objects} and a {mood} texture behind",
    "from last {time}, {objects} {place}",
    "a {mood} composition: {objects}",
    "{objects} found {place}",
    "on a {mood} {time}, {objects} {place}",
    "one more {work} with {objects}",
    "there {are} {objects} to be seen {place}",
)
NAMELESS_TEMPLATES = (
    "a {mood} view {place}",
    "the {mood} {time} i remember from the trip",
    "{mood} {work} for your next {idea}",
    "what a {mood} {time} {place}",
    "an abstract {work} with a {mood} texture",
    "a {mood} {idea} and a {mood} {time}",
)
FILLERS = {
    "mood": (
        "lovely", "quiet", "sunny", "strange", "beautiful", "funny", "simple", "cheerful", "dreamy",
        "cold", "colorful", "vintage", "modern", "playful", "calm", "gloomy", "famous", "perfect",
    ),
    "time": ("morning", "day", "evening", "afternoon", "weekend", "summer", "holiday", "winter"),
    "work": ("photo", "picture", "image", "illustration", "drawing", "view", "collage", "art"),
    "idea": ("idea", "design", "project", "story", "wallpaper", "memory", "mood board", "concept"),
    "place": (
        "in the distance", "near the wall", "outdoors", "in the studio", "by the road", "for sale",
        "in the middle of nowhere", "on the floor", "in the sun", "at the market", "in the city",
        "in the countryside", "under an open sky", "at the party", "around the corner", "upstairs",
    ),
}  # fmt: skip
_QUALITIES = (
    "nice", "pretty", "cute", "happy", "lonely", "shiny", "old", "new", "favorite", "unusual",
    "cool", "amazing", "classic", "well known",
)  # fmt: skip
_COUNTS = {2: "two", 3: "three", 4: "four"}
_JOINS = ("and", "and", "and", "with", "next to", "beside", "near")


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _noun_phrase(rng: np.random.Generator, label: int, sides: list[float], plain: bool) -> str:
    """'a small red car', 'two kittens', 'several old houses': number and size are true."""
    entry = class_of(label)
    # The canonical name half of the time, else any of the nouns (it included).
    choice = 0 if rng.random() < 0.5 else int(rng.integers(len(entry.nouns)))
    noun = entry.nouns[choice]
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
            words.append(_pick(rng, _QUALITIES))
    if len(sides) == 1:
        phrase = " ".join([*words, noun.singular])
        return f"the {phrase}" if rng.random() < 0.12 else _with_article(phrase)
    number = _COUNTS[len(sides)] if rng.random() < 0.7 else _pick(rng, ("some", "several", "a few"))
    return " ".join([number, *words, noun.plural])


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
