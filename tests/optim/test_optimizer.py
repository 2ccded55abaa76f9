"""The optimizer chain against NumPy's AdamW: clipping, decay and rate rules, teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from reference.optimizer import AdamW, clipped

from ovseg_jax.errors import UserError
from ovseg_jax.optim import groups
from ovseg_jax.optim.optimizer import ema_teacher, find_teacher, make_optimizer

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
