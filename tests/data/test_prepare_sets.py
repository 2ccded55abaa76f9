"""Photographs in class-named folders, wider words for them, TFDS sets with captions, scenes."""

import pickle
import sys

import nltk
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from pair_folders import jpeg, read_all

from ovseg_jax.data.prepare import rules, source_sets
from ovseg_jax.data.prepare.source_sets import FolderSource, ScenePairs, TfdsSource
from ovseg_jax.data.records import CLASS_NAMES, ArrayRecordSource
from ovseg_jax.data.scenes import ScenesSource
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
    (root / "woman" / ".kept").mkdir()
    (root / "woman" / "itself").symlink_to(root / "woman")
    (root / "empty").mkdir()
    return root


def test_files_of_classes(classes, monkeypatch):
    monkeypatch.setattr(source_sets, "_FOLDERS_SHARD", 2)
    source = pickle.loads(pickle.dumps(FolderSource(classes)))
    pairs = read_all(source)
    assert [(pair.key, pair.captions, pair.cause) for pair in pairs] == [
        (".cache", (), rules.NO_CLASS),
        ("README", (), rules.NO_CLASS),
        ("sorrel/1.JPEG", ("sorrel",), ""),
        ("sorrel/2.jpg", ("sorrel",), ""),
        ("sorrel/images/3.png", ("sorrel",), ""),
        ("sorrel/notes.txt", (), rules.NO_IMAGE_FILE),
        ("studio_couch/.hidden.jpg", (), rules.NO_IMAGE_FILE),
        ("studio_couch/1.jpg", ("studio couch",), ""),
        ("woman/.kept", (), rules.NO_IMAGE_FILE),
        ("woman/1.webp", ("woman",), ""),
        ("woman/broken.jpg", ("woman",), ""),
        ("woman/itself", (), rules.NO_IMAGE_FILE),
    ]
    assert pairs[2].image == jpeg(len("1.JPEG"))
    assert all(pair.image is None for pair in read_all(source, images=False))
    assert [shard.name for shard in source.shards()] == [
        "empty to sorrel, 4 files",
        "studio_couch to studio_couch, 2 files",
        "woman to woman, 4 files",
    ]


def prepared(source, out, *more):
    assert not main([f"--source={source}", f"--out={out}", "--workers=0", *more])
    return ArrayRecordSource(out)


def test_prepared_classes_can_be_mixed_with_captions(classes, tmp_path, capsys):
    photographs = prepared(f"folders:{classes}", tmp_path / "a")
    said = capsys.readouterr().out
    assert "5 of 12 pairs kept" in said and rules.NO_IMAGE_FILE in said
    assert photographs.manifest.captions == CLASS_NAMES
    table = photographs.manifest.entities
    # A woman is a person in the published list already.
    assert table["sorrel"] == table["studio couch"] == [] and "woman" not in table
    assert len(photographs[0].captions) == 80 and photographs[0].captions.names == ("sorrel",)

    rows = "1.jpg,a cat\n1.jpg,a sorrel on the grass\n"
    (classes / "studio_couch" / "t.csv").write_text("image,caption\n" + rows)
    captions = prepared(f"files:{classes / 'studio_couch' / 't.csv'}", tmp_path / "b")
    assert captions.manifest.captions == "texts"
    assert captions.captions() == [("a cat",)]
    sets = [{"weight": 1, "records": {"dir": str(tmp_path / name)}} for name in "ba"]
    config = {"source": "mixture", "mixture": sets, "records": {"dir": ""}, "scenes": {}}
    source, entities = make_source(ConfigDict({**config, "name_templates": ("{}!",)}))
    names = ["sorrel!"] * 3 + ["studio couch!", "woman!"]
    assert [list(captions) for captions in source.captions()] == [["a cat"], *([n] for n in names)]
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
    with pytest.raises(UserError, match="WordNet id for its name: give --hypernyms"):
        FolderSource(root)
    write_classes(root, wrong=["n99999999_1.jpg"])
    with pytest.raises(UserError, match="n99999999 is no WordNet 3.0 id"):
        FolderSource(root, hypernyms=True)


def test_folders_that_cannot_be_used(tmp_path, wordnet, monkeypatch):
    with pytest.raises(UserError, match="there is no folder"):
        FolderSource(tmp_path / "none")
    root = tmp_path / "photos"
    root.mkdir()
    (root / "1.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="has no folders in it; it needs one for each class"):
        FolderSource(root)
    with pytest.raises(UserError, match="--hypernyms goes with --source=folders"):
        open_source("scenes:5", hypernyms=True)
    (root / "dog").mkdir()
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=r"python -m nltk\.downloader wordnet"):
        open_source(f"folders:{root}", hypernyms=True)


