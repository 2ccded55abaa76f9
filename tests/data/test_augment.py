"""Decoding of good and bad files, crops and flips."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovseg_jax.data.augment import (
    UnreadableImage,
    decode,
    horizontal_flip,
    random_resized_crop,
    resize_square,
    train_transform,
)
from ovseg_jax.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encode(Image.fromarray(PIXELS))


def test_lossless_image_comes_back():
    np.testing.assert_array_equal(np.asarray(decode(PNG)), PIXELS)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("P", "PNG"), ("CMYK", "JPEG"), ("LA", "PNG")],
)
def test_every_mode_becomes_rgb(mode, kind):
    image = decode(encode(Image.fromarray(PIXELS).convert(mode), kind))
    assert (image.mode, image.size) == ("RGB", (20, 12))


def test_transparent_parts_are_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, :, 3] = 255
    pixels = np.asarray(decode(encode(Image.fromarray(rgba))))
    assert (pixels[0] == 0).all()
    assert (pixels[1] == 255).all()
    palette = Image.fromarray(np.zeros((2, 2), np.uint8), "L").convert("P")
    assert (np.asarray(decode(encode(palette, transparency=0))) == 255).all()


def test_16_bit_gray_is_scaled_not_clipped():
    values = np.array([[0, 257 * 100, 65535, 257]], np.uint16)
    pixels = np.asarray(decode(encode(Image.fromarray(values))))
    assert pixels[0, :, 0].tolist() == [0, 100, 255, 1]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(Image.fromarray(PIXELS), "JPEG", exif=exif)).size == (12, 20)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


def test_one_pixel_is_an_image():
    data = encode(Image.new("RGB", (1, 1), (1, 2, 3)))
    assert (resize_square(decode(data), 8) == [1, 2, 3]).all()
    spec = {"kind": "crop", "size": 8}
    assert train_transform(decode(data), RNG, spec).shape == (8, 8, 3)


def bomb(side):
    """A PNG header that promises side x side pixels, with no pixel behind it."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (PNG[:-30], "damaged"),
        (encode(Image.fromarray(PIXELS), "JPEG")[:-80], "damaged"),
        (PNG[:60] + b"\0" * 40 + PNG[100:], "damaged"),
        (bomb(9000), "too large"),
        (bomb(20000), "too large"),
    ],
)
def test_bad_files_have_a_cause(data, cause):
    with pytest.raises(UnreadableImage) as caught:
        decode(data)
    assert caught.value.cause == cause


def test_pixel_limit_is_a_parameter():
    with pytest.raises(UnreadableImage, match="20x12"):
        decode(PNG, max_pixels=239)
    assert decode(PNG, max_pixels=240).size == (20, 12)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(PNG) - 1))
def test_garbage_never_raises_anything_else(noise, at):
    try:
        decode(PNG[:at] + noise + PNG[at + len(noise) :])
    except UnreadableImage as error:
        assert error.cause in {"empty", "not an image", "damaged", "too large"}


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**32),
    st.floats(0.05, 1.0),
    st.floats(0.5, 1.0),
)
def test_crop_has_its_size_whatever_the_image(width, height, seed, least, narrow):
    image = Image.new("RGB", (width, height), (9, 8, 7))
    rng = np.random.default_rng(seed)
    crop = random_resized_crop(image, rng, 6, (least, 1.0), (narrow, 1 / narrow))
    assert crop.dtype == np.uint8
    assert (crop == [9, 8, 7]).all()


def test_crop_takes_the_area_and_ratio_asked_for():
    # Pixel value = position, so the crop's corners tell its box.
    ramp = np.stack(np.broadcast_arrays(np.arange(200)[None], np.arange(100)[:, None], 0), -1)
    image = Image.fromarray(ramp.astype(np.uint8))
    rng = np.random.default_rng(0)
    for _ in range(20):
        crop = random_resized_crop(image, rng, 50, (0.2, 0.3), (1.0, 2.0)).astype(float)
        width = (crop[25, 40, 0] - crop[25, 10, 0]) / 30 * 50
        height = (crop[40, 25, 1] - crop[10, 25, 1]) / 30 * 50
        assert 0.19 < width * height / 20000 < 0.31
        assert 0.95 < width / height < 2.1


def test_too_narrow_an_image_is_cropped_at_its_center():
    image = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(2, 0)).convert("RGB")
    crop = random_resized_crop(image, np.random.default_rng(0), 2, (1.0, 1.0), (1.0, 1.0))
    assert (np.abs(crop[..., 0].astype(int) - 49.5) < 2).all()


def test_transform_is_a_function_of_the_generator():
    image, spec = decode(PNG), {"kind": "crop", "size": 8, "scale": (0.3, 0.6)}
    first, second, other = (
        train_transform(image, np.random.default_rng(seed), spec) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_flip_probability():
    image = decode(PNG)
    spec = {"kind": "crop", "size": 8, "scale": (1.0, 1.0), "ratio": (5 / 3, 5 / 3)}
    always = train_transform(image, RNG, {**spec, "flip": 1.0})
    never = train_transform(image, RNG, {**spec, "flip": 0.0})
    np.testing.assert_array_equal(horizontal_flip(always), never)
    assert (always != never).any()


def test_kind_none_is_the_whole_image():
    image = decode(PNG)
    np.testing.assert_array_equal(
        train_transform(image, RNG, {"kind": "none", "size": 8}), resize_square(image, 8)
    )
    with pytest.raises(UserError, match="'blur'"):
        train_transform(image, RNG, {"kind": "blur", "size": 8})
