"""Each operation against plain Pillow, growth with the magnitude, and what is drawn how often."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from ovseg_jax.data import rand_augment as module
from ovseg_jax.data.rand_augment import FILL, OPERATIONS, apply_operation, rand_augment

SPEC = {"operations": 2, "magnitude": 9.0, "deviation": 0.5, "probability": 0.5}
COARSE = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
# Neither side a multiple of anything, smooth, full range.
IMAGE = Image.fromarray(COARSE).resize((53, 41), Image.Resampling.BICUBIC)
MIDDLE = Image.fromarray((np.asarray(IMAGE) // 2 + 40).astype(np.uint8))


def moved(image, *terms):
    return image.transform(
        image.size, Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR, fillcolor=FILL
    )


# (name, magnitude, sign) -> the same from Pillow, with numbers worked out by hand.
GOLDEN = [
    ("auto_contrast", 3, 1, lambda i: ImageOps.autocontrast(i)),
    ("equalize", 9, -1, lambda i: ImageOps.equalize(i)),
    ("invert", 0, 1, lambda i: ImageOps.invert(i)),
    ("rotate", 9, 1, lambda i: i.rotate(27, Image.Resampling.BILINEAR, fillcolor=FILL)),
    ("rotate", 5, -1, lambda i: i.rotate(-15, Image.Resampling.BILINEAR, fillcolor=FILL)),
    ("posterize", 0, 1, lambda i: ImageOps.posterize(i, 4)),
    ("posterize", 2.4, 1, lambda i: ImageOps.posterize(i, 4)),
    ("posterize", 9, 1, lambda i: ImageOps.posterize(i, 1)),
    ("posterize", 10, 1, lambda i: i.point(lambda v: 0)),
    ("solarize", 0, 1, lambda i: i),
    ("solarize", 9, 1, lambda i: ImageOps.solarize(i, 26)),
    ("solarize", 10, 1, lambda i: ImageOps.invert(i)),
    ("solarize_add", 9, 1, lambda i: i.point(lambda v: min(v + 99, 255) if v < 128 else v)),
    ("solarize_add", 10, 1, lambda i: i.point(lambda v: min(v + 110, 255) if v < 128 else v)),
    ("color", 10, 1, lambda i: ImageEnhance.Color(i).enhance(1.9)),
    ("color", 10, -1, lambda i: ImageEnhance.Color(i).enhance(0.1)),
    ("contrast", 5, 1, lambda i: ImageEnhance.Contrast(i).enhance(1.45)),
    ("brightness", 5, -1, lambda i: ImageEnhance.Brightness(i).enhance(0.55)),
    ("sharpness", 5, 1, lambda i: ImageEnhance.Sharpness(i).enhance(1.45)),
    ("shear_x", 10, 1, lambda i: moved(i, 1, 0.3, 0, 0, 1, 0)),
    ("shear_y", 5, -1, lambda i: moved(i, 1, 0, 0, -0.15, 1, 0)),
    ("translate_x", 10, 1, lambda i: moved(i, 1, 0, 0.45 * 53, 0, 1, 0)),
    ("translate_y", 10, -1, lambda i: moved(i, 1, 0, 0, 0, 1, -0.45 * 41)),
]


@pytest.mark.parametrize(("name", "magnitude", "sign", "plain"), GOLDEN)
def test_equals_plain_pillow(name, magnitude, sign, plain):
    found = apply_operation(MIDDLE, name, float(magnitude), sign)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(plain(MIDDLE)))


def test_there_are_fifteen_and_all_are_compared():
    assert len(OPERATIONS) == 15 and {row[0] for row in GOLDEN} == set(OPERATIONS)


@given(
    st.sampled_from(list(OPERATIONS)),
    st.floats(0, 10),
    st.sampled_from([-1, 1]),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_size_mode_and_source_stay(name, magnitude, sign, width, height):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels.copy())
    found = apply_operation(image, name, magnitude, sign)
    assert found.size == (width, height) and found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)
    again = apply_operation(image, name, magnitude, sign)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))


WITHOUT_MAGNITUDE = {"auto_contrast", "equalize", "invert"}


def changed(name, magnitude, sign):
    """How much an operation changes an image on which nothing is clipped or comes back around."""
    ramp = np.linspace(64, 127, 64).astype(np.uint8)
    channels = np.broadcast_arrays(ramp[None], ramp[:, None], ramp[None] // 2)
    pixels = np.stack(channels, -1)
    if name == "sharpness":  # a ramp is as sharp as can be
        pixels = pixels + 6 * (np.indices((64, 64)).sum(0) % 2).astype(np.uint8)[..., None]
    found = np.asarray(apply_operation(Image.fromarray(pixels), name, magnitude, sign), np.float32)
    if name == "solarize":  # more pixels are inverted, whatever that does to each
        return (found != pixels).mean()
    if name.startswith("translate"):  # the center never sees the border
        found, pixels = found[30:34, 30:34], pixels[30:34, 30:34]
    return np.abs(found - pixels).mean()


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - WITHOUT_MAGNITUDE))
@given(st.floats(0, 10), st.floats(0, 10), st.sampled_from([-1, 1]))
def test_a_greater_magnitude_changes_more(name, first, second, sign):
    low, high = sorted((first, second))
    assert changed(name, low, sign) <= changed(name, high, sign) + 0.05
    assert changed(name, 0.0, sign) < changed(name, 10.0, sign)


def test_strength_zero_leaves_the_image():
    still = {"rotate", "solarize", "solarize_add", "color", "contrast", "brightness", "sharpness"}
    still |= {"shear_x", "shear_y", "translate_x", "translate_y"}
    for name in still:
        found = np.asarray(apply_operation(IMAGE, name, 0.0, 1))
        np.testing.assert_array_equal(found, np.asarray(IMAGE), err_msg=name)


def test_a_function_of_the_generator():
    one, two, other = (
        np.asarray(rand_augment(IMAGE, np.random.default_rng(seed), {**SPEC, "probability": 1.0}))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def drawn(monkeypatch, spec, count):
    """(name, magnitude, sign) of every operation done in `count` images."""
    calls = []
    monkeypatch.setattr(module, "apply_operation", lambda i, *rest: calls.append(rest) or i)
    rng = np.random.default_rng(0)
    for _ in range(count):
        rand_augment(IMAGE, rng, spec)
    return calls


def test_what_is_drawn_how_often(monkeypatch):
    calls = drawn(monkeypatch, SPEC, 3000)
    assert abs(len(calls) - 3000) < 150  # 2 operations, each done with probability 0.5
    names, magnitudes, signs = zip(*calls, strict=True)
    share = {name: names.count(name) / len(names) for name in OPERATIONS}
    assert all(abs(value - 1 / 15) < 0.02 for value in share.values()), share
    assert abs(np.mean(signs)) < 0.06
    assert abs(np.mean(magnitudes) - 9) < 0.05 and abs(np.std(magnitudes) - 0.5) < 0.05
    assert max(magnitudes) <= 10


def test_magnitudes_stay_within_their_range(monkeypatch):
    calls = drawn(monkeypatch, {**SPEC, "magnitude": 5.0, "deviation": 20.0}, 300)
    magnitudes = [call[1] for call in calls]
    assert min(magnitudes) == 0 and max(magnitudes) == 10
    assert drawn(monkeypatch, {**SPEC, "probability": 0.0}, 50) == []
    assert len(drawn(monkeypatch, {**SPEC, "operations": 3, "probability": 1.0}, 50)) == 150
