"""Random resized crops: where they lie, and what they show."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovseg_jax.data.crop import crop_box, resized_part


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 2**32),
    st.floats(0.05, 1.0),
    st.floats(0.3, 1.0),
)
def test_the_box_lies_in_the_image(width, height, seed, least, narrow):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = crop_box((width, height), rng, (least, 1.0), (narrow, 1 / narrow))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert all(isinstance(side, int) for side in (left, top, right, bottom))


def test_area_and_ratio_are_those_asked_for():
    rng, boxes = np.random.default_rng(0), []
    for _ in range(400):
        left, top, right, bottom = crop_box((2000, 1000), rng, (0.2, 0.3), (0.5, 2.0))
        boxes.append(((right - left) * (bottom - top) / 2e6, (right - left) / (bottom - top)))
    area, ratio = np.array(boxes).T
    assert 0.199 < area.min() < 0.205 and 0.295 < area.max() < 0.301
    assert abs(area.mean() - 0.25) < 0.005
    assert 0.499 < ratio.min() < 0.53 and 1.9 < ratio.max() < 2.01
    # Uniform in the logarithm: half are taller than wide.
    assert abs((ratio < 1).mean() - 0.5) < 0.08


def test_every_place_is_reached():
    rng = np.random.default_rng(0)
    places = {crop_box((4, 3), rng, (1 / 12, 1 / 12), (1.0, 1.0))[:2] for _ in range(300)}
    assert places == {(x, y) for x in range(4) for y in range(3)}


def test_where_nothing_fits_the_center_is_taken():
    rng = np.random.default_rng(0)
    assert crop_box((100, 2), rng, (1.0, 1.0), (1.0, 1.0)) == (49, 0, 51, 2)
    assert crop_box((2, 100), rng, (1.0, 1.0), (0.5, 1.0)) == (0, 48, 2, 52)
    assert crop_box((30, 30), rng, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 30, 30)


def test_no_pixel_outside_of_the_part_counts():
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[10:30, 5:25] = 7
    part = resized_part(Image.fromarray(pixels), (5, 10, 25, 30), 3)
    assert (np.asarray(part) == 7).all() and part.size == (3, 3)


def test_parts_in_fractions_of_pixels():
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3))
    part = np.asarray(resized_part(Image.fromarray(ramp.copy()), (10.5, 0.0, 90.5, 100.0), 4))
    np.testing.assert_allclose(part[1, :, 0], [20, 40, 60, 80], atol=1)
