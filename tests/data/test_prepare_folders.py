"""Photographs in class-named folders, wider words for their classes, and sets mixed with them."""

import pickle

import nltk
import pytest
from ml_collections import ConfigDict
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from pair_folders import jpeg
from tiny_wordnet import write_wordnet

from ovseg_jax.data.prepare import rules, source_sets
from ovseg_jax.data.prepare.source_sets import FolderSource
from ovseg_jax.data.records import CLASS_NAMES, TEXTS, ArrayRecordSource
from ovseg_jax.data.sources import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import main, open_source


def write_classes(root, **files):
    for folder, names in files.items():
        for name in names:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(len(name)))
    return root


@pytest.fixture
def classes(tmp_path):
    root = write_classes(
        tmp_path / "photos",
        sorrel=["2.jpg", "1.JPEG", "images/3.png", "notes.txt"],
        studio_couch=["1.jpg", ".hidden.jpg", "._1.jpg", "Thumbs.db", "desktop.ini"],
        woman=["broken.jpg", ".ipynb_checkpoints/1.jpg", "1.webp"],
    )
    (root / "woman" / "broken.jpg").write_bytes(b"garbage")
    (root / "README").write_text("no class")
    (root / ".cache").mkdir()
    (root / "empty").mkdir()
    return root


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A tiny WordNet in place of the installed one: synset -> id."""
    ids = write_wordnet(tmp_path / "nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    other = LazyCorpusLoader("omw-2.0", nltk.corpus.CorpusReader, r".*")
    loader = LazyCorpusLoader("wordnet", WordNetCorpusReader, other)
    monkeypatch.setattr(nltk.corpus, "wordnet", loader)
    return ids


def read_all(source, **options):
    return [pair for shard in source.shards() for pair in source.read(shard, **options)]


def test_files_of_classes(classes, monkeypatch):
    monkeypatch.setattr(source_sets, "_FOLDERS_SHARD", 2)
    source = pickle.loads(pickle.dumps(FolderSource(classes)))
    pairs = read_all(source)
    assert [(pair.key, pair.captions, pair.cause) for pair in pairs] == [
        ("README", (), rules.NO_CLASS),
        ("sorrel/1.JPEG", ("sorrel",), ""),
        ("sorrel/2.jpg", ("sorrel",), ""),
        ("sorrel/images/3.png", ("sorrel",), ""),
        ("sorrel/notes.txt", (), rules.NO_IMAGE_FILE),
        ("studio_couch/.hidden.jpg", (), rules.NO_IMAGE_FILE),
        ("studio_couch/1.jpg", ("studio couch",), ""),
        ("woman/1.webp", ("woman",), ""),
        ("woman/broken.jpg", ("woman",), ""),
    ]
    assert pairs[1].image == jpeg(len("1.JPEG"))
    assert all(pair.image is None for pair in read_all(source, images=False))
    assert [shard.name for shard in source.shards()] == [
        "empty to sorrel, 4 files",
        "studio_couch to studio_couch, 2 files",
        "woman to woman, 2 files",
    ]


def prepared(source, out, *more):
    assert not main([f"--source={source}", f"--out={out}", "--workers=0", *more])
    return ArrayRecordSource(out)


def test_prepared_classes_can_be_mixed_with_captions(classes, tmp_path, capsys):
    photographs = prepared(f"folders:{classes}", tmp_path / "a")
    said = capsys.readouterr().out
    assert "5 of 9 pairs kept" in said and rules.NO_IMAGE_FILE in said
    assert photographs.manifest.captions == CLASS_NAMES
    table = photographs.manifest.entities
    # A woman is a person in the published list already.
    assert table["sorrel"] == table["studio couch"] == [] and "woman" not in table
    assert len(photographs[0].captions) == 80 and photographs[0].captions.names == ("sorrel",)

    rows = "1.jpg,a cat\n1.jpg,a sorrel on the grass\n"
    (classes / "studio_couch" / "t.csv").write_text("image,caption\n" + rows)
    captions = prepared(f"files:{classes / 'studio_couch' / 't.csv'}", tmp_path / "b")
    assert captions.manifest.captions == TEXTS
    assert captions.captions() == [("a cat",)]
    config = ConfigDict(
        {
            "source": "mixture",
            "records": {"dir": ""},
            "scenes": {},
            "name_templates": ("{}!",),
            "mixture": (
                {"weight": 1, "records": {"dir": str(tmp_path / "b")}},
                {"weight": 2, "records": {"dir": str(tmp_path / "a")}},
            ),
        }
    )
    source, entities = make_source(config)
    assert [list(captions) for captions in source.captions()] == [
        ["a cat"],
        *[["sorrel!"]] * 3,
        ["studio couch!"],
        ["woman!"],
    ]
    assert entities.names[entities.find("one sorrel")[0]] == "sorrel"
    assert list(entities.table) == list(table)


def test_wider_words(wordnet, tmp_path):
    root = write_classes(
        tmp_path / "photos",
        Sorrel=[f"{wordnet['sorrel']}_1.jpg"],
        sorrel=["1.jpg"],
        horse=["2.jpg"],
        unheard_of=["1.jpg"],
        **{wordnet["sorrel"]: ["1.jpg"]},
    )
    source = FolderSource(root, hypernyms=True)
    names = dict(zip(source._classes, source._names, strict=True))
    assert names == {
        # By the id of a file; what lies at the top, or is too wide, or never said, is left out.
        "Sorrel": ("Sorrel", "horse"),
        # By the name: the first sense that is spelled like it and no person.
        "sorrel": ("sorrel",),
        "horse": ("horse",),
        "unheard_of": ("unheard of",),
        wordnet["sorrel"]: ("sorrel", "horse"),
    }
    records = prepared(f"folders:{root}", tmp_path / "out", "--hypernyms")
    assert {"Sorrel", "horse", "unheard of"} <= set(records.manifest.entities)
    assert "with hypernyms" in records.name
    with pytest.raises(UserError, match="WordNet id for its name; --hypernyms"):
        FolderSource(root)
    write_classes(root, wrong=["n99999999_1.jpg"])
    with pytest.raises(UserError, match="n99999999 is no WordNet 3.0 id"):
        FolderSource(root, hypernyms=True)


def test_wordnet_that_is_not_there(classes, tmp_path, wordnet, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=r"python -m nltk\.downloader wordnet"):
        open_source(f"folders:{classes}", hypernyms=True)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        FolderSource(tmp_path / "none")
    (tmp_path / "1.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="has no folders in it; it must have one for each class"):
        FolderSource(tmp_path)
    with pytest.raises(UserError, match="--hypernyms goes with --source=folders"):
        open_source("scenes:5", hypernyms=True)
