"""The classes of scenes, and captions that name most of them, among words about nothing.

A class is one row of a table. Label ids follow the table: 0 is background, 1..C the rows in order.
The first nineteen rows are the classes of PASCAL VOC (OpenMoji draws everything but a dining
table); the others are everyday things chosen to look different from one another.

What a caption promises, and the tests check: 5 to 18 words; a seen object is named in at least nine
of ten; an unseen class is never named; every class it names is in the scene.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Noun(NamedTuple):
    """One way to say a class, in both numbers."""

    singular: str
    plural: str


@dataclass(frozen=True)
class SceneClass:
    """One class: `nouns[0]` is its canonical name, the rest are synonyms.

    `drawings` are single code points, because sequences (joiners, skin tone modifiers) need a text
    layout library that not every build of Pillow has. `colors` are true of every drawing. `seen` is
    False for a class that no caption ever names, in any split.
    """

    name: str
    nouns: tuple[Noun, ...]
    drawings: tuple[str, ...]
    colors: tuple[str, ...]
    seen: bool

    def forms(self) -> tuple[str, ...]:
        """All surface forms, both numbers, without repeats, the canonical singular first."""
        both = [form for noun in self.nouns for form in (noun.singular, noun.plural)]
        return tuple(dict.fromkeys(both))


# name/plural, synonym/plural, ... | drawings | colors. A leading "-": the class is never named.
_TABLE = """
aeroplane/aeroplanes, airplane/airplanes, plane/planes, aircraft/aircraft | ✈🛩🛫 |
bicycle/bicycles, bike/bikes, cycle/cycles | 🚲 | red
bird/birds, songbird/songbirds | 🐦🦆🦅🦉🦜 |
boat/boats, ship/ships, vessel/vessels | ⛵🚤🛶 |
bottle/bottles, flask/flasks | 🍾🍼🧴 |
bus/buses, coach/coaches, minibus/minibuses | 🚌🚍🚎 |
car/cars, automobile/automobiles, taxi/taxis | 🚗🚙🚘🚕🚖 |
cat/cats, kitten/kittens, kitty/kitties | 🐱🐈😺 | orange, ginger
chair/chairs, seat/seats | 🪑💺 |
cow/cows, ox/oxen, bull/bulls | 🐮🐄🐂 | brown
dog/dogs, puppy/puppies, hound/hounds | 🐶🐕🐩 |
horse/horses, pony/ponies, stallion/stallions | 🐴🐎 | brown
-motorbike/motorbikes, motorcycle/motorcycles, scooter/scooters | 🏍🛵 | red
person/people, man/men, woman/women, human/humans, child/children | 🧍🚶🧑👩👨👴👵🏃🧘 |
potted plant/potted plants, houseplant/houseplants, cactus/cacti | 🪴🌵 | green
-sheep/sheep, lamb/lambs, ram/rams, ewe/ewes | 🐑🐏 | white
-sofa/sofas, couch/couches, settee/settees | 🛋 | blue
train/trains, locomotive/locomotives, railcar/railcars | 🚂🚆🚄🚈 |
tv monitor/tv monitors, television/televisions, monitor/monitors, tv/tvs | 📺🖥 | gray
apple/apples | 🍎🍏 |
banana/bananas | 🍌 | yellow
pizza/pizzas, slice of pizza/slices of pizza | 🍕 |
hamburger/hamburgers, burger/burgers, cheeseburger/cheeseburgers | 🍔 |
cake/cakes, birthday cake/birthday cakes | 🎂🍰 | yellow
-strawberry/strawberries | 🍓 | red
carrot/carrots | 🥕 | orange
umbrella/umbrellas, parasol/parasols | ☂🌂⛱ |
guitar/guitars, electric guitar/electric guitars | 🎸 | red
-trumpet/trumpets, cornet/cornets | 🎺 | yellow
ball/balls, football/footballs | ⚽🏀🎾 | round
clock/clocks, alarm clock/alarm clocks | ⏰🕰🕐 |
cup/cups, teacup/teacups, mug/mugs | ☕🍵 | white
hat/hats, cap/caps | 🎩👒🧢 |
shoe/shoes, sneaker/sneakers, boot/boots | 👟👞🥾👠 |
key/keys | 🔑🗝 |
book/books, novel/novels | 📕📚 |
house/houses, hut/huts, cottage/cottages | 🏠🛖🏚 |
tree/trees, pine/pines, palm/palms | 🌳🌲🌴 | green, leafy
flower/flowers, blossom/blossoms, rose/roses | 🌻🌷🌹🌼 |
mushroom/mushrooms, toadstool/toadstools | 🍄 | red, spotted
elephant/elephants | 🐘 | gray
fish/fish, goldfish/goldfish | 🐟🐠🐡 |
butterfly/butterflies | 🦋 | blue
-turtle/turtles, tortoise/tortoises | 🐢 | green
frog/frogs, toad/toads | 🐸 | green
balloon/balloons | 🎈 | red
rocket/rockets, spaceship/spaceships | 🚀 |
camera/cameras | 📷 | black
"""


def _parse_row(row: str) -> SceneClass:
    nouns_text, drawings, colors = (part.strip() for part in row.split("|"))
    nouns = tuple(Noun(*form.strip().split("/")) for form in nouns_text.lstrip("-").split(","))
    return SceneClass(
        name=nouns[0].singular,
        nouns=nouns,
        drawings=tuple(drawings),
        colors=tuple(color.strip() for color in colors.split(",") if color.strip()),
        seen=not nouns_text.startswith("-"),
    )


CLASSES: tuple[SceneClass, ...] = tuple(map(_parse_row, _TABLE.strip().splitlines()))
NUM_CLASSES: int = len(CLASSES)


def class_of(label: int) -> SceneClass:
    """The class of a label id in 1..C (0 is background and has none)."""
    if not 1 <= label <= NUM_CLASSES:
        raise IndexError(f"label {label} is outside 1..{NUM_CLASSES}")
    return CLASSES[label - 1]


def scene_entity_table() -> dict[str, list[str]]:
    """Entity list for training on scenes: seen class name -> its surface forms.

    Unseen classes are left out: their names must not reach the training text by any way.
    """
    return {entry.name: list(entry.forms()) for entry in CLASSES if entry.seen}


# ---- captions

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
