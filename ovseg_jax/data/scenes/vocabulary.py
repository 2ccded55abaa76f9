"""The classes of scenes: names, surface forms in captions, drawings, and which are never named.

A class is one row of a table. Label ids follow the table: 0 is background, 1..C the rows in
order. Nineteen rows are the classes of PASCAL VOC (OpenMoji draws everything but a dining table);
the others are everyday things chosen to look different from one another.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
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
    is_voc: bool

    def forms(self) -> tuple[str, ...]:
        """All surface forms, both numbers, without repeats, the canonical singular first."""
        both = [form for noun in self.nouns for form in (noun.singular, noun.plural)]
        return tuple(dict.fromkeys(both))


# name/plural, synonym/plural, ... | drawings | colors. A leading "-": the class is never named.
_VOC = """
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
"""

_OTHER = """
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


def _parse_row(row: str, is_voc: bool) -> SceneClass:
    nouns_text, drawings, colors = (part.strip() for part in row.split("|"))
    seen = not nouns_text.startswith("-")
    nouns = tuple(Noun(*form.strip().split("/")) for form in nouns_text.lstrip("-").split(","))
    return SceneClass(
        name=nouns[0].singular,
        nouns=nouns,
        drawings=tuple(drawings),
        colors=tuple(color.strip() for color in colors.split(",") if color.strip()),
        seen=seen,
        is_voc=is_voc,
    )


CLASSES: tuple[SceneClass, ...] = tuple(
    _parse_row(row, is_voc)
    for table, is_voc in ((_VOC, True), (_OTHER, False))
    for row in table.strip().splitlines()
)
CLASS_NAMES: tuple[str, ...] = tuple(entry.name for entry in CLASSES)
NUM_CLASSES: int = len(CLASSES)
SEEN_LABELS: tuple[int, ...] = tuple(i for i, entry in enumerate(CLASSES, 1) if entry.seen)
UNSEEN_LABELS: tuple[int, ...] = tuple(i for i, entry in enumerate(CLASSES, 1) if not entry.seen)


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
