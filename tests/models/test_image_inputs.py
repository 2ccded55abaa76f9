"""From pixels to tokens: normalization, order of patches and pixels, positions on other grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import images as reference

from ovseg_jax.models.vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
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
