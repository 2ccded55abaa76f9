"""Sizes and positions of windows, and the linear maps back to pixels."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import windows


@pytest.mark.parametrize(
    "h, w, expected",
    [
        (448, 448, (448, 448)),
        (375, 500, (448, 597)),  # 597.33
        (500, 333, (673, 448)),  # 672.67
        (300, 3000, (205, 2048)),  # the long side decides: 204.8
        (1, 5000, (16, 2048)),  # never narrower than a patch
        (7, 16, (448, 1024)),
    ],
)
def test_resized_shape(h, w, expected):
    assert windows.resized_shape(h, w, 448, 2048) == expected


def test_an_empty_image_is_refused():
    with pytest.raises(UserError, match="0 x 5"):
        windows.resized_shape(0, 5, 448, 2048)


def test_window_grid_worked_examples():
    assert windows.window_grid(448, 448, 448, 224) == [(0, 0)]
    assert windows.window_grid(448, 597, 448, 224) == [(0, 0), (0, 149)]
    assert windows.window_grid(448, 673, 448, 224) == [(0, 0), (0, 224), (0, 225)]
    assert windows.window_grid(205, 900, 448, 224) == [(0, 0), (0, 224), (0, 448), (0, 452)]


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 300), st.integers(1, 300))
def test_windows_cover_an_axis(length, window, stride):
    stride = min(stride, window)
    starts = windows.window_starts(length, window, stride)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start and start + min(window, length) <= length
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert starts == sorted(starts) and len(set(starts)) == len(starts)
    # mmsegmentation's count of windows.
    assert len(starts) == max(length - window + stride - 1, 0) // stride + 1


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 32))
def test_grid_shape_finds_the_grid(h, w, patch):
    grid = (h // patch, w // patch)
    if min(grid) == 0:
        return
    assert windows.grid_shape(h, w, grid[0] * grid[1]) == grid


def test_grid_shape_refuses():
    with pytest.raises(UserError, match="7 patches"):
        windows.grid_shape(10, 10, 7)


def interpolate(values, pixels):
    """Half-pixel linear interpolation with repeated borders, one output at a time."""
    cells, out = len(values), []
    for i in range(pixels):
        x = min(max((i + 0.5) * cells / pixels - 0.5, 0), cells - 1)
        low = int(x)
        high = min(low + 1, cells - 1)
        out.append(values[low] * (1 - (x - low)) + values[high] * (x - low))
    return np.array(out)


@pytest.mark.parametrize("pixels, cells", [(10, 10), (140, 10), (7, 3), (3, 7), (5, 1), (1, 5)])
def test_bilinear_weights(pixels, cells):
    values = np.random.default_rng(0).random(cells).astype(np.float32)
    weights = windows.bilinear_weights(pixels, cells)
    np.testing.assert_allclose(weights @ values, interpolate(values, pixels), atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[::-1, ::-1], weights, atol=1e-6)
    if pixels == cells:
        np.testing.assert_array_equal(weights, np.eye(cells))


def test_nearest_weights():
    chosen = windows.nearest_weights(6, 3).argmax(1)
    np.testing.assert_array_equal(chosen, [0, 0, 1, 1, 2, 2])
    assert (windows.nearest_weights(7, 3).sum(1) == 1).all()


@pytest.mark.parametrize("original, resized", [(60, 60), (97, 60), (31, 60), (20, 20)])
def test_cell_weights_are_upsample_average_resize(original, resized):
    window, stride, cells = 24, 12, 3
    rng = np.random.default_rng(1)
    starts = windows.window_starts(resized, window, stride)
    length = min(window, resized)
    values = rng.random((len(starts), cells)).astype(np.float32)
    total, cover = np.zeros(resized), np.zeros(resized)
    for start, part in zip(starts, values, strict=True):
        total[start : start + length] += interpolate(part, length)
        cover[start : start + length] += 1
    expected = interpolate(total / cover, original)
    weights = windows.cell_weights(original, resized, window, stride, cells)
    np.testing.assert_allclose(weights @ values.ravel(), expected, atol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)


def test_resize_image():
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    assert windows.resize_image(image, 9, 12) is image
    assert windows.resize_image(image, 18, 6).shape == (18, 6, 3)
    flat = np.full((5, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(windows.resize_image(flat, 11, 3), np.full((11, 3, 3), 77))


def test_a_window_of_odd_size_under_the_released_rule():
    for h, w, patch in ((32, 35, 16), (16, 23, 8)):
        # The rounded patch is larger than the true one, and both grids hold four patches.
        length = (h // patch) * (w // patch)
        assert windows.grid_shape(h, w, length) == (2, 2)
        assert windows.grid_shape(h, w, length, "rounded_patch") == (1, 4)
        assert windows.grid_shape(w, h, length, "rounded_patch") == (4, 1)
    for h, w in ((448, 448), (205, 448), (448, 300), (64, 96)):
        length = (h // 16) * (w // 16)
        assert windows.grid_shape(h, w, length, "rounded_patch") == (h // 16, w // 16)
    # 335 // 17 = 19 rows do not divide 400 patches: no grid at all, so the exact one.
    assert windows.grid_shape(335, 335, 400, "rounded_patch") == (20, 20)


def test_four_pixels_to_the_bit_of_opencv():
    arrays = np.load(Path(__file__).with_name("opencv_resize.npz"))
    for name in {key.partition("/")[0] for key in arrays.files}:
        image, resized = arrays[f"{name}/image"], arrays[f"{name}/resized"]
        found = windows.resize_image(image, *resized.shape[:2], "four_pixels")
        np.testing.assert_array_equal(found, resized)
        averaged = windows.resize_image(image, *resized.shape[:2])
        assert (averaged != resized).any()
