"""The learning rate against the reference, and how a run's schedule is read from a config."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from reference.optimizer import rate_at

from ovseg_jax.errors import UserError
from ovseg_jax.optim.optimizer import learning_rate, warmup_cosine

PLAIN = {"start": None, "cosine_from": "warmup_end", "delay": 0}


@pytest.mark.parametrize(("warmup", "end"), [(4, 0.0), (1, 0.01), (10, 0.1), (0, 0.0)])
def test_warmup_and_cosine(warmup, end):
    schedule = {"peak": 0.5, "warmup": warmup, "total": 20, "end": end}
    steps = np.arange(26)
    got = jax.vmap(lambda step: warmup_cosine(step, **schedule))(jnp.asarray(steps))
    want = [rate_at(step, **schedule) for step in steps]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert np.max(got) == np.float32(0.5)


@given(st.integers(0, 200), st.integers(0, 50), st.integers(1, 100), st.floats(0, 0.5))
def test_the_rate_stays_between_zero_and_the_peak(step, warmup, total, end):
    rate = warmup_cosine(jnp.int32(step), peak=0.5, warmup=warmup, total=total, end=end)
    assert 0 <= rate <= np.float32(0.5) * (1 + 1e-6)


def test_a_schedule_starts_at_its_first_step_and_warms_up_over_a_share():
    config = ConfigDict({"peak": 1.0, "warmup": 0.25, "end": 0.0, **PLAIN})
    rates = [learning_rate(jnp.int32(100 + s), config, first=100, total=40) for s in range(41)]
    want = [rate_at(s, peak=1.0, warmup=10, total=40, end=0.0) for s in range(41)]
    np.testing.assert_allclose(rates, want, atol=1e-6)
    config.warmup = 10
    assert learning_rate(jnp.int32(104), config, first=100, total=40) == rates[4]
    assert rates[0].dtype == jnp.float32 and not rates[0].weak_type


# ---- the released training's schedule

RATES = json.loads((Path(__file__).parents[1] / "released" / "lr_schedule.json").read_text())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_rate_of_every_released_step(stage):
    told = RATES[stage]
    rates, scaled = told["lr_used_at_step"], told["scaled"]
    config = ConfigDict(
        {
            "peak": scaled["base_lr"],
            "start": scaled["warmup_lr"],
            "end": scaled["min_lr"],
            "warmup": told["warmup_epochs"] * told["n_iter_per_epoch"],
            "cosine_from": "first_step",
            "delay": 1,
        }
    )
    steps = jnp.arange(len(rates))
    got = jax.vmap(lambda step: learning_rate(step, config, first=0, total=len(rates)))(steps)
    np.testing.assert_allclose(got, rates, rtol=2e-6)


def test_a_delayed_schedule_holds_its_first_rate_where_it_starts():
    fields = {"peak": 1.0, "warmup": 4, "end": 0.0, "start": 0.2, "cosine_from": "warmup_end"}
    config = ConfigDict({**fields, "delay": 2})
    rates = [float(learning_rate(jnp.int32(50 + s), config, first=50, total=9)) for s in range(8)]
    np.testing.assert_allclose(rates[:7], [0.2, 0.2, 0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert rates[7] < 1


def test_unknown_origin_of_the_cosine():
    with pytest.raises(UserError, match="cosine_from is 'step'.*'warmup_end', 'first_step'"):
        warmup_cosine(jnp.int32(0), peak=1.0, warmup=1, total=2, end=0.0, cosine_from="step")
