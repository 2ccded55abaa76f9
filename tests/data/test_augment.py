"""The transform of a training image as a whole, and the fields that describe it."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovseg_jax.data.augment import complete_transform, resize_square, train_image
from ovseg_jax.data.color_jitter import color_jitter
from ovseg_jax.data.crop import crop_box, resized_part
from ovseg_jax.data.decoding import UnreadableImage
from ovseg_jax.data.rand_augment import rand_augment
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


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encode(IMAGE)


def view(spec, seed=0, data=PNG):
    return train_image(data, np.random.default_rng(seed), complete_transform(spec))


def test_the_order_is_crop_flip_jitter_rand_augment():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        spec = complete_transform(STAGE_1)
        image = resized_part(IMAGE, crop_box(IMAGE.size, rng, spec["scale"], spec["ratio"]), 24)
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


def test_other_seeds_give_other_views():
    assert len({view(STAGE_1, seed).tobytes() for seed in range(10)}) == 10


def test_flip_probability():
    spec = {"kind": "crop", "size": 8, "scale": (1.0, 1.0), "ratio": (1.6, 1.6)}
    never, always = view({**spec, "flip": 0.0}), view({**spec, "flip": 1.0})
    np.testing.assert_array_equal(always[:, ::-1], never)
    half = [np.array_equal(view(spec, seed), always) for seed in range(200)]
    assert 70 < sum(half) < 130


def test_kind_none_is_the_whole_image():
    np.testing.assert_array_equal(view({"kind": "none", "size": 8}), resize_square(IMAGE, 8))


def test_one_pixel_is_an_image():
    data = encode(Image.new("RGB", (1, 1), (9, 9, 9)))
    for spec in ({"kind": "none", "size": 8}, {"kind": "crop", "size": 8}):
        assert (view(spec, data=data) == 9).all()
    assert view(STAGE_1, data=data).shape == (24, 24, 3)


def test_reduced_decoding_takes_the_same_part():
    big = IMAGE.resize((1200, 750), Image.Resampling.BICUBIC)
    data = encode(big, "JPEG", quality=95)
    spec = {"kind": "crop", "size": 32, "scale": (0.3, 1.0)}
    for seed in range(5):
        whole = view(spec, seed, data).astype(np.float32)
        reduced = view({**spec, "reduced_decoding": True}, seed, data).astype(np.float32)
        assert 0 < np.abs(whole - reduced).mean() < 2


def test_unreadable_images_have_a_cause():
    for spec in (STAGE_1, {**STAGE_1, "reduced_decoding": True}, {"kind": "none", "size": 8}):
        with pytest.raises(UnreadableImage):
            view(spec, data=PNG[:-30])


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_jitter_keeps_the_shape_and_is_off_at_zero(brightness, contrast, saturation, seed):
    strengths = (brightness, contrast, saturation)
    image = color_jitter(IMAGE, np.random.default_rng(seed), strengths)
    assert image.size == IMAGE.size and image.mode == "RGB"
    if not any(strengths):
        assert image is IMAGE


def test_jitter_factors_span_their_range():
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
        ({"kind": "blur"}, "'blur'"),
        ({"siez": 8}, "size"),
        ({"size": 0}, "size"),
        ({"flip": True}, "flip is a probability"),
        ({"flip": 1.5}, "flip is a probability"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.2)}, "exceed"),
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


def test_missing_fields():
    with pytest.raises(UserError, match="lacks 'size'"):
        complete_transform({"kind": "crop"})
    assert complete_transform({"kind": "crop", "size": 8})["rand_augment"]["operations"] == 0
