"""The step: the same on every mesh and in parts; what it leaves alone after a non-finite loss, or
frozen; running statistics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from reference.batches import adam_of, make_batch, replace_teacher
from reference.steps import NO_GRADIENT, assert_same, make_step, steps_of, take_steps

from ovseg_jax import sharding
from ovseg_jax.models.build import build_model, init_params
from ovseg_jax.optim.ema_teacher import find_teacher, teacher_of
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.loss import joint_loss, per_example_outputs
from ovseg_jax.train.resume import next_phase_state
from ovseg_jax.train.step import in_one, in_parts, new_state, step_rngs

FROZEN = ("^text_encoder/", "^image_encoder/(patch_embed|position)")
COUNT = 2  # micro-batches
# A norm subtracts the mean, and with it what is added to all before: by the projectors' first map,
# by the decoder's end that they take, and to all channels of a group by the mixing of tokens. The
# statistics do see it, so these rest.
BEFORE_A_NORM = ("projector/fc/bias", "entity_decoder/layer_0/norm/bias", "mixing/fc2/bias")
# Calls in a step: caption, masked, prompt and shared sentences, each as a vector and as tokens;
# the first image by the online model and the second by the teacher, likewise; one completion.
CALLS = {"text_projector": 8, "image_projector": 4, "completion_projector": 1}


def with_nan(tree, path):
    flat = {name: np.array(leaf) for name, leaf in flatten(tree).items()}
    flat[path].flat[0] = np.nan
    return nest(flat)


def same(a, b):
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def spoiled(cause, start):
    """A state and a batch whose loss or gradient is not a number."""
    batch = make_batch(0)
    if cause == "batch":
        batch["weight"][2] = np.nan
        return start, batch
    path = "image_encoder/second/layers/mlp/fc1/bias"
    return start.replace(params=with_nan(start.params, path)), batch


@pytest.mark.parametrize("cause", ["batch", "parameter"])
def test_a_non_finite_step_keeps_the_old_state_and_is_counted(make_steps, cause):
    steps = make_steps("data", 0.1)
    before, batch = spoiled(cause, steps.start)
    state = steps.place(before)
    for count in (1, 2):
        state, metrics = steps(state, batch)
        assert not np.isfinite(metrics["loss"])
        assert metrics["skipped"] == count == state.skipped
        assert state.step == count  # another batch next time
    after = jax.device_get(state)
    assert same(after.params, before.params)
    assert same(after.opt_state, before.opt_state)  # moments, their count, the teacher
    if cause == "batch":
        state, metrics = steps(state, make_batch(1))
        assert state.skipped == 0 and np.isfinite(metrics["loss"])
        assert adam_of(state).count == 1
        assert not same(jax.device_get(state.params), before.params)


def test_a_phase_without_the_mask_loss_runs_no_teacher(make_steps, run_steps):
    """Nothing changes where the teacher is spoiled; with the mask loss its targets vanish. (That
    such a phase reads no second image shows in that its batches have none.)"""

    def first_step(mask_weight):
        steps = make_steps("data", mask_weight)
        teacher = with_nan(find_teacher(steps.start.opt_state), "image_encoder/norm/bias")
        start = steps.start.replace(opt_state=replace_teacher(steps.start.opt_state, teacher))
        _, metrics = steps(steps.place(start), make_batch(0, second=mask_weight > 0))
        return jax.device_get(metrics)

    assert first_step(0.0) == run_steps("data", 0.0).metrics[0]
    assert first_step(0.1)["mask_target_fraction"] == 0
    assert run_steps("data", 0.1).metrics[0]["mask_target_fraction"] > 0


def test_frozen_parameters_have_no_moments_no_teacher_and_do_not_move(make_steps, tiny_params):
    steps = make_steps("data", 0.1, frozen=FROZEN)
    start = flatten(tiny_params)
    held = {p for p in start if p.startswith(("text_encoder/", "image_encoder/p"))}
    trained = set(start) - held
    adam = adam_of(steps.start)
    assert set(flatten(adam.mu)) == set(flatten(adam.nu)) == trained
    own = flatten(find_teacher(steps.start.opt_state))
    assert set(own) == {p for p in trained if p.startswith("image_encoder/")}
    state, metrics = steps(steps.place(), make_batch(0))
    state, metrics = steps(state, make_batch(1))
    assert np.isfinite(metrics["loss"]) and state.skipped == 0
    last = flatten(jax.device_get(state.params))
    assert {p for p in start if np.array_equal(last[p], start[p])} == held
    # What the teacher lacks it takes from the student, so that it is a whole encoder.
    whole = flatten(teacher_of(jax.device_get(state), FROZEN))
    assert {f"image_encoder/{p}" for p in whole} == {p for p in start if p.startswith("image_enc")}
    np.testing.assert_array_equal(whole["position"], start["image_encoder/position"])


def test_random_keys_depend_on_seed_stream_and_step_alone():
    drawn = {
        (seed, step, name): tuple(np.ravel(jax.random.key_data(key)))
        for seed in (0, 1)
        for step in (0, 1)
        for name, key in step_rngs(seed, step).items()
    }
    assert len(set(drawn.values())) == len(drawn) == 8
    again = step_rngs(1, np.int32(1))["dropout"]
    assert tuple(np.ravel(jax.random.key_data(again))) == drawn[1, 1, "dropout"]


# ---- one device, eight, and meshes with every axis


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "mask_weight"), [("one", 0.1), ("fsdp", 0.1), ("mixed", 0.1), ("mixed", 0.0)]
)
def test_the_mesh_changes_nothing(run_steps, tiny_params, mesh, mask_weight):
    assert_same(run_steps("data", mask_weight), run_steps(mesh, mask_weight), tiny_params)


@pytest.mark.slow
def test_the_parameters_moved_and_the_terms_are_there(run_steps, tiny_params):
    """Guards the comparisons above against comparing nothing with nothing."""
    plain, masked = run_steps("data", 0.0), run_steps("data", 0.1)
    assert {"contrastive", "entity"} < plain.metrics[0].keys()
    assert masked.metrics[0].keys() - plain.metrics[0].keys() == {"mask", "mask_target_fraction"}
    assert 0.01 < masked.metrics[0]["mask_target_fraction"] < 0.99
    start = flatten(tiny_params)
    for run in (plain, masked):
        still = [p for p, x in flatten(run.last.params).items() if np.array_equal(x, start[p])]
        assert not still, f"never updated: {still}"
        assert run.last.step == 5 and run.last.skipped == 0
    for name in ("loss", "grad_norm"):
        assert abs(plain.metrics[0][name] - masked.metrics[0][name]) > 1e-4


# ---- gradients accumulated over micro-batches


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
def test_accumulated_steps_are_those_of_one_batch(shared_tiny_config, tiny_params):
    """Of a model in which nothing is drawn. The teacher too, which moves once a step, not once a
    micro-batch."""
    mesh = sharding.make_mesh(devices=jax.devices()[:2])

    def run(micro_batches):
        config = shared_tiny_config.copy_and_resolve_references()
        config.model.image.assignment = "soft"
        config.model.text.dropout = 0.0
        config.accumulation.micro_batches = micro_batches
        model = build_model(config.model)
        return take_steps(steps_of(model, config, tiny_params, mesh, 0.1), 3, second=True)

    assert_same(run(1), run(4), tiny_params)


def test_parts_and_back():
    batch = {"x": jnp.arange(12)}
    parts = in_parts(batch, 3, None)
    np.testing.assert_array_equal(parts["x"][1], [1, 4, 7, 10])
    np.testing.assert_array_equal(in_one(parts)["x"], batch["x"])


# ---- a model with batch norms


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
def released_steps(released_tiny):
    """`Steps` of this model on a mesh, each made once; and `Run`s of three of them."""
    model = build_model(released_tiny.model)
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))

    @functools.cache
    def make(*shape):
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        return steps_of(model, released_tiny, params, mesh, 0.1)

    return make, functools.cache(lambda *shape: take_steps(make(*shape), 3, second=True))


@pytest.mark.slow
def test_eight_devices_with_batch_norms_are_one(released_steps):
    make, run = released_steps
    start = make(1, 1, 1).start.params
    assert_same(run(1, 1, 1), run(2, 2, 2), start, NO_GRADIENT + BEFORE_A_NORM)


def test_statistics_move_with_each_call(released_steps):
    make, run = released_steps
    start, last = make(1, 1, 1).start, run(1, 1, 1).last
    counts = {name: calls["norm"]["count"] for name, calls in last.batch_stats.items()}
    assert counts == {name: 3 * count for name, count in CALLS.items()}
    before, after = flatten(start.batch_stats), flatten(last.batch_stats)
    assert all(np.any(before[path] != after[path]) for path in before)


def test_a_refused_step_leaves_the_statistics(released_steps):
    made = released_steps[0](1, 1, 1)
    start = made.start
    broken = start.replace(params={**start.params, "log_scale": np.float32(np.nan)})
    state, metrics = jax.device_get(made(made.place(broken), make_batch(0)))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, start.batch_stats)


def test_a_phase_hands_its_statistics_on(released_steps, released_tiny):
    start = released_steps[0](1, 1, 1).start
    ended = start.replace(
        batch_stats=jax.tree.map(lambda x: x + np.ones((), x.dtype), start.batch_stats)
    )
    tx = make_optimizer(released_tiny.optimizer, start.params)
    state = next_phase_state(ended, tx, (), optimizer="fresh", teacher="reset")
    jax.tree.map(np.testing.assert_array_equal, dict(state.batch_stats), ended.batch_stats)
