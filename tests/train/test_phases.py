"""Phases: their place in the order of examples, their image transforms, what caches refuse."""

from pathlib import Path

import numpy as np
import pytest

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.flags import load_config
from ovseg_jax.train.phases import (
    check_batch_sizes,
    check_cached_images,
    make_phases,
    rate_shares,
    weak_phases,
)

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
    shares = rate_shares(tiny_config, phases)
    np.testing.assert_allclose(
        shares, [steps[:90].sum(), steps[90:].sum()] / steps.sum(), rtol=1e-4
    )
    (line,) = weak_phases(tiny_config, phases)
    assert "config.phases[1]" in line and "learning_rate.end" in line
    rate.end = 0.5
    assert weak_phases(tiny_config, phases) == []
    assert weak_phases(tiny_config, phases[:1]) == []


@pytest.mark.parametrize("name", ["quickstart", "quickstart:both", "vitb", "photos"])
def test_no_config_has_a_phase_that_hardly_trains(name):
    file, _, variant = name.partition(":")
    path = Path(__file__).parents[2] / "configs" / f"{file}.py"
    config = load_config(f"{path}:{variant}" if variant else path)
    assert weak_phases(config, make_phases(config, 4_000_000)) == []


@pytest.mark.parametrize(
    "name, groups",
    [("quickstart", 64), ("quickstart:scratch", 8), ("quickstart:mask", 64), ("photos", 8)],
)
def test_lambda_follows_the_number_of_matched_groups(name, groups):
    file, _, variant = name.partition(":")
    path = Path(__file__).parents[2] / "configs" / f"{file}.py"
    config = load_config(f"{path}:{variant}" if variant else path)
    matched = config.model.image.num_groups * config.loss.group_ratio
    assert config.model.image.num_groups == groups
    assert config.phases[-1]["mask_weight"] == pytest.approx(0.1 * 4 / matched)


def test_wrong_fields_are_named_with_their_place(tiny_config):
    with pytest.raises(UserError, match=r"config.phases\[1\].transform.flipp is no field"):
        phases_of(tiny_config, None, {**CROP, "flipp": 0.5})
    tiny_config.data.transform = {**CROP, "flip": 2.0}
    with pytest.raises(UserError, match="config.data.transform.flip"):
        make_phases(tiny_config, records=100)


def test_what_cached_images_refuse(tiny_config):
    check_cached_images(phases_of(tiny_config, None, CROP))
    with pytest.raises(UserError, match="the same transform"):
        check_cached_images(phases_of(tiny_config, None, {**CROP, "size": 16}))
    with pytest.raises(UserError, match="erase"):
        check_cached_images(phases_of(tiny_config, ERASE, ERASE))


def test_batches_of_every_phase_must_divide_before_the_first_begins(tiny_config):
    """As where a run goes on with another number of devices."""
    tiny_config.data = {"transform": CROP}
    tiny_config.phases = ({"steps": 5, "batch_size": 8}, {"steps": 5, "batch_size": 20})
    phases = make_phases(tiny_config, records=100)
    check_batch_sizes(phases, sharding.make_mesh(2, 2, 2))
    with pytest.raises(UserError, match=r"phases\[1\].batch_size = 20 .* 8 .*: give 16 or 24,"):
        check_batch_sizes(phases, sharding.make_mesh())
