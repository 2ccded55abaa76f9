"""A WordNet of a few kinds, in the files that NLTK reads."""

# Synset -> (lemmas, synsets above it). A lemma with a count is of everyday language.
TOP = ["entity", "physical_entity", "object", "whole", "living", "organism", "animal"]
SYNSETS = {
    **{name: ([name], TOP[at - 1 : at] if at else []) for at, name in enumerate(TOP)},
    "mammal": (["mammal"], ["animal"]),
    "equine": (["equine"], ["mammal"]),
    "horse": (["horse", "Equus_caballus"], ["equine"]),
    "Sorrel": (["Sorrel"], []),
    "sorrel": (["sorrel"], ["horse"]),
    "plant": (["sorrel", "oxalis"], ["whole"]),
}
COUNTS = {"horse": 5, "animal": 9, "mammal": 3}
# In the order of senses: a person, a plant, a horse.
SENSES = {"sorrel": ["Sorrel", "plant", "sorrel"]}
_HEADER = "  1 WordNet 3.0 Copyright 2006  \n"


def write_wordnet(root):
    """Writes `root`/corpora/wordnet.

    Returns:
      Synset -> its id, as 'n00001234'.
    """
    folder = root / "corpora" / "wordnet"
    folder.mkdir(parents=True)

    def line(name, offsets):
        lemmas, above = SYNSETS[name]
        # "Sorrel" is a person: an instance of a kind.
        pointers = [("@", target) for target in above] or [("@i", "horse")] * (name == "Sorrel")
        words = " ".join(f"{lemma} 0" for lemma in lemmas)
        found = "".join(f" {mark} {offsets[target]:08d} n 0000" for mark, target in pointers)
        head = f"{offsets[name]:08d} 03 n {len(lemmas):02x} {words}"
        return f"{head} {len(pointers):03d}{found} | a gloss  \n"

    offsets, position = dict.fromkeys(SYNSETS, 0), len(_HEADER)
    for name in SYNSETS:
        offsets[name], position = position, position + len(line(name, offsets))
    senses = {}
    for name, (lemmas, _) in SYNSETS.items():
        for lemma in lemmas:
            senses.setdefault(lemma.lower(), []).append(name)
    index, keys = [], []
    for lemma, names in sorted((senses | SENSES).items()):
        places = [f"{offsets[name]:08d}" for name in names]
        index.append(f"{lemma} n {len(places)} 0 {len(places)} 0 {' '.join(places)}  \n")
        keys.append(f"{lemma}%1:03:00:: {places[0]} 1 0\n")
    files = {
        "data.noun": _HEADER + "".join(line(name, offsets) for name in SYNSETS),
        "index.noun": _HEADER + "".join(index),
        "index.sense": "".join(keys),
        "cntlist.rev": "".join(f"{w}%1:03:00:: 1 {n}\n" for w, n in sorted(COUNTS.items())),
        "lexnames": "00\tadj.all\t3\n01\tadj.pert\t3\n02\tadv.all\t4\n03\tnoun.Tops\t1\n",
    }
    for kind in ("adj", "adv", "verb"):
        files |= {f"data.{kind}": _HEADER, f"index.{kind}": _HEADER, f"{kind}.exc": ""}
    for name, text in {"noun.exc": "", **files}.items():
        (folder / name).write_text(text)
    return {name: f"n{offset:08d}" for name, offset in offsets.items()}
