"""Decoding of good and bad files, whole and reduced, and random resized crops."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_folders import encoded
from PIL import Image

from ovseg_jax.data.decoding import (
    UnreadableImage,
    crop_box,
    decode,
    decode_reduced,
    resized_crop,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


PNG = encoded(Image.fromarray(PIXELS))


def test_pixels_come_back():
    np.testing.assert_array_equal(np.asarray(decode(PNG)), PIXELS)
    data = encoded(Image.new("RGB", (1, 1), (1, 2, 3)))
    assert np.asarray(decode(data)).tolist() == [[[1, 2, 3]]]
    values = np.array([[0, 257 * 100, 65535, 257]], np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(values))))
    assert pixels[0, :, 0].tolist() == [0, 100, 255, 1]


def test_transparent_parts_are_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, :, 3] = 255
    pixels = np.asarray(decode(encoded(Image.fromarray(rgba))))
    assert (pixels[0] == 0).all()
    assert (pixels[1] == 255).all()
    palette = Image.fromarray(np.zeros((2, 2), np.uint8), "L").convert("P")
    assert (np.asarray(decode(encoded(palette, transparency=0))) == 255).all()


@pytest.mark.parametrize(
    "largest, tags, expected",
    [(1.0, {}, 255), (200.0, {}, 200), (0.5, {341: 2.0}, 64), (np.uint16(4095), {281: 4095}, 255)]
    + [(300.0, {}, None), (-1.0, {}, None), (np.nan, {}, None), (0.0, {}, 0)]
    # Perhaps 12 bits in 16, a little over 1, percents: nearly black, if the type decided.
    + [(np.uint16(4095), {}, None), (1.65, {}, None), (100.0, {}, None)],
)
def test_the_range_comes_from_the_file(largest, tags, expected):
    values = np.full((3, 4), largest, getattr(largest, "dtype", np.float32))
    values = values if values.dtype == np.uint16 else values.astype(np.float32)
    data = encoded(Image.fromarray(values), "TIFF", tiffinfo=tags)
    if expected is None:
        with pytest.raises(UnreadableImage, match="unknown range"):
            decode(data)
    else:
        assert np.asarray(decode(data)).max() == expected


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
        (b"", "empty"), (b"<html>not found</html>", "not an image"), (PNG[:-30], "damaged"),
        (encoded(Image.fromarray(PIXELS), "JPEG")[:-80], "damaged"),
        (PNG[:60] + b"\0" * 40 + PNG[100:], "damaged"), (bomb(9000), "too large"),
        (bomb(20000), "too large"),
    ],
)  # fmt: skip
def test_bad_files_have_a_cause(data, cause):
    for read in (decode, lambda data: decode_reduced(data, lambda size: (0, 0, *size), 8)):
        with pytest.raises(UnreadableImage) as caught:
            read(data)
        assert caught.value.cause == cause


def with_broken_exif():
    """A PNG whose EXIF chunk is none, and a JPEG turned by tag 6 whose resolution is a text."""
    chunk = b"eXIfthis is no TIFF header"
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    tags = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI", 0x11A, 2, 4) + b"72dp"
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    turned = Image.fromarray(PIXELS).transpose(Image.Transpose.ROTATE_90)
    return PNG[:33] + chunk + PNG[33:], encoded(turned, "JPEG", exif=exif, quality=95)


def test_damaged_metadata_are_no_damaged_pixels():
    png, jpeg = with_broken_exif()
    np.testing.assert_array_equal(np.asarray(decode(png)), PIXELS)
    plain = decode(encoded(Image.fromarray(PIXELS), "JPEG", quality=95))
    difference = np.asarray(decode(jpeg), np.float32) - np.asarray(plain)
    assert np.abs(difference).mean() < 8, "upright"
    reduced, box = decode_reduced(jpeg, lambda size: (0, 0, *size), 4)
    assert box == (0, 0, 20, 12) and reduced.size == (20, 12)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(PNG) - 1))
def test_garbage_never_raises_anything_else(noise, at):
    try:
        decode(PNG[:at] + noise + PNG[at + len(noise) :])
    except UnreadableImage as error:
        assert error.cause in {"empty", "not an image", "damaged", "too large"}


# ---- reduced


def picture(width, height, seed=0):
    """Smooth shapes with edges and a little noise, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 64 + 2, width // 64 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    blocks = Image.fromarray(coarse[::-1]).resize((width, height), Image.Resampling.NEAREST)
    mixed = np.asarray(Image.blend(smooth, blocks, 0.3), np.float32)
    return Image.fromarray(np.clip(mixed + rng.normal(0, 4, mixed.shape), 0, 255).astype(np.uint8))


