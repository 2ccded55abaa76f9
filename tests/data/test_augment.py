"""The transform of a training image as a whole, and the fields that describe it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_folders import encoded
from PIL import Image, ImageEnhance, ImageOps

from ovseg_jax.data import augment
from ovseg_jax.data.augment import (
    FILL,
    OPERATIONS,
    apply_operation,
    color_jitter,
    complete_transform,
    rand_augment,
    resize_square,
    train_image,
)
from ovseg_jax.data.decoding import UnreadableImage, crop_box, resized_crop
from ovseg_jax.errors import UserError

COARSE = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
IMAGE = Image.fromarray(COARSE).resize((120, 75), Image.Resampling.BICUBIC)
STAGE_1 = {
    "kind": "crop",
    "size": 24,
    "scale": (0.08, 1.0),
    "color_jitter": (0.4, 0.4, 0.4),
    "rand_augment": {"operations": 2},
}


PNG = encoded(IMAGE)


def view(spec, seed=0, data=PNG):
    return train_image(data, np.random.default_rng(seed), complete_transform(spec))


def test_the_order_is_crop_flip_jitter_rand_augment():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        spec = complete_transform(STAGE_1)
        image = resized_crop(IMAGE, crop_box(IMAGE.size, rng, spec["scale"], spec["ratio"]), 24)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = color_jitter(image, rng, (0.4, 0.4, 0.4))
        image = rand_augment(image, rng, spec["rand_augment"])
        np.testing.assert_array_equal(view(STAGE_1, seed), np.asarray(image))


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_a_pure_function_of_the_generator(seed, size):
    first, second = (view({**STAGE_1, "size": size}, seed) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (size, size, 3) and first.dtype == np.uint8
    other = view({**STAGE_1, "size": size}, seed + 1)
    assert size < 8 or (other != first).any()


def test_flip_probability():
    spec = {"kind": "crop", "size": 8, "scale": (1.0, 1.0), "ratio": (1.6, 1.6)}
    never, always = view({**spec, "flip": 0.0}), view({**spec, "flip": 1.0})
    np.testing.assert_array_equal(always[:, ::-1], never)
    half = [np.array_equal(view(spec, seed), always) for seed in range(200)]
    assert 70 < sum(half) < 130


def test_kind_none_is_the_whole_image():
    np.testing.assert_array_equal(view({"kind": "none", "size": 8}), resize_square(IMAGE, 8))


def test_unreadable_images_have_a_cause():
    for spec in (STAGE_1, {**STAGE_1, "reduced_decoding": True}, {"kind": "none", "size": 8}):
        with pytest.raises(UnreadableImage):
            view(spec, data=PNG[:-30])


def test_jitter_factors_span_their_range():
    assert color_jitter(IMAGE, np.random.default_rng(0), (0.0, 0.0, 0.0)) is IMAGE
    gray = Image.new("RGB", (4, 4), (100, 100, 100))
    levels = [
        np.asarray(color_jitter(gray, np.random.default_rng(seed), (0.4, 0.0, 0.0)))[0, 0, 0]
        for seed in range(300)
    ]
    assert 60 <= min(levels) < 64 and 136 < max(levels) <= 140
    # Contrast and saturation do nothing to gray; to colors they do.
    for strengths in ((0.0, 0.9, 0.0), (0.0, 0.0, 0.9)):
        assert np.asarray(color_jitter(gray, np.random.default_rng(0), strengths)).std() == 0
        changed = color_jitter(IMAGE, np.random.default_rng(0), strengths)
        assert (np.asarray(changed) != np.asarray(IMAGE)).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "blur"}, "kind must be 'none' or 'crop'"),
        ({"siez": 8}, "size"),
        ({"size": 0}, "size"),
        ({"flip": True}, "flip must be a probability"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.2)}, "scale must be two shares"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"color_jitter": (0.4, 0.4)}, "color_jitter"),
        ({"rand_augment": {"operation": 2}}, "rand_augment.operation is no field"),
        ({"rand_augment": {"magnitude": 11.0}}, "magnitude"),
        ({"rand_augment": {"deviation": -1.0}}, "deviation"),
        ({"rand_augment": {"probability": 2.0}}, "probability"),
        ({"erase": {"area": (0.1, 2.0)}}, "erase.area"),
        ({"erase": {"probability": -0.1}}, "erase.probability"),
        ({"kind": "none", "erase": {"probability": 0.5}}, "erase"),
        ({"kind": "none", "rand_augment": {"operations": 1}}, "rand_augment"),
        ({"kind": "none", "reduced_decoding": True}, "reduced_decoding"),
    ],
)
def test_wrong_fields_are_named(change, said):
    with pytest.raises(UserError, match=said):
        complete_transform({"kind": "crop", "size": 8, **change})
    with pytest.raises(UserError, match="lacks 'size'"):
        complete_transform({"kind": "crop"})
    assert complete_transform({"kind": "crop", "size": 8})["rand_augment"]["operations"] == 0


# ---- RandAugment: each operation against plain Pillow, and how often each is drawn

SPEC = {"operations": 2, "magnitude": 9.0, "deviation": 0.5, "probability": 0.5}
SMOOTH = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
# Neither side a multiple of anything, smooth, full range.
ODD_SIZED = Image.fromarray(SMOOTH).resize((53, 41), Image.Resampling.BICUBIC)
MID_LEVELS = Image.fromarray((np.asarray(ODD_SIZED) // 2 + 40).astype(np.uint8))


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
    found = apply_operation(MID_LEVELS, name, float(magnitude), sign)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(plain(MID_LEVELS)))


@given(
    st.sampled_from(list(OPERATIONS)),
    st.floats(0, 10),
    st.sampled_from([-1, 1]),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_size_mode_and_source_stay(name, magnitude, sign, width, height):
    assert len(OPERATIONS) == 15 and {row[0] for row in GOLDEN} == set(OPERATIONS)
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels.copy())
    found = apply_operation(image, name, magnitude, sign)
    assert found.size == (width, height) and found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)
    again = apply_operation(image, name, magnitude, sign)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))


def drawn(monkeypatch, spec, count):
    """(name, magnitude, sign) of every operation done in `count` images."""
    calls = []
    monkeypatch.setattr(augment, "apply_operation", lambda i, *rest: calls.append(rest) or i)
    rng = np.random.default_rng(0)
    for _ in range(count):
        rand_augment(ODD_SIZED, rng, spec)
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
