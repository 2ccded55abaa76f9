"""The small set of records, as tests of batches read it; and a tiny WordNet."""

import functools

import nltk
import pytest
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from small_set import make_source, make_tokenizer, read_batches

# A tiny WordNet: synset -> (lemmas, synsets above it). A lemma with a count is an everyday word.
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
    """Writes `root`/corpora/wordnet as NLTK reads it; returns synset -> its id, 'n00001234'."""
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


@pytest.fixture(scope="module")
def source():
    """The 23 records of `small_set`."""
    return make_source()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of their words."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def read(source, tokenizer):
    """Reads them in batches; keywords change the loader's settings."""
    return functools.partial(read_batches, source, tokenizer)


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A tiny WordNet in place of the installed one: synset -> id."""
    ids = write_wordnet(tmp_path / "nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    other = LazyCorpusLoader("omw-2.0", nltk.corpus.CorpusReader, r".*")
    loader = LazyCorpusLoader("wordnet", WordNetCorpusReader, other)
    monkeypatch.setattr(nltk.corpus, "wordnet", loader)
    yield ids
    files = vars(loader)  # of the reader that NLTK has put in the loader's place; it closes none
    streams = [*files.get("_data_file_map", {}).values(), files.get("_key_count_file")]
    for stream in filter(None, streams):
        stream.close()
