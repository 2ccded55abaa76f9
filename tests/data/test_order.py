"""The order of records and mixtures, partners, and the randomness of examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource
from ml_collections import ConfigDict
from pair_folders import encoded
from PIL import Image
from scipy import stats
from small_set import ENTITIES, NAMES, assert_same, joined, read_batches

from ovseg_jax.data.order import PairIndex, example_rng, record_index
from ovseg_jax.data.records import ArrayRecordSource, Record
from ovseg_jax.data.scenes import ScenesSource
from ovseg_jax.data.sources import Mixture, interleaved, make_source, missing_data
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import main as prepare

SPEC = {"text_length": 8, "transform": {"kind": "crop", "size": 8}}
SIZES = (5, 11, 2)
weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def records(count, shade):
    image = encoded(Image.new("RGB", (8, 8), (shade,) * 3))
    found = [Record(image, (f"a {NAMES[i % 3]}",), f"k{i}") for i in range(count)]
    return MemorySource(found, f"{shade}")


@pytest.fixture(scope="module")
def mixture():
    return Mixture([records(n, 60 * (p + 1)) for p, n in enumerate(SIZES)], [2, 5.0, 1])


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 2))
def test_every_epoch_is_a_permutation(n_records, seed, epoch):
    start = n_records * epoch
    found = [record_index(seed, n_records, start + i) for i in range(n_records)]
    assert {at for at, _ in found} == {epoch}
    assert sorted(index for _, index in found) == list(range(n_records))
    with pytest.raises(UserError, match="no records"):
        record_index(seed, 0, start)


def test_order_is_this_one_on_every_machine_and_version():
    """A changed order would silently break resuming: change the values only on purpose."""
    golden = [9, 8, 3, 4, 2, 0, 5, 7, 6, 1, 5, 8, 7, 2, 6, 0, 4, 1, 3, 9]
    assert [record_index(0, 10, position)[1] for position in range(20)] == golden
    assert [record_index(1, 10, position)[1] for position in range(10)] != golden[:10]


def test_example_rng_depends_on_seed_epoch_and_key_alone():
    def draw(*arguments):
        return example_rng(*arguments).integers(2**62)

    assert draw(1, 2, "k") == draw(1, 2, "k")
    different = {draw(1, 2, "k"), draw(1, 2, "l"), draw(1, 3, "k"), draw(2, 2, "k")}
    assert len(different) == 4
    assert draw(1, 2, "\udc80") == draw(1, 2, "\udc80"), "keys need not be valid Unicode"
    np.random.seed(0)
    assert draw(1, 2, "k") == draw(1, 2, "k"), "global state plays no part"


# ---- mixtures


@given(weights, st.integers(0, 2**45), st.integers(1, 200))
def test_every_stretch_has_its_shares(weights, first, length):
    mixed = Mixture([records(2, 0)] * len(weights), weights)
    parts = [interleaved(first + i, mixed._cuts)[0] for i in range(length)]
    for part, share in enumerate(mixed.weights):
        # The rounding of one part shifts the positions of those behind it.
        assert abs(parts.count(part) - share * length) < len(weights) + 1
    assert sum(mixed.weights) == pytest.approx(1)


@settings(max_examples=8)
@given(st.integers(0, 2**40), st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_every_data_set_has_epochs_of_its_own(seed, weights):
    mixed = Mixture([records(n, 0) for n in SIZES], weights)
    seen = [{}, {}, {}]
    for position in range(60):
        epoch, index = mixed.record_at(seed, position)
        part = mixed.part_of(index)
        inside = index - mixed.starts[part]
        seen[part].setdefault(epoch, []).append(inside)
    for size, epochs in zip(SIZES, seen, strict=True):
        assert list(epochs) == list(range(len(epochs)))
        for epoch, found in epochs.items():
            assert len(set(found)) == len(found)
            assert len(found) == size or epoch == len(epochs) - 1


def test_records_of_a_mixture(mixture):
    assert len(mixture) == 18 and mixture.weights == (0.25, 0.625, 0.125)
    assert [mixture[i].key for i in range(18)] == mixture.keys()
    assert [mixture[i].captions for i in range(18)] == mixture.captions()
    assert len(set(mixture.keys())) == 18 and mixture.keys()[5] == "1/k0"
    assert mixture.part_of(15) == 1 and mixture.part_of(16) == 2
    with pytest.raises(IndexError):
        mixture[18]
    sample = Mixture([records(100, 0), records(100, 1)], [1, 3]).caption_sample(20)
    assert 20 <= len(sample) <= 24
    other = Mixture(mixture.parts, [1, 1, 1])
    assert other.fingerprint() == mixture.fingerprint()
    assert Mixture(mixture.parts[::-1], [1, 1, 1]).fingerprint() != mixture.fingerprint()


def read(source, tokenizer, entities=ENTITIES, **changes):
    settings = {"seed": 3, "last_step": 6, "threads": 0}
    return read_batches(source, tokenizer, entities, SPEC, **settings | changes)


def test_any_split_and_any_start_give_the_same_batches(mixture, tokenizer):
    whole = read(mixture, tokenizer)
    assert_same(read(mixture, tokenizer, first_step=4), whole[4:])
    slots = [[0, 5, 2], [1, 3, 4, 6, 7]]
    parts = [read(mixture, tokenizer, slots=some) for some in slots]
    assert_same(joined(parts, slots), whole)


def test_batches_are_mixed_and_partners_stay_in_their_data_set(mixture, tokenizer):
    pairs = np.zeros(3)
    for batch in read(mixture, tokenizer, last_step=30):
        part = np.array([mixture.part_of(int(index)) for index in batch["record"]])
        assert np.abs(np.bincount(part, minlength=3) - [2, 5, 1]).max() <= 1
        shades = 60 * (part + 1)
        assert (batch["image"] == shades[:, None, None, None]).all()
        paired = batch["pair_weight"] > 0
        assert (batch["image2"][paired] == shades[paired][:, None, None, None]).all()
        pairs += np.bincount(part[paired], minlength=3)
    # The two records of the last part name different things.
    assert pairs[0] and pairs[1] and not pairs[2]


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([records(0, 0)], [1], "no records"),
        *(([records(2, 0)], [bad], "number above 0") for bad in (0, -1, np.nan, np.inf, True)),
    ],
)
def test_mixtures_that_cannot_be(parts, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(parts, weights)


# ---- from a config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    for name, count, entities in (("a", 12, "scenes"), ("b", 7, "scenes"), ("c", 6, "published")):
        where = [f"--source=scenes:{count},size=32", f"--out={root / name}", "--workers=0"]
        assert not prepare([*where, f"--entities={entities}", "--keep_without_entities"])
    return root


def data_config(*mixture):
    scenes = {"split": "train", "count": 9, "seed": 0, "size": 32}
    config = {"source": "mixture", "records": {"dir": ""}, "scenes": scenes}
    return ConfigDict({**config, "mixture": mixture})


def test_mixture_of_a_config_maps_the_stored_indices(folders, tokenizer, monkeypatch):
    config = data_config(
        {"weight": 3, "records": {"dir": str(folders / "a")}},
        {"weight": 1, "records": {"dir": str(folders / "b")}},
    )
    assert missing_data(config) == []
    source, entities = make_source(config)
    assert [type(part) for part in source.parts] == [ArrayRecordSource] * 2
    assert source.weights == (0.75, 0.25) and len(source) == 19

    def no_building(lists):
        raise AssertionError("an index is built")

    monkeypatch.setattr(PairIndex, "build", no_building)
    batches = read(source, tokenizer, entities, last_step=2)
    assert all(batch["weight"].all() and batch["pair_weight"].any() for batch in batches)
    assert_same(read(source, tokenizer, entities, last_step=2, workers=2), batches)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([], "config.data.mixture is empty"),
        ([{"weight": 1}], r"mixture\[0\] needs a weight and one of scenes, records"),
        ([{"scenes": {}}], "needs a weight"),
        ([{"weight": 1, "scenes": {}, "records": {"dir": "x"}}], "one of"),
        ([{"weigth": 1, "scenes": {}}], "did you mean 'weight'"),
        ([{"weight": 1, "scenes": {"cuont": 1}}], r"scenes\.cuont is no field; did you mean"),
        (["data/a"], "is 'data/a'; it needs a weight and one of"),
        ([{"weight": 1, "records": "data/a"}], "is 'data/a', but has fields of its own"),
        ([{"weight": 0, "scenes": {}}], "number above 0"),
        ([{"weight": "1", "scenes": {}}], "number above 0"),
    ],
)
def test_configs_that_are_wrong(mixture, message):
    with pytest.raises(UserError, match=message):
        make_source(data_config(*mixture))


def test_records_of_different_entities_have_those_of_both(folders, tokenizer):
    """Stored indices have the ids of their own folder: the partners are found in the captions."""
    parts = [{"weight": 1, "records": {"dir": str(folders / name)}} for name in "ac"]
    source, entities = make_source(data_config(*parts))
    tables = [part.manifest.entities for part in source.parts]
    assert list(entities.table)[: len(tables[0])] == list(tables[0])
    assert all(entities.is_form(name) for table in tables for name in table)
    batches = read(source, tokenizer, entities, last_step=2)
    assert all(batch["pair_weight"].any() for batch in batches)


def test_scenes_in_a_mixture_have_the_entities_of_the_records(folders):
    stored = {"weight": 1, "records": {"dir": str(folders / "c")}}
    source, entities = make_source(data_config({"weight": 1, "scenes": {"count": 4}}, stored))
    assert isinstance(source.parts[0], ScenesSource) and source.parts[0].count == 4
    assert list(entities.table) == list(source.parts[1].manifest.entities)


def test_missing_folders_are_all_named(folders):
    parts = [{"weight": 1, "records": {"dir": name}} for name in ("x", str(folders / "a"), "y")]
    lines = missing_data(data_config(*parts))
    assert ["mixture[0]" in lines[0], "mixture[2]" in lines[1], len(lines)] == [True, True, 2]


# ---- partners: never oneself, always a shared entity, uniform

ENTITY_LISTS = st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=20)


@settings(deadline=None)
@given(ENTITY_LISTS, st.integers(0, 2**32))
def test_partner_shares_the_entity_and_is_another_record(lists, seed):
    index = PairIndex.build(lists)
    for record, entities in enumerate(lists):
        partner, shared = index.partner(np.random.default_rng(seed), record, entities)
        others = [ids for at, ids in enumerate(lists) if at != record]
        if not any(entity in ids for entity in entities for ids in others):
            assert (partner, shared) == (None, None)
            continue
        assert partner != record
        assert shared in entities
        assert shared in lists[partner]


@settings(deadline=None)
@given(ENTITY_LISTS)
def test_index_holds_each_mention_once_in_order(lists):
    index = PairIndex.build(lists)
    for entity in range(8):
        expected = [record for record, ids in enumerate(lists) if entity in ids]
        assert index.members(entity).tolist() == expected


def test_entity_first_then_record_uniformly():
    # Entity 0 has three other records, entity 1 has one: 1/6, 1/6, 1/6 and 1/2.
    index = PairIndex.build([[0, 1, 2], [0], [0], [0], [1]])
    rng = np.random.default_rng(0)
    draws = [index.partner(rng, 0, (0, 1, 2)) for _ in range(6000)]
    partners = np.bincount([partner for partner, _ in draws], minlength=5)
    assert partners[0] == 0
    expected = np.array([1 / 6, 1 / 6, 1 / 6, 1 / 2]) * len(draws)
    assert stats.chisquare(partners[1:], expected).pvalue > 1e-3
    assert {shared for _, shared in draws} == {0, 1}, "entity 2 has no other record"


@pytest.mark.parametrize("record", [0, 5, 9])
def test_uniform_wherever_the_record_stands(record):
    index = PairIndex.build([[0]] * 10)
    rng = np.random.default_rng(record)
    drawn = [index.partner(rng, record, [0])[0] for _ in range(4500)]
    counts = np.delete(np.bincount(drawn, minlength=10), record)
    assert counts.sum() == 4500
    assert stats.chisquare(counts).pvalue > 1e-3
