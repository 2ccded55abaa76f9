"""From pixels to tokens: normalization, order of patches, positions on other grids, rotary ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reference import transformer as reference

from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.models.vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Rotary,
    cubic_weights,
    normalize_image,
    resize_grid,
)


@pytest.mark.parametrize("target", [(6, 3), (2, 7), (3, 4), (9, 9)])
def test_positions_resize_as_a_direct_bicubic_does(target):
    table = np.random.default_rng(0).normal(size=(4 * 5, 3)).astype(np.float32)
    got = resize_grid(jnp.asarray(table), (4, 5), target)
    want = reference.bicubic(table.reshape(4, 5, 3), target).reshape(-1, 3)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_positions_of_the_stored_grid_are_untouched():
    table = jnp.arange(12.0).reshape(6, 2)
    assert resize_grid(table, (2, 3), (2, 3)) is table
    np.testing.assert_array_equal(cubic_weights(5, 5), np.eye(5))


@given(st.integers(1, 40), st.integers(1, 40))
def test_cubic_weights_sum_to_one_and_mirror(source, target):
    weights = cubic_weights(source, target)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-5)


def test_images_are_normalized_per_channel():
    image = np.random.default_rng(1).integers(0, 256, (2, 3, 4, 3), np.uint8)
    got = normalize_image(jnp.asarray(image))
    want = (image.astype(np.float64) / 255 - np.float64(IMAGENET_MEAN)) / np.float64(IMAGENET_STD)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (23, 33)])
def test_patches_are_embedded_in_row_major_order(tiny_model, tiny_params, size):
    """With no layer in the trunk its output is the embedding; a margin below a patch is cut off."""
    image = np.random.default_rng(2).integers(0, 256, (2, *size, 3), np.uint8)
    run = jax.jit(lambda p, x: tiny_model.apply({"params": p}, x, method="trunk"))
    got = run(tiny_params, jnp.asarray(image))
    pixels = np.asarray(normalize_image(jnp.asarray(image)), np.float64)
    encoder, grid = tiny_params["image_encoder"], (size[0] // 8, size[1] // 8)
    stored = encoder["position"].reshape(4, 4, -1)
    positions = reference.bicubic(stored, grid).reshape(grid[0] * grid[1], -1)
    for b in range(2):
        embedded = reference.patches(pixels[b], 8) @ encoder["patch_embed"]["kernel"]
        want = embedded + encoder["patch_embed"]["bias"] + positions
        np.testing.assert_allclose(got[b], want, rtol=1e-4, atol=1e-4)


# ---- rotary positions


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
    rows = np.random.default_rng(0).normal(size=(3, source)).astype(np.float32)
    image = Image.fromarray(rows).resize((target, 3), Image.Resampling.BICUBIC)
    got = rows @ cubic_weights(source, target, antialias=True).T
    np.testing.assert_allclose(got, np.asarray(image), atol=1e-5)
    table = jnp.asarray(rows.T)
    resized = resize_grid(table, (source, 1), (target, 1), antialias=True)
    np.testing.assert_allclose(resized, got.T, atol=1e-5)
