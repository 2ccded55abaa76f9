"""Accumulated gradients equal those of one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference.batches import adam_of, make_batch
from reference.steps import assert_same, make_step, steps_on, take_steps

from ovseg_jax import sharding
from ovseg_jax.models.build import build_model
from ovseg_jax.optim.groups import flatten
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.loss import joint_loss, per_example_outputs
from ovseg_jax.train.step import in_one, in_parts, new_state, step_rngs, teacher_of

COUNT = 4


@pytest.fixture(scope="module")
def run(shared_tiny_config, tiny_params):
    """Five steps of a model in which nothing is drawn at random."""

    def run(micro_batches):
        config = shared_tiny_config.copy_and_resolve_references()
        config.model.image.assignment = "soft"
        config.model.text.dropout = 0.0
        config.accumulation.micro_batches = micro_batches
        mesh = sharding.make_mesh(devices=jax.devices()[:2])
        tx = make_optimizer(config.optimizer, tiny_params)
        start = jax.device_get(jax.jit(lambda p: new_state(p, tx, ()))(tiny_params))
        step = make_step(build_model(config.model), config, tx, mesh, 0.1)
        return take_steps(steps_on(start, step), 5, second=True)

    return run


@pytest.mark.slow
def test_a_step_draws_dropout_and_groups_alike_in_both_passes(
    shared_tiny_config, tiny_model, tiny_params
):
    """Hard assignment with Gumbel noise and dropout: the gradient is that of one backward pass over
    all micro-batches with these draws."""
    config = shared_tiny_config.copy_and_resolve_references()
    assert config.model.image.assignment == "hard" and config.model.text.dropout > 0
    config.accumulation.micro_batches = COUNT
    tx = make_optimizer(config.optimizer, tiny_params)
    start = jax.jit(lambda p: new_state(p, tx, ()))(tiny_params)
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    common = {"mask_weight": 0.1, "mesh": None}

    @jax.jit
    def directly(params, first):
        rngs, teacher, outputs = step_rngs(config.seed, 0), teacher_of(start, ()), []
        for number in range(COUNT):
            part = {name: x[number::COUNT] for name, x in batch.items()}
            draws = {name: jax.random.fold_in(key, first + number) for name, key in rngs.items()}
            keywords = {**common, "text_dropout": True, "rngs": draws}
            outputs.append(
                per_example_outputs(tiny_model, params, teacher, part, config.loss, **keywords)[0]
            )
        outputs = in_one(jax.tree.map(lambda *parts: jnp.stack(parts), *outputs))
        scale = tiny_model.apply({"params": params}, method="logit_scale")
        return joint_loss(scale, outputs, batch, config.loss, mask_weight=0.1)[0]

    want, gradient = jax.value_and_grad(directly)(tiny_params, 0)
    other, _ = jax.value_and_grad(directly)(tiny_params, 1)
    assert abs(want - other) > 0.01  # the draws matter
    step = make_step(tiny_model, config, tx, None, common["mask_weight"])
    state, metrics = jax.jit(step)(start, batch)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    norm = optax.tree.norm(gradient)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    clipped = (1 - config.optimizer.b1) * min(1.0, config.optimizer.clip_norm / float(norm))
    found = flatten(adam_of(state).mu)
    for path, value in flatten(gradient).items():
        wanted = np.float32(clipped) * value
        limit = 1e-4 * np.abs(wanted).max() + 1e-8
        np.testing.assert_allclose(found[path], wanted, rtol=1e-3, atol=limit, err_msg=path)


@pytest.mark.slow
def test_accumulated_steps_are_those_of_one_batch(run, tiny_params):
    """The teacher too, which moves once a step, not once a micro-batch."""
    assert_same(run(1), run(4), tiny_params)


def test_parts_and_back():
    batch = {"x": jnp.arange(12)}
    parts = in_parts(batch, 3, None)
    np.testing.assert_array_equal(parts["x"][1], [1, 4, 7, 10])
    np.testing.assert_array_equal(in_one(parts)["x"], batch["x"])
