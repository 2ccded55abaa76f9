"""A step of a model with batch norms: one device or eight, and what a refused step leaves."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from reference.batches import make_batch
from reference.steps import NO_GRADIENT, assert_same, make_step, steps_on, take_steps

from ovseg_jax import sharding
from ovseg_jax.models.build import build_model, init_params, init_statistics
from ovseg_jax.optim.groups import flatten
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.resume import next_phase_state
from ovseg_jax.train.step import new_state

ONE = (1, 1, 1)
# A norm subtracts the mean, and with it what is added to all before: by the projectors' first map,
# by the decoder's end that they take, and to all channels of a group by the mixing of tokens. The
# statistics do see it, so these rest.
BEFORE_A_NORM = ("projector/fc/bias", "entity_decoder/layer_0/norm/bias", "mixing/fc2/bias")
# Calls in a step: caption, masked, prompt and shared sentences, each as a vector and as tokens;
# the first image by the online model and the second by the teacher, likewise; one completion.
CALLS = {"text_projector": 8, "image_projector": 4, "completion_projector": 1}


@pytest.fixture(scope="module")
def released_tiny(shared_tiny_config):
    config = shared_tiny_config.copy_and_resolve_references().unlock()
    image, model, loss = config.model.image, config.model, config.loss
    image.update(binding="grouping_block", second_stage="groups", group_tokens=6, num_groups=4)
    image.update(first_layers=1, second_layers=0)
    model.decoder.update(width=24, order="cross_first", mask_padding=False)
    model.update(projector_layers=2, projector_norm="batch", projector_activation="relu")
    model.update(projector_bias=True, text_pool="cls")
    loss.update(mask_maps="binding", mask_directions="one", mask_cost="euclidean", mask_size=32)
    loss.update(mask_threshold=0.6, mask_divisor=16.0, teacher_noise=True, frozen_text_dropout=True)
    config.optimizer.rate_rules = ((f"({'|'.join(BEFORE_A_NORM)})$", 0.0), (".*", 1.0))
    return config


@pytest.fixture(scope="module")
def steps(released_tiny):
    """The initial state, and the `Steps` of a mesh."""
    config, model = released_tiny, build_model(released_tiny.model)
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    tx = make_optimizer(config.optimizer, params)
    start = jax.device_get(jax.jit(lambda p: new_state(p, tx, (), init_statistics(model)))(params))

    @functools.cache
    def make(shape):
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        return steps_on(start, make_step(model, config, tx, mesh, 0.1))

    return start, make


@pytest.fixture(scope="module")
def runs(steps):
    """`Run`s of five steps on a mesh, each made once."""
    _, make = steps
    return functools.cache(lambda shape: take_steps(make(shape), 5, second=True))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_with_batch_norms_are_one(steps, runs, shape):
    one, eight = runs(ONE), runs(shape)
    assert_same(one, eight, steps[0].params, NO_GRADIENT + BEFORE_A_NORM)


def test_statistics_move_with_each_call(steps, runs):
    start, last = steps[0], runs(ONE).last
    counts = {name: calls["norm"]["count"] for name, calls in last.batch_stats.items()}
    assert counts == {name: 5 * count for name, count in CALLS.items()}
    before, after = flatten(start.batch_stats), flatten(last.batch_stats)
    assert all(np.any(before[path] != after[path]) for path in before)


def test_a_refused_step_leaves_the_statistics(steps):
    start, make = steps
    broken = start.replace(params={**start.params, "log_scale": np.float32(np.nan)})
    made = make(ONE)
    state, metrics = jax.device_get(made(made.place(broken), make_batch(0)))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, start.batch_stats)


def test_a_phase_hands_its_statistics_on(steps, released_tiny):
    start, _ = steps
    ended = start.replace(
        batch_stats=jax.tree.map(lambda x: x + np.ones((), x.dtype), start.batch_stats)
    )
    tx = make_optimizer(released_tiny.optimizer, start.params)
    state = next_phase_state(ended, tx, (), optimizer="fresh", teacher="reset")
    jax.tree.map(np.testing.assert_array_equal, dict(state.batch_stats), ended.batch_stats)
