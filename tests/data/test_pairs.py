"""Partners: never oneself, always a shared entity, uniform."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ovseg_jax.data.order import PairIndex
from ovseg_jax.errors import UserError

ENTITY_LISTS = st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=20)


@settings(deadline=None)
@given(ENTITY_LISTS, st.integers(0, 2**32))
def test_partner_shares_the_entity_and_is_another_record(lists, seed):
    index = PairIndex.build(lists)
    for record, entities in enumerate(lists):
        partner, shared = index.partner(np.random.default_rng(seed), record, entities)
        possible = [
            entity
            for entity in entities
            if any(entity in other for at, other in enumerate(lists) if at != record)
        ]
        if not possible:
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


def test_record_outside_the_index_may_draw_any_member():
    index = PairIndex.build([[0], [0]])
    rng = np.random.default_rng(0)
    assert {index.partner(rng, 99, [0])[0] for _ in range(50)} == {0, 1}


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


def test_negative_entity_is_a_user_error():
    with pytest.raises(UserError, match="record 1"):
        PairIndex.build([[0], [-1]])
