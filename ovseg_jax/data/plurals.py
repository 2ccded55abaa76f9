"""English plurals by rule, with the irregular nouns that name things one can see."""

# Nouns whose plural no rule gives. They also count as the last part of a compound (snowman).
_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "louse": "lice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
    "leaf": "leaves",
    "loaf": "loaves",
    "thief": "thieves",
    "calf": "calves",
    "half": "halves",
    "elf": "elves",
    "shelf": "shelves",
    "wolf": "wolves",
    "knife": "knives",
    "wife": "wives",
    "life": "lives",
    "scarf": "scarves",
    "hoof": "hooves",
    "dwarf": "dwarves",
    "wharf": "wharves",
    "cactus": "cacti",
    "fungus": "fungi",
    "octopus": "octopi",
    "hippopotamus": "hippopotami",
    "quiz": "quizzes",
    "oasis": "oases",
    "stomach": "stomachs",
    "passerby": "passersby",
    "die": "dice",
}
# Words that end like an irregular noun and are regular all the same.
_REGULAR = frozenset(
    """
    human german roman norman shaman ottoman talisman caiman mongoose fox box mailbox
    sandbox toolbox lunchbox matchbox inbox
    """.split()
)
# Same form for one and many.
_INVARIANT = frozenset(
    """
    sheep deer fish goldfish starfish jellyfish swordfish moose reindeer bison shrimp salmon
    trout squid swine aircraft spacecraft hovercraft series species offspring chess glasses
    eyeglasses sunglasses binoculars scissors pliers jeans pants shorts trousers tights
    leggings clothes pajamas headphones news tennis gymnastics athletics christmas police
    furniture grass clothing
    """.split()
)
# Singulars that end in s, for the way back from a plural.
_SINGULAR_S = frozenset(
    """
    bus minibus gas lens canvas atlas iris tennis cactus walrus octopus hippopotamus
    platypus circus campus virus lotus hibiscus crocus eucalyptus asparagus papyrus abacus
    chorus bonus status focus trellis pelvis clematis mantis ibis chassis debris
    portcullis overalls pancreas
    """.split()
)
# Singulars in -e whose plural looks as if it had added -es.
_ENDS_IN_E = frozenset(
    """
    ache headache toothache moustache mustache avalanche niche quiche cache brioche axe
    pickaxe shoe horseshoe snowshoe toe tiptoe canoe oboe doe hoe foe floe movie cookie
    zombie selfie hoodie brownie smoothie genie birdie foodie rookie calorie collie prairie
    hippie veggie doggie magpie pie tie necktie bowtie lie menagerie
    """.split()
)
_SINGULAR = {plural: one for one, plural in _IRREGULAR.items()}


def plurals(word: str) -> tuple[str, ...]:
    """The plurals of a lower-case noun, the usual one first ("mango": mangos, mangoes)."""
    if word in _INVARIANT:
        return (word, word + "es") if word.endswith(("fish", "squid")) else (word,)
    irregular = _compound(word, _IRREGULAR)
    if irregular is not None:
        return (irregular, _regular(word))
    if word.endswith("o"):
        return (word + "s", word + "es")
    if word.endswith(("bus", "gas")):
        return (word + "es", word + "ses")
    return (_regular(word),)


def singular(word: str) -> str:
    """The singular of a lower-case noun; a word that is no plural comes back as it is."""
    if (
        word in _INVARIANT
        or word in _SINGULAR_S
        or len(word) < 4
        or not word.replace("-", "").isalpha()
    ):
        return _SINGULAR.get(word, word)
    irregular = _compound(word, _SINGULAR)
    if irregular is not None:
        return irregular
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word[:-1] in _ENDS_IN_E:
        return word[:-1]
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("es") and (
        word[:-2] in _SINGULAR_S or word[:-2].endswith(("ch", "sh", "ss", "x", "zz", "o"))
    ):
        return word[:-2]
    return word[:-1]


def _regular(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in ("", *"aeiou"):
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word + "s"


def _compound(word: str, table: dict[str, str]) -> str | None:
    """`table[word]`, or of the longest ending of `word` in it that leaves a real first part."""
    if word in table:
        return table[word]
    if word in _REGULAR or (word.endswith("s") and word[:-1] in _REGULAR):
        return None
    for cut in range(2, len(word) - 2):
        if word[cut:] in table and len(word) - cut > 2 and word[cut:] not in ("die", "dice"):
            return word[:cut] + table[word[cut:]]
    return None
