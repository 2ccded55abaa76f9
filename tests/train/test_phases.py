"""Phases: their place in the order of examples, their transforms, what one hands to the next."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.batches import adam_of

from ovseg_jax.errors import UserError
from ovseg_jax.optim import groups
from ovseg_jax.optim.ema_teacher import find_teacher
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.config import load_config
from ovseg_jax.train.phases import make_phases, weak_phases
from ovseg_jax.train.resume import next_phase_state
from ovseg_jax.train.step import new_state

CROP = {"kind": "crop", "size": 32}
ERASE = {**CROP, "erase": {"probability": 0.25}}


def phases_of(config, *transforms):
    """A phase for each transform; None follows the run's."""
    config.data = {"transform": CROP}
    config.phases = tuple(
        {"steps": 2, "batch_size": 4, **({"transform": one} if one else {})} for one in transforms
    )
    return make_phases(config, records=100)


def test_a_phase_has_its_own_transform_or_the_runs(tiny_config):
    first, second = phases_of(tiny_config, None, {**ERASE, "scale": (0.08, 1.0)})
    assert first.transform["scale"] == (0.4, 1.0) and first.erase is None
    assert second.transform["scale"] == (0.08, 1.0)
    assert second.erase["probability"] == 0.25 and second.erase["area"] == (0.02, 1 / 3)


def test_phases_read_on_where_the_one_before_stopped(tiny_config):
    tiny_config.data = {"transform": CROP}
    tiny_config.phases = (
        {"steps": 5, "batch_size": 8},
        {"epochs": 1, "batch_size": 4},
        {"steps": 1, "batch_size": 16},
    )
    phases = make_phases(tiny_config, records=100)
    assert [phase.position(phase.first) for phase in phases] == [0, 40, 140]
    assert phases[1].position(phases[1].first + 3) == 52


def test_phases_that_hardly_train_are_warned_of(tiny_config):
    tiny_config.data = {"transform": CROP}
    tiny_config.phases = ({"steps": 90, "batch_size": 8}, {"steps": 10, "batch_size": 8})
    phases = make_phases(tiny_config, records=100)
    rate = tiny_config.optimizer.learning_rate
    rate.update(peak=1.0, end=0.0, warmup=0)
    steps = 0.5 + 0.5 * np.cos(np.pi * np.arange(100) / 100)
    share = 100 * steps[90:].sum() / steps.sum()
    (line,) = weak_phases(tiny_config, phases)
    assert f"has {share:.2g} % of" in line
    assert "config.phases[1]" in line and "learning_rate.end" in line
    rate.end = 0.5
    assert weak_phases(tiny_config, phases) == []
    assert weak_phases(tiny_config, phases[:1]) == []


@pytest.mark.parametrize(
    ("file", "variant", "groups"),
    [
        ("quickstart", "", 64),
        ("quickstart", ":scratch", 8),
        ("quickstart", ":mask", 64),
        ("photos", "", 8),
        ("vitb", "", 8),
    ],
)
def test_no_phase_hardly_trains_and_lambda_follows_the_number_of_matched_groups(
    file, variant, groups
):
    config = load_config(f"{Path(__file__).parents[2]}/configs/{file}.py{variant}")
    assert weak_phases(config, make_phases(config, 4_000_000)) == []
    matched = config.model.image.num_groups * config.loss.group_ratio
    assert config.model.image.num_groups == groups
    assert config.phases[-1]["mask_weight"] == pytest.approx(0.1 * 4 / matched)


def test_wrong_fields_are_named_with_their_place(tiny_config):
    with pytest.raises(UserError, match=r"config.phases\[1\].transform.flipp is no field"):
        phases_of(tiny_config, None, {**CROP, "flipp": 0.5})
    tiny_config.data.transform = {**CROP, "flip": 2.0}
    with pytest.raises(UserError, match="config.data.transform.flip"):
        make_phases(tiny_config, records=100)


# ---- from one phase to the next: moments, teacher, parameters frozen or set free

SHAPES = {
    "image_encoder/trunk/kernel": (2, 3),
    "image_encoder/group/kernel": (3,),
    "text_encoder/word": (4, 2),
    "head/kernel": (2,),
}
TRUNK, TEXT = "^image_encoder/trunk", "^text_encoder/"


def optimizer(config, params, frozen):
    config.optimizer.decay_rules = config.optimizer.rate_rules = [(".*", 1.0)]
    return make_optimizer(config.optimizer, groups.split(params, frozen)[0])


@pytest.fixture
def ended(tiny_config):
    """The state at the end of a phase with a frozen trunk, seven steps old, two skipped."""
    rng = np.random.default_rng(0)
    drawn = {path: jnp.asarray(rng.normal(size=x), jnp.float32) for path, x in SHAPES.items()}
    params = groups.nest(drawn)
    tx = optimizer(tiny_config, params, (TRUNK,))
    state = new_state(params, tx, (TRUNK,))
    trainable, _ = groups.split(params, (TRUNK,))
    ones = jax.tree.map(jnp.ones_like, trainable)
    _, opt_state = tx.update(ones, state.opt_state, trainable, rate=jnp.float32(0.5))
    return state.replace(opt_state=opt_state, step=jnp.int32(7), skipped=jnp.int32(2))


@pytest.mark.parametrize("optimizer_choice", ["continue", "fresh"])
@pytest.mark.parametrize("teacher_choice", ["keep", "reset"])
def test_moments_and_teacher(tiny_config, ended, optimizer_choice, teacher_choice):
    """The trunk is set free and the text encoder frozen."""
    tx = optimizer(tiny_config, ended.params, (TEXT,))
    begun = next_phase_state(ended, tx, (TEXT,), optimizer=optimizer_choice, teacher=teacher_choice)
    assert begun.step == 7 and begun.skipped == 2
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, begun.params, ended.params))
    # The layout is that of a state made for the new phase.
    fresh = new_state(ended.params, tx, (TEXT,))
    assert jax.tree.structure(begun) == jax.tree.structure(fresh)

    old, new = adam_of(ended), adam_of(begun)
    before, after = groups.flatten(old.mu), groups.flatten(new.mu)
    assert set(after) == set(SHAPES) - {"text_encoder/word"}
    kept = optimizer_choice == "continue"
    for path in ("image_encoder/group/kernel", "head/kernel"):
        assert np.abs(before[path]).min() > 0
        np.testing.assert_array_equal(after[path], before[path] if kept else 0)
    np.testing.assert_array_equal(after["image_encoder/trunk/kernel"], 0)
    assert new.count == (old.count if kept else 0)

    student = groups.flatten(ended.params)
    before, after = (groups.flatten(find_teacher(state.opt_state)) for state in (ended, begun))
    assert set(after) == {"image_encoder/trunk/kernel", "image_encoder/group/kernel"}
    group = "image_encoder/group/kernel"
    assert not np.array_equal(before[group], student[group])
    np.testing.assert_array_equal(
        after[group], before[group] if teacher_choice == "keep" else student[group]
    )
    trunk = "image_encoder/trunk/kernel"  # had no teacher: starts at the student
    np.testing.assert_array_equal(after[trunk], student[trunk])
