"""Scenes as img2dataset shards, prepared and trained from: the same batches as from scenes."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from pair_folders import write_img2dataset

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.loader import make_loader
from ovseg_jax.data.order import PairIndex
from ovseg_jax.data.records import ArrayRecordSource
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.data.sources import make_source
from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.prepare import main

COUNT, PER_SHARD = 26, 7
SPEC = {
    "text_length": 12,
    "transform": {"kind": "crop", "size": 16, "scale": (0.4, 1.0)},
    "nouns": 2,
}
STEPS = {"batch_size": 8, "seed": 5, "first_step": 2, "last_step": 8, "with_pairs": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "and", "photo", "of", "the", "dog"]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def direct():
    return ScenesSource("train", COUNT, 0, 32, EntitySet(scene_entity_table()))


@pytest.fixture(scope="module")
def prepared(direct, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    records = [direct[index] for index in range(COUNT)]
    for shard in range(0, COUNT, PER_SHARD):
        pairs = [(r.key, r.captions[0], r.image) for r in records[shard : shard + PER_SHARD]]
        write_img2dataset(root / "in", shard // PER_SHARD, pairs, ["dead"], image_kind="png")
    code = main(
        [
            f"--source=img2dataset:{root / 'in'}", f"--out={root / 'out'}", "--entities=scenes",
            "--keep_without_entities", "--workers=0",
        ]
    )  # fmt: skip
    assert code == 0
    return root / "out"


def test_records_are_those_of_the_direct_source(direct, prepared):
    source = ArrayRecordSource(prepared)
    assert [source[index] for index in range(len(source))] == [
        direct[index] for index in range(COUNT)
    ]
    assert len(source.manifest.shards) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_direct_source(direct, prepared, tokenizer, workers):
    config = ConfigDict({"source": "records", "records": {"dir": str(prepared)}})
    source, entities = make_source(config)
    expected = make_loader(direct, EntitySet(scene_entity_table()), tokenizer, SPEC, **STEPS)
    found = make_loader(source, entities, tokenizer, SPEC, workers=workers, **STEPS)
    count = 0
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        assert 0 < one["pair_weight"].sum() <= 8
        count += 1
    assert count == 6


def test_stored_index_is_used_and_only_for_its_entities(prepared, tokenizer, monkeypatch):
    source = ArrayRecordSource(prepared)
    table = scene_entity_table()

    def no_building(lists):
        raise AssertionError("an index is built")

    monkeypatch.setattr(PairIndex, "build", no_building)
    loader = make_loader(source, EntitySet(table), tokenizer, SPEC, **STEPS)
    assert next(iter(loader))["pair_weight"].any()
    # The same entities with other ids.
    reordered = EntitySet(dict(reversed(table.items())))
    with pytest.raises(AssertionError, match="an index is built"):
        make_loader(source, reordered, tokenizer, SPEC, **STEPS)
