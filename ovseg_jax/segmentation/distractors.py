"""Words that stand for 'anything else' when few classes are asked for.

The softmax of one class is 1 everywhere, and the best probability of two is never below one half:
without competitors a short list of words paints the whole image. So below a minimum number of
classes everyday nouns are added to the softmax; pixels that one of them wins are background.
"""

from collections.abc import Sequence

from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.vocabulary import BACKGROUND, Vocabulary

# Noun: other words for it, kinds and parts of it, and wider words that include it. A class that is
# any of these would lose its own pixels to the noun, so the noun is then not used. Frequent
# surroundings and frequent objects alternate: the first entries are those used most.
DISTRACTORS: dict[str, tuple[str, ...]] = {
    "sky": ("cloud", "heaven", "air"),
    "person": (
        *("people", "man", "men", "woman", "women", "child", "children", "boy", "girl", "human"),
        *("player", "lady", "guy", "kid", "baby", "rider", "pedestrian", "face", "crowd"),
    ),
    "grass": ("lawn", "field", "meadow", "turf", "plant", "vegetation"),
    "dog": ("puppy", "puppies", "animal", "pet", "mammal", "hound"),
    "wall": ("brick", "concrete", "plaster", "building"),
    "car": ("automobile", "vehicle", "taxi", "cab", "sedan"),
    "tree": ("forest", "wood", "plant", "bush", "leaf", "leaves", "branch", "vegetation"),
    "cat": ("kitten", "animal", "pet", "mammal", "tabby"),
    "floor": ("carpet", "rug", "tile", "ground"),
    "bird": ("animal", "duck", "chicken", "parrot", "owl", "eagle", "penguin", "pigeon", "swan"),
    "water": ("sea", "ocean", "river", "lake", "pool", "wave", "pond"),
    "flower": ("rose", "tulip", "plant", "blossom", "bouquet", "daisy", "sunflower"),
    "building": ("house", "skyscraper", "tower", "home", "church", "office", "wall"),
    "bicycle": ("bike", "cycle", "vehicle"),
    "road": ("street", "asphalt", "highway", "pavement", "path"),
    "chair": ("seat", "stool", "armchair", "furniture", "bench"),
    "table": ("desk", "furniture", "dining table", "diningtable"),
    "food": (
        *("meal", "dish", "fruit", "vegetable", "pizza", "cake", "bread", "sandwich", "apple"),
        *("banana", "burger", "orange", "cheese", "salad", "donut", "carrot", "broccoli"),
    ),
    "horse": ("pony", "ponies", "foal", "animal", "mammal"),
    "boat": ("ship", "sailboat", "vessel", "canoe", "vehicle", "ferry"),
    "window": ("glass", "pane"),
    "bottle": ("flask", "container", "vial", "jar"),
    "mountain": ("hill", "rock", "cliff", "volcano"),
    "bus": ("coach", "vehicle", "minibus"),
    "sand": ("beach", "desert", "ground"),
    "cow": ("cattle", "bull", "calf", "calves", "ox", "oxen", "animal", "mammal"),
    "door": ("gate", "entrance"),
    "airplane": ("aeroplane", "plane", "aircraft", "jet", "vehicle"),
    "snow": ("ice", "winter"),
    "ball": ("football", "soccer", "basketball", "baseball", "tennis", "toy"),
    "fence": ("railing", "barrier"),
    "train": ("locomotive", "railway", "vehicle", "tram", "metro"),
    "rock": ("stone", "boulder", "mountain"),
    "sheep": ("lamb", "ewe", "animal", "mammal"),
    "bed": ("mattress", "furniture"),
    "motorcycle": ("motorbike", "scooter", "vehicle", "moped"),
    "curtain": ("drape", "blind"),
    "sofa": ("couch", "settee", "furniture"),
    "book": ("magazine", "novel", "notebook"),
    "truck": ("lorry", "lorries", "van", "vehicle", "pickup"),
    "cup": ("mug", "glass", "coffee", "tea"),
    "hat": ("cap", "helmet", "clothes", "clothing"),
    "lamp": ("light", "lantern", "bulb"),
    "elephant": ("animal", "mammal"),
    "umbrella": ("parasol",),
    "shoe": ("boot", "sneaker", "footwear", "sandal"),
    "clock": ("watch", "alarm"),
    "fish": ("goldfish", "shark", "animal", "salmon"),
    "phone": ("telephone", "smartphone", "mobile", "cellphone"),
    "television": ("tv", "screen", "monitor", "display"),
    "bag": ("handbag", "backpack", "suitcase", "luggage", "purse"),
    "computer": ("laptop", "keyboard", "pc", "monitor"),
    "bridge": ("viaduct",),
    "box": ("carton", "package", "container"),
    "butterfly": ("butterflies", "insect", "moth", "animal"),
    "guitar": ("instrument", "ukulele"),
    "key": ("lock",),
    "sign": ("signpost", "billboard", "poster"),
    "shirt": ("t-shirt", "clothes", "clothing", "jacket", "dress"),
    "hand": ("finger", "arm", "body"),
    "paper": ("sheet", "page", "letter"),
    "pattern": ("texture", "background", "stripe", "dot"),
}


def competition(vocabulary: Vocabulary, protocol: Protocol) -> Vocabulary:
    """The words that compete for a pixel under a protocol.

    With fewer words than its `competing_words`, everyday words are added for the background. A
    vocabulary that has words for the background, and a protocol without background, stay alone.
    """
    if protocol.threshold is None or BACKGROUND in vocabulary.owners:
        return vocabulary
    names = list(vocabulary.words)
    more = with_distractors(names, minimum=protocol.competing_words)[len(names) :]
    return vocabulary.with_background(more)


def with_distractors(
    class_names: Sequence[str],
    vocabulary: dict[str, tuple[str, ...]] | None = None,
    minimum: int = 20,
) -> list[str]:
    """`class_names`, then as many distractors as are needed to make `minimum` words.

    A distractor is left out when it, or a word listed with it, is one of the classes or a word of
    one ('plant' of 'potted plant'), in singular or regular plural. There may be fewer than
    `minimum` words when the vocabulary does not have enough others.

    Args:
      vocabulary: noun -> related words, in order of preference; `DISTRACTORS` by default.
      minimum: number of words in the softmax. A threshold found with N classes suits about N.

    Returns:
      The words of the softmax; those from index len(class_names) on are distractors.

    Raises:
      UserError: no class, an empty class name, or one that is listed twice.
    """
    Vocabulary.of(class_names)
    vocabulary = DISTRACTORS if vocabulary is None else vocabulary
    taken = set().union(*(_words(name) for name in class_names))
    free = [noun for noun, related in vocabulary.items() if not taken & _forms({noun, *related})]
    return [*class_names, *free[: max(0, minimum - len(class_names))]]


def _words(class_name: str) -> set[str]:
    name = class_name.strip().lower()
    return _forms({name, *name.split()})


def _forms(words: set[str]) -> set[str]:
    return {form for word in words for form in (word, f"{word}s", f"{word}es")}
