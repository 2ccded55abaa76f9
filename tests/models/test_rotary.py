"""Rotary positions: pair by pair rotation, and what a trunk does with them and with registers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from ovseg_jax.models.build import build_model
from ovseg_jax.models.vit import Rotary, cubic_weights, resize_grid
from ovseg_jax.weights.initialize import variable_shapes


def turn(x, row, column, rows, columns, theta):
    """One patch's channels [d], pair by pair as complex numbers."""
    d = len(x)
    out = np.array(x, np.float64)
    for half, (place, count) in enumerate(((row, rows), (column, columns))):
        for k in range(d // 4):
            i = half * (d // 4) + k
            center = 2 * (place + 0.5) / count - 1
            angle = 2 * np.pi * center / theta ** (4 * k / d)
            pair = complex(x[i], x[i + d // 2]) * np.exp(1j * angle)
            out[i], out[i + d // 2] = pair.real, pair.imag
    return out


def test_patches_are_turned_and_the_prefix_is_not():
    x = np.random.default_rng(0).normal(size=(2, 3, 2 + 3 * 5, 8)).astype(np.float32)
    got = np.asarray(Rotary(3, 5, 2, 100.0)(jnp.asarray(x)))
    np.testing.assert_array_equal(got[:, :, :2], x[:, :, :2])
    for token in range(15):
        for b in range(2):
            for n in range(3):
                want = turn(x[b, n, 2 + token], token // 5, token % 5, 3, 5, 100.0)
                np.testing.assert_allclose(got[b, n, 2 + token], want, atol=1e-5)


def test_products_depend_on_the_distance_alone():
    query, key = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    rotary = Rotary(1, 6, 0, 10.0)
    queries, keys = (np.asarray(rotary(jnp.tile(v, (1, 1, 6, 1)))[0, 0]) for v in (query, key))
    products = queries @ keys.T
    for shift in range(-4, 5):
        diagonal = np.diagonal(products, shift)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)
    assert np.ptp(products[0]) > 0.1


def test_the_trunk_takes_rope_and_registers_on_any_grid(tiny_config):
    """No position parameter; without any positions the order of the patches would not matter."""
    tiny_config.model.image.update(
        group_layer=1, position="rope", register_tokens=2, class_token=True
    )
    model = build_model(tiny_config.model)
    shapes = variable_shapes(model)
    assert "image_encoder/position" not in shapes
    assert shapes["image_encoder/register_tokens"] == (2, 32)
    rng = np.random.default_rng(0)
    drawn = {k: (0.3 * rng.normal(size=shape)).astype(np.float32) for k, shape in shapes.items()}
    params = unflatten_dict(drawn, sep="/")
    image = rng.integers(0, 256, (1, 16, 24, 3), np.uint8)
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, method="trunk"))
    straight = run(params, image)
    assert straight.shape == (1, 6, 32)
    swapped = np.concatenate([image[:, 8:], image[:, :8]], axis=1)
    back = np.asarray(run(params, swapped)).reshape(2, 3, 32)[::-1].reshape(6, 32)
    assert np.abs(back - straight[0]).max() > 1e-3


@pytest.mark.parametrize(("source", "target"), [(4, 7), (9, 4), (6, 6), (5, 2)])
def test_antialiased_weights_are_pillows(source, target):
    """Pillow resizes one-dimensional float images with the same kernel."""
    from PIL import Image

    rows = np.random.default_rng(0).normal(size=(3, source)).astype(np.float32)
    image = Image.fromarray(rows).resize((target, 3), Image.Resampling.BICUBIC)
    got = rows @ cubic_weights(source, target, antialias=True).T
    np.testing.assert_allclose(got, np.asarray(image), atol=1e-5)
    table = jnp.asarray(rows.T)
    resized = resize_grid(table, (source, 1), (target, 1), antialias=True)
    np.testing.assert_allclose(resized, got.T, atol=1e-5)
