"""Random erasing on the device: where, how often, with what, and on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.batches import make_batch

from ovseg_jax import sharding
from ovseg_jax.models.vit import normalize_image
from ovseg_jax.train.apply import erased_batch, erased_pixels, random_erasing

SPEC = {"probability": 0.25, "area": (0.02, 1 / 3), "aspect": (0.3, 1 / 0.3)}
SURE = {**SPEC, "probability": 1.0}
COUNT, HEIGHT, WIDTH = 1024, 48, 64


@pytest.fixture(scope="module")
def masks():
    """Erased pixels of many images, by probability."""

    @functools.cache
    def draw(probability):
        spec = {**SPEC, "probability": probability}
        draw = jax.jit(lambda key: erased_pixels(key, (COUNT, HEIGHT, WIDTH), spec))
        return np.asarray(draw(jax.random.key(0)))

    return draw


def test_erased_are_rectangles_of_the_right_sizes(masks):
    area, aspect = [], []
    for mask in masks(1.0):
        rows, columns = mask.any(1), mask.any(0)
        assert mask.any() and (mask == rows[:, None] & columns[None]).all()
        for line in (rows, columns):  # without a gap
            assert np.abs(np.diff(line.astype(int))).sum() <= 2
        area.append(mask.mean())
        aspect.append(rows.sum() / columns.sum())
    # Sides are whole pixels, which shifts small areas most.
    assert 0.012 < min(area) < 0.03 and 0.3 < max(area) < 0.345
    assert abs(np.mean(area) - (0.02 + 1 / 3) / 2) < 0.02
    assert 0.25 < min(aspect) < 0.4 and 2.5 < max(aspect) < 4


def test_as_many_images_as_asked_for_and_every_border(masks):
    assert 0.2 < masks(0.25).any((1, 2)).mean() < 0.3
    assert not masks(0.0).any()
    where = masks(1.0)
    assert all(where[:, i].any() and where[:, :, i].any() for i in (0, -1))
    np.testing.assert_allclose(where.mean((0, 2)), where.mean((0, 2))[::-1], atol=0.05)


def test_noise_is_normal_and_the_rest_normalized():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 256, (64, 32, 32, 3), np.uint8))
    weight = jnp.asarray((np.arange(64) % 4 > 0).astype(np.float32))
    found = jax.jit(lambda i, w, k: random_erasing(i, w, SURE, k))(image, weight, jax.random.key(3))
    assert found.dtype == jnp.float32
    plain, found = np.asarray(normalize_image(image)), np.asarray(found)
    changed = np.abs(found - plain) > 1e-5
    assert not changed[np.asarray(weight) == 0].any()
    inside = changed.any(-1)
    assert inside[np.asarray(weight) > 0].any((1, 2)).all()
    noise = found[inside]
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    # Each channel has noise of its own.
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.05


def test_both_images_of_a_pair_and_steps_are_drawn_apart_on_any_number_of_devices():
    batch = {name: make_batch(0)[name] for name in ("image", "weight", "caption_ids")}
    batch["image2"] = batch["image"]

    def run(devices, *steps):
        mesh = sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
        split, placed = sharding.batch_sharding(mesh), sharding.put_batch(batch, mesh)
        erase = jax.jit(lambda b, k: erased_batch(b, SURE, k), out_shardings=split)
        return [jax.device_get(erase(placed, jax.random.key(step))) for step in steps]

    (one, other), (eight,) = run(1, 1, 2), run(8, 1)
    assert set(one) == set(batch)
    for name in batch:
        np.testing.assert_allclose(one[name], eight[name], atol=1e-6)
    assert (one["image"] != one["image2"]).any()
    assert (one["image"] != other["image"]).any()
    np.testing.assert_array_equal(one["caption_ids"], batch["caption_ids"])