def both_ways(data, box, size):
    """The part at its size: from the whole image, and from a reduced one."""
    image, part = decode_reduced(data, lambda _: box, size)
    whole, reduced = resized_crop(decode(data), box, size), resized_crop(image, part, size)
    return image.size, np.asarray(whole, np.float32), np.asarray(reduced, np.float32)


@pytest.mark.parametrize(
    ("box", "factor"),
    [((10, 20, 320, 330), 4), ((10, 21, 200, 190), 2), ((3, 5, 93, 90), 1), ((0, 0, 701, 523), 8)],
)
def test_reduced_decoding_stays_within_its_tolerance(box, factor):
    data = encoded(picture(701, 523), "JPEG", quality=90)
    found, whole, reduced = both_ways(data, box, 64)
    assert found == (-(-701 // factor), -(-523 // factor))
    difference = np.abs(whole - reduced)
    assert difference.mean() < 2
    # A part that was shifted or stretched by a pixel would differ by more than that.
    data = encoded(picture(701, 523).transform((701, 523), 0, (1, 0, 3, 0, 1, 3)), "JPEG")
    assert np.abs(both_ways(data, box, 64)[1] - whole).mean() > 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_of_rotated_files_shows_the_same(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(200, 120), "JPEG", exif=exif)
    sizes = []

    def choose(size):
        sizes.append(size)
        return (10, 20, size[0] - 4, size[1] - 2)

    image, part = decode_reduced(data, choose, 8)
    (upright,) = sizes
    assert upright == decode(data).size == ((200, 120) if orientation < 5 else (120, 200))
    whole = np.asarray(resized_crop(decode(data), choose(upright), 8), np.float32)
    reduced = np.asarray(resized_crop(image, part, 8), np.float32)
    assert np.abs(whole - reduced).mean() < 2


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG")])
def test_reduced_decoding_of_other_files(mode, kind):
    data = encoded(picture(256, 256).convert(mode), kind)
    image, part = decode_reduced(data, lambda size: (0, 0, 256, 256), 64)
    assert image.mode == "RGB" and image.size == ((64, 64) if kind == "JPEG" else (256, 256))
    assert part == (0, 0, *image.size)


# ---- crops


SIDES, SHARES = st.integers(1, 300), st.floats(0.05, 1.0)


@given(SIDES, SIDES, st.integers(0, 2**32), SHARES, st.floats(0.3, 1.0))
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


def test_where_nothing_fits_the_center_is_taken():
    rng = np.random.default_rng(0)
    assert crop_box((100, 2), rng, (1.0, 1.0), (1.0, 1.0)) == (49, 0, 51, 2)
    assert crop_box((2, 100), rng, (1.0, 1.0), (0.5, 1.0)) == (0, 48, 2, 52)
    assert crop_box((30, 30), rng, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 30, 30)


def test_parts_in_fractions_of_pixels():
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3))
    part = np.asarray(resized_crop(Image.fromarray(ramp.copy()), (10.5, 0.0, 90.5, 100.0), 4))
    np.testing.assert_allclose(part[1, :, 0], [20, 40, 60, 80], atol=1)
