"""The optimizer chain against NumPy's AdamW: clipping, rules, teacher; and the learning rate."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from reference.optimizer import AdamW, clipped, rate_at

from ovseg_jax.errors import UserError
from ovseg_jax.optim import groups
from ovseg_jax.optim.ema_teacher import ema_teacher, find_teacher
from ovseg_jax.optim.optimizer import learning_rate, make_optimizer, warmup_cosine

SHAPES = {
    "image_encoder/layer/kernel": (3, 2),
    "image_encoder/layer/bias": (2,),
    "image_encoder/token": (2, 2),
    "text_encoder/word": (4, 2),
}
RATES = [0.1, 0.02, 0.5]
DECAYS = {path: 0.0 if path.endswith(("bias", "token")) else 0.5 for path in SHAPES}
FACTORS = {path: 0.25 if path.startswith("text") else 1.0 for path in SHAPES}


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {p: (scale * rng.normal(size=s)).astype(np.float32) for p, s in SHAPES.items()}


def config(**changes):
    return ConfigDict(
        {
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-8,
            "clip_norm": 1.0,
            "weight_decay": 0.5,
            "decay_rules": [("bias|token$", 0.0), (".*", 1.0)],
            "rate_rules": [("^text_encoder/", 0.25), (".*", 1.0)],
            "ema_decay": 0.9,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def trajectory():
    """Parameters and teachers over three steps, with gradients above and below the clip norm."""
    params = groups.nest({path: jnp.asarray(x) for path, x in draw(0).items()})
    tx = make_optimizer(config(), params)
    state, history = tx.init(params), []

    @jax.jit
    def step(params, state, grads, rate):
        updates, state = tx.update(grads, state, params, rate=rate)
        return optax.apply_updates(params, updates), state

    for index, rate in enumerate(RATES):
        grads = groups.nest(draw(index + 1, scale=[3.0, 0.01, 1.0][index]))
        params, state = step(params, state, grads, jnp.float32(rate))
        history.append((groups.flatten(params), groups.flatten(find_teacher(state))))
    return history


def test_three_steps_of_adamw(trajectory):
    reference, want = AdamW(0.9, 0.99, 1e-8), draw(0)
    for index, rate in enumerate(RATES):
        grads = clipped(draw(index + 1, scale=[3.0, 0.01, 1.0][index]), limit=1.0)
        rates = {path: rate * factor for path, factor in FACTORS.items()}
        want = reference.step(want, grads, rates, DECAYS)
        for path, have in trajectory[index][0].items():
            np.testing.assert_allclose(have, want[path], rtol=2e-4, atol=1e-6, err_msg=path)


def test_the_teacher_averages_the_new_parameters_of_the_visual_encoder(trajectory):
    average = {p: x for p, x in draw(0).items() if p.startswith("image_encoder/")}
    for params, teacher in trajectory:
        average = {p: 0.9 * x + 0.1 * np.asarray(params[p]) for p, x in average.items()}
        assert set(teacher) == set(average)
        for path, have in teacher.items():
            np.testing.assert_allclose(have, average[path], rtol=1e-5, atol=1e-6)


def test_no_clipping_where_the_limit_is_zero():
    params = groups.nest({path: jnp.asarray(x) for path, x in draw(0).items()})
    states = []
    for limit in (0.0, 1e9):
        tx = make_optimizer(config(clip_norm=limit), params)
        grads = groups.nest({p: jnp.asarray(x) for p, x in draw(1, 100.0).items()})
        states.append(tx.update(grads, tx.init(params), params, rate=jnp.float32(0.1))[0])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_rules_may_name_what_a_phase_freezes_and_nothing_else():
    trainable, held = groups.split(groups.nest(draw(0)), ("^text_encoder/",))
    tx = make_optimizer(config(), trainable, held)
    assert set(groups.flatten(find_teacher(tx.init(trainable)))) == set(groups.flatten(trainable))
    with pytest.raises(UserError, match="config.optimizer.rate_rules"):
        make_optimizer(config(), trainable)
    with pytest.raises(UserError, match="config.optimizer.decay_rules"):
        make_optimizer(config(decay_rules=[("bais", 0.0), (".*", 1.0)]), trainable, held)


def test_the_teacher_is_a_copy_and_unique():
    params = groups.nest({path: jnp.asarray(x) for path, x in draw(0).items()})
    tx = optax.chain(optax.identity(), ema_teacher(0.5, "image_encoder/"))
    state = tx.init(params)
    teacher = find_teacher(state)
    ours, theirs = (tree["image_encoder"]["token"] for tree in (params, teacher))
    assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
    with pytest.raises(ValueError):
        find_teacher((state, state))


# ---- the learning rate

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

RELEASED = Path(__file__).parents[1] / "released" / "lr_schedule.json"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_rate_of_every_released_step(stage):
    told = json.loads(RELEASED.read_text())[stage]
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
