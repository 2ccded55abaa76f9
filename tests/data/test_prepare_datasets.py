"""TFDS sets with captions, and how sources are named on the command line."""

import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pair_folders import jpeg

from ovseg_jax.data.prepare import source_sets
from ovseg_jax.data.prepare.source_sets import ScenePairs, TfdsSource
from ovseg_jax.data.scenes import ScenesSource
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import open_source

# TFDS with the protobuf that Apache Beam holds it to.
pytestmark = pytest.mark.filterwarnings("ignore:label.* is deprecated:DeprecationWarning")

FEATURES = {
    "one": {"image": tfds.features.Image(), "caption": tfds.features.Text()},
    "several": {
        "picture": {"image": tfds.features.Image()},
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        "image/id": np.int64,
    },
    "no_caption": {"image": tfds.features.Image(), "label": np.int64},
    "no_image": {"caption": tfds.features.Text()},
}


def _example(kind, index):
    texts = [f"a dog {index}", f"two cats {index}"]
    return {
        "one": {"image": jpeg(index), "caption": texts[0]},
        "several": {
            "picture": {"image": jpeg(index)},
            "captions": [{"id": n, "text": text} for n, text in enumerate(texts)],
            "image/id": 100 + index,
        },
        "no_caption": {"image": jpeg(index), "label": 1},
        "no_image": {"caption": texts[0]},
    }[kind]


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
def prepared(tmp_path_factory):
    folders = {}
    root = tmp_path_factory.mktemp("tfds")
    for name in FEATURES:
        builder = TinyCaptions(config=name, data_dir=root, file_format="array_record")
        builder.download_and_prepare()
        folders[name] = str(builder.data_path)
    return folders


def read_all(source, **options):
    return [pair for shard in source.shards() for pair in source.read(shard, **options)]


def test_one_caption_an_image(prepared, monkeypatch):
    monkeypatch.setattr(source_sets, "_TFDS_SHARD", 2)
    source = pickle.loads(pickle.dumps(TfdsSource(prepared["one"])))
    pairs = read_all(source)
    assert [shard.start for shard in source.shards()] == [0, 2, 4]
    assert [pair.key for pair in pairs] == [f"train-{index:08d}" for index in range(5)]
    # TFDS shuffles; image and caption stay together.
    order = [int(pair.captions[0].split()[-1]) for pair in pairs]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert [pair.image for pair in pairs] == [jpeg(index) for index in order]
    assert [pair.image for pair in read_all(source, images=False)] == [None] * 5
    assert "tensorflow" not in sys.modules


def test_several_captions_an_image(prepared):
    pairs = read_all(TfdsSource(f"{prepared['several']},split=val"))
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
def test_sets_that_cannot_be_used(prepared, text, message):
    with pytest.raises(UserError, match=message):
        TfdsSource(text.format(**prepared))


def test_scenes_are_those_of_the_direct_source():
    source = ScenePairs("5,size=32,seed=3")
    direct = ScenesSource("train", 5, 3, 32)
    pairs = read_all(source)
    assert [(p.key, p.captions, p.image) for p in pairs] == [
        (record.key, record.captions, record.image) for record in map(direct.__getitem__, range(5))
    ]


@pytest.mark.parametrize(
    ("spec", "images", "message"),
    [
        ("webdataset:x", None, "none of: img2dataset:DIR"),
        ("img2dataset", None, "none of"),
        ("files:", None, "none of"),
        ("scenes:many", None, "not of the form scenes:1000"),
        ("scenes:5,width=3", None, "not of the form scenes:1000"),
        ("scenes:0", None, "count >= 1"),
        ("scenes:5", "x", "--images goes with"),
    ],
)
def test_specs_that_are_none(spec, images, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, images)
