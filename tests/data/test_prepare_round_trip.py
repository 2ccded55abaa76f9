"""Scenes as img2dataset shards, prepared and trained from: the same batches as from scenes."""

from dataclasses import replace

import pytest
from pair_folders import write_img2dataset
from small_set import assert_same, load, read_batches

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.order import PairIndex
from ovseg_jax.data.records import ArrayRecordSource
from ovseg_jax.data.scenes import ScenesSource, scene_entity_table
from ovseg_jax.prepare import main

COUNT, PER_SHARD = 26, 7
ENTITIES = EntitySet(scene_entity_table())


@pytest.fixture(scope="module")
def direct():
    return ScenesSource("train", COUNT, 0, 32)


@pytest.fixture(scope="module")
def prepared(direct, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    records = [direct[index] for index in range(COUNT)]
    for shard in range(0, COUNT, PER_SHARD):
        pairs = [(r.key, r.captions[0], r.image) for r in records[shard : shard + PER_SHARD]]
        write_img2dataset(root / "in", shard // PER_SHARD, pairs, ["dead"], image_kind="png")
    command = [f"--source=img2dataset:{root / 'in'}", f"--out={root / 'out'}", "--workers=0"]
    assert main([*command, "--entities=scenes", "--keep_without_entities"]) == 0
    source = ArrayRecordSource(root / "out")
    found = [ENTITIES.find(record.captions[0]) for record in records]
    named = [replace(record, entities=ids) for record, ids in zip(records, found, strict=True)]
    assert [source[index] for index in range(COUNT)] == named
    assert len(source) == COUNT and len(source.manifest.shards) == 4
    return source


def test_batches_are_those_of_the_direct_source(direct, prepared, tokenizer):
    entities = EntitySet(prepared.manifest.entities)
    found = read_batches(prepared, tokenizer, entities, first_step=2)
    assert_same(found, read_batches(direct, tokenizer, ENTITIES, first_step=2))
    assert len(found) == 5 and all(0 < batch["pair_weight"].sum() <= 8 for batch in found)


def test_stored_index_is_used_and_only_for_its_entities(prepared, tokenizer, monkeypatch):
    def no_building(lists):
        raise AssertionError("an index is built")

    monkeypatch.setattr(PairIndex, "build", no_building)
    assert next(iter(load(prepared, tokenizer, ENTITIES)))["pair_weight"].any()
    # The same entities with other ids.
    reordered = EntitySet(dict(reversed(ENTITIES.table.items())))
    with pytest.raises(AssertionError, match="an index is built"):
        load(prepared, tokenizer, reordered)
