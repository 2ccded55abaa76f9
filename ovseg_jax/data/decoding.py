"""From the bytes of an image file to upright RGB, and random resized crops of it."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image

# Endings of image files, in lower case.
IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".jp2", ".j2k", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".gif"),
)
# Left, top, right, bottom in pixels: integers, or fractions where the image was reduced.
Box = tuple[int | float, int | float, int | float, int | float]
# An image with more pixels is refused before it is decoded: a small file can hold a huge image.
MAX_PIXELS = 2**26
# A JPEG decoder can divide both sides by these, which makes decoding faster.
_REDUCTIONS = (8, 4, 2)
# Attempts at a crop that fits before the largest centered one is taken.
_TRIES = 10
# EXIF orientation -> what turns the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF: the largest gray value, of any type and of integers.
_LARGEST_FLOAT, _LARGEST = 341, 281
# Files and folders of macOS, Windows and Jupyter, in lower case.
_FOREIGN = (".ds_store", "__macosx", "thumbs.db", "desktop.ini", ".ipynb_checkpoints")


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name was left by another program and holds no data."""
    return name.startswith("._") or name.lower() in _FOREIGN


class UnreadableImage(Exception):
    """An image that cannot be decoded. `cause` is a short stable name to count by."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


def decode(data: bytes) -> Image.Image:
    """Decodes an image file to RGB, of an animation the first frame; see `upright` and `to_rgb`.

    Raises:
      UnreadableImage: with the cause 'empty', 'too large', 'not an image', 'unknown range' or
        'damaged'.
    """
    with opened(data) as image:
        return upright(image)


def decode_reduced(
    data: bytes, choose: Callable[[tuple[int, int]], Box], size: int
) -> tuple[Image.Image, Box]:
    """Decodes a JPEG at 1/2, 1/4 or 1/8 of its size if the crop of it will be shrunk that much.

    The decoder averages pixels within its 8 x 8 blocks, so the result differs by under one of 256
    levels on average, and by up to 4 where the crop is hardly twice its new size. Files of other
    formats, and rotated ones, are decoded whole. Raises UnreadableImage as `decode` does.

    Args:
      data: the file.
      choose: maps (width, height) of the upright image to the crop in pixels.
      size: the side to which the crop will be resized; the reduced crop is never smaller.

    Returns:
      The image, and the crop in its pixels.
    """
    with opened(data) as image:
        if image.format != "JPEG":
            image.load()
        width, height = image.size
        orientation = orientation_of(image)
        turned = orientation in (5, 6, 7, 8)
        box = choose((height, width) if turned else (width, height))
        if image.format == "JPEG" and orientation == 1:
            shortest = min(box[2] - box[0], box[3] - box[1])
            factor = next((f for f in _REDUCTIONS if shortest >= f * size), 1)
            reduced = image.draft(None, (width // factor, height // factor))
            if factor > 1 and reduced is not None:
                # The decoder may choose another factor; it returns the exact size.
                box = tuple(side * (reduced[1][2] / width) for side in box)
        return upright(image), box


def crop_box(
    image_size: tuple[int, int],
    rng: np.random.Generator,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> Box:
    """A random crop of an image of (width, height), in integer pixels, drawn as timm does.

    `scale` has the least and greatest area of the crop, as a fraction of the image, and `ratio` the
    least and greatest width / height, drawn uniformly in the logarithm (Szegedy et al., 2015). If
    no drawn crop fits into the image, it is the largest centered crop with an allowed ratio.
    """
    width, height = image_size
    low, high = np.log(ratio[0]), np.log(ratio[1])
    for _ in range(_TRIES):
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = float(np.exp(rng.uniform(low, high)))
        across = max(1, round(float(np.sqrt(area * aspect))))
        down = max(1, round(float(np.sqrt(area / aspect))))
        if across <= width and down <= height:
            left = int(rng.integers(0, width - across, endpoint=True))
            top = int(rng.integers(0, height - down, endpoint=True))
            return (left, top, left + across, top + down)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    across = max(1, min(width, round(height * aspect)))
    down = max(1, min(height, round(width / aspect)))
    left, top = (width - across) // 2, (height - down) // 2
    return (left, top, left + across, top + down)


def resized_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The crop of the image at size x size pixels, bilinear with antialiasing.

    A crop in integer pixels is cut out first, so that no pixel outside of it counts.
    """
    whole = tuple(int(side) for side in box)
    if whole == tuple(box):
        return image.crop(whole).resize((size, size), Image.Resampling.BILINEAR)
    right, bottom = min(box[2], image.width), min(box[3], image.height)
    inside = (box[0], box[1], right, bottom)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=inside)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: transparent areas white, other ranges scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _in_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A gray image of 16 or 32 bits, which Pillow would clip at 255 instead of scaling it.

    The largest value is what a TIFF file says; else 65535 for 16 bits, 255 or 65535 for 32, and 1
    or 255 for floating point, where the values reach half of it. Others are refused: 12 bits stored
    in 16, or percents, would be nearly black.
    """
    values = np.asarray(image, np.float64)
    tags = getattr(image, "tag_v2", {})
    told = np.ravel(tags.get(_LARGEST_FLOAT, tags.get(_LARGEST, ())))
    tops = (1, 255) if image.mode == "F" else (255, 65535)
    tops = told[:1] if told.size else (65535,) if image.mode.startswith("I;16") else tops
    low, high = values.min(initial=0), values.max(initial=0)
    least = 0 if told.size or not high else 0.5
    fits = (top for top in tops if 0 < top and low >= 0 and least * top <= high <= top)
    top = next(fits, None)
    if top is None:
        values = f"gray values from {low:g} to {high:g} in mode {image.mode}"
        raise UnreadableImage("unknown range", f"{values}; save them as 0 to 255")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """An opened image as RGB, turned as its EXIF orientation says."""
    # The pixels first: a PNG may have its EXIF data behind them.
    image.load()
    turn = _TURNS.get(orientation_of(image))
    # Not ImageOps.exif_transpose, which fails where any other tag is damaged.
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where damaged metadata do not tell."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Pillow raises nearly anything on damaged metadata. They say nothing of the pixels.
        return 1


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Pillow's image of a file, not decoded yet; UnreadableImage also of what the block does."""
    if not data:
        raise UnreadableImage("empty", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage("too large", f"{width}x{height} pixels")
            yield image
    except (UnreadableImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage("too large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not an image", f"{len(data)} bytes") from error
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged input (SyntaxError, struct.error,
        # IndexError, ...); all of it means the same to the caller.
        raise UnreadableImage("damaged", f"{type(error).__name__}: {error}") from error