# ---- TFDS and scenes

# TFDS with the protobuf that Apache Beam holds it to.
pytestmark = pytest.mark.filterwarnings("ignore:label.* is deprecated:DeprecationWarning")

IMAGE, TEXT = tfds.features.Image(), tfds.features.Text()
TEXTS = tfds.features.Sequence({"id": np.int64, "text": TEXT})
FEATURES = {
    "one": {"image": IMAGE, "caption": TEXT},
    "several": {"picture": {"image": IMAGE}, "captions": TEXTS, "image/id": np.int64},
    "no_caption": {"image": IMAGE, "label": np.int64},
    "no_image": {"caption": TEXT},
}


def _example(kind, index):
    first, second = {"id": 0, "text": f"a dog {index}"}, {"id": 1, "text": f"two cats {index}"}
    values = {"image": jpeg(index), "picture": {"image": jpeg(index)}, "caption": first["text"]}
    values |= {"captions": [first, second], "image/id": 100 + index, "label": 1}
    return {name: values[name] for name in FEATURES[kind]}


class TinyCaptions(tfds.core.GeneratorBasedBuilder):
    """Five images with captions."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in FEATURES]

    def _info(self):
        features = tfds.features.FeaturesDict(FEATURES[self.builder_config.name])
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "val": self._generate_examples()}

    def _generate_examples(self):
        for index in range(5):
            yield index, _example(self.builder_config.name, index)


@pytest.fixture(scope="module")
def tfds_sets(tmp_path_factory):
    folders = {}
    root = tmp_path_factory.mktemp("tfds")
    for name in FEATURES:
        builder = TinyCaptions(config=name, data_dir=root, file_format="array_record")
        builder.download_and_prepare()
        folders[name] = str(builder.data_path)
    return folders


def test_one_caption_an_image(tfds_sets, monkeypatch):
    monkeypatch.setattr(source_sets, "_TFDS_SHARD", 2)
    source = pickle.loads(pickle.dumps(TfdsSource(tfds_sets["one"])))
    pairs = read_all(source)
    assert [shard.start for shard in source.shards()] == [0, 2, 4]
    assert [pair.key for pair in pairs] == [f"train-{index:08d}" for index in range(5)]
    # TFDS shuffles; image and caption stay together.
    order = [int(pair.captions[0].split()[-1]) for pair in pairs]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert [pair.image for pair in pairs] == [jpeg(index) for index in order]
    assert [pair.image for pair in read_all(source, images=False)] == [None] * 5
    assert "tensorflow" not in sys.modules


def test_several_captions_an_image(tfds_sets):
    pairs = read_all(TfdsSource(f"{tfds_sets['several']},split=val"))
    found = {pair.key: (pair.captions, pair.image) for pair in pairs}
    assert found == {
        str(100 + n): ((f"a dog {n}".encode(), f"two cats {n}".encode()), jpeg(n)) for n in range(5)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{no_caption}", "has no caption among its features: image, label"),
        ("{no_image}", "has no image among its features: caption"),
        ("{one},split=test", "no split 'test'; it has train, val"),
        ("{one},part=1", "not of the form tfds:NAME,split=train"),
        ("no_such_set_anywhere", "TFDS does not find the set"),
    ],
)
def test_sets_that_cannot_be_used(tfds_sets, text, message):
    with pytest.raises(UserError, match=message):
        TfdsSource(text.format(**tfds_sets))


def test_scenes_are_those_of_the_direct_source():
    source = ScenePairs("5,size=32,seed=3")
    direct = ScenesSource("train", 5, 3, 32)
    pairs = read_all(source)
    assert [(p.key, p.captions, p.image) for p in pairs] == [
        (record.key, record.captions, record.image) for record in map(direct.__getitem__, range(5))
    ]


def test_specs_that_are_none():
    wrong = {"webdataset:x": "none of: img2dataset:DIR", "img2dataset": "none of"}
    wrong |= {"files:": "none of", "scenes:many": "not of the form scenes:1000"}
    wrong |= {"scenes:5,width=3": "not of the form scenes:1000", "scenes:0": "count >= 1"}
    for spec, message in wrong.items():
        with pytest.raises(UserError, match=message):
            open_source(spec)
    with pytest.raises(UserError, match="--images goes with"):
        open_source("scenes:5", "x")
