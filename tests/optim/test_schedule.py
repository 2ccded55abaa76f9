"""The learning rate against the reference, and how a run's schedule is read from a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from reference.optimizer import rate_at

from ovseg_jax.optim.schedule import learning_rate, warmup_cosine


@pytest.mark.parametrize(("warmup", "end"), [(4, 0.0), (1, 0.01), (10, 0.1)])
def test_warmup_and_cosine(warmup, end):
    schedule = {"peak": 0.5, "warmup": warmup, "total": 20, "end": end}
    steps = np.arange(26)
    got = jax.vmap(lambda step: warmup_cosine(step, **schedule))(jnp.asarray(steps))
    want = [rate_at(step, **schedule) for step in steps]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert np.max(got) == np.float32(0.5)


def test_no_warmup_starts_at_the_peak():
    rate = warmup_cosine(jnp.int32(0), peak=0.5, warmup=0, total=10, end=0.0)
    np.testing.assert_allclose(rate, 0.5)


@given(st.integers(0, 200), st.integers(0, 50), st.integers(1, 100), st.floats(0, 0.5))
def test_the_rate_stays_between_zero_and_the_peak(step, warmup, total, end):
    rate = warmup_cosine(jnp.int32(step), peak=0.5, warmup=warmup, total=total, end=end)
    assert 0 <= rate <= np.float32(0.5) * (1 + 1e-6)


def test_a_schedule_starts_at_its_first_step_and_warms_up_over_a_share():
    config = ConfigDict({"peak": 1.0, "warmup": 0.25, "end": 0.0})
    rates = [learning_rate(jnp.int32(100 + s), config, first=100, total=40) for s in range(41)]
    want = [rate_at(s, peak=1.0, warmup=10, total=40, end=0.0) for s in range(41)]
    np.testing.assert_allclose(rates, want, atol=1e-6)
    config.warmup = 10
    assert learning_rate(jnp.int32(104), config, first=100, total=40) == rates[4]
    assert rates[0].dtype == jnp.float32 and not rates[0].weak_type
