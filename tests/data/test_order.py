"""The order of records and the randomness of examples are pure functions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg_jax.data.order import example_rng, record_index
from ovseg_jax.errors import UserError


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 2))
def test_every_epoch_is_a_permutation(n_records, seed, epoch):
    start = n_records * epoch
    found = [record_index(seed, n_records, start + i) for i in range(n_records)]
    assert {at for at, _ in found} == {epoch}
    assert sorted(index for _, index in found) == list(range(n_records))


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return [record_index(seed, 50, number * 50 + i)[1] for i in range(50)]

    orders = [tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)]
    assert len(set(orders)) == 4


def test_order_is_this_one_on_every_machine_and_version():
    """A changed order would silently break resuming: change the values only on purpose."""
    assert [record_index(0, 10, position)[1] for position in range(20)] == GOLDEN


GOLDEN = [9, 8, 3, 4, 2, 0, 5, 7, 6, 1, 5, 8, 7, 2, 6, 0, 4, 1, 3, 9]


def test_empty_data_set_is_a_user_error():
    with pytest.raises(UserError, match="no records"):
        record_index(0, 0, 0)


def test_example_rng_depends_on_seed_epoch_and_key_alone():
    def draw(*arguments):
        return example_rng(*arguments).integers(2**62)

    assert draw(1, 2, "k") == draw(1, 2, "k")
    different = {draw(1, 2, "k"), draw(1, 2, "l"), draw(1, 3, "k"), draw(2, 2, "k")}
    assert len(different) == 4
    assert draw(1, 2, "\udc80") == draw(1, 2, "\udc80"), "keys need not be valid Unicode"
    np.random.seed(0)
    assert draw(1, 2, "k") == draw(1, 2, "k"), "global state plays no part"
