"""From the bytes of an image file to upright RGB. Bad files raise one exception with a cause."""

import contextlib
import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ovseg_jax.data.crop import Box

# More pixels than this are refused before they are decoded: a small file can hold a huge image.
MAX_PIXELS = 2**26
# What a JPEG decoder can divide both sides by while it decodes, for less than the work.
_REDUCTIONS = (8, 4, 2)


class UnreadableImage(Exception):
    """An image that cannot be decoded. `cause` is a short stable name to count by."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to RGB, upright.

    The first frame of an animation is taken, the EXIF rotation is applied, transparent parts
    become white, 16-bit gray is scaled to 8 bits.

    Raises:
      UnreadableImage: with the cause 'empty', 'too large', 'not an image' or 'damaged'.
    """
    with _opened(data, max_pixels) as image:
        return _upright(image)


def decode_reduced(
    data: bytes,
    choose: Callable[[tuple[int, int]], Box],
    size: int,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, Box]:
    """Decodes a JPEG at 1/2, 1/4 or 1/8 of its size where a part of it is going to be shrunk.

    The reduced image averages pixels in the decoder's 8 x 8 blocks, so what is made of it differs
    slightly from what the whole image gives: on average by 0.3 to 0.8 of 256 levels for photographs
    of 1000 pixels (24 crops each to 224), by up to 3.7 where the part is hardly twice its new size,
    which leaves sharp edges sharper; a test holds made-up pictures to less than 2. Other formats,
    and rotated files, are decoded whole.

    Args:
      choose: (width, height) of the upright image -> the part (left, top, right, bottom) in pixels
        that will be resized.
      size: the side, in pixels, of what that part will be resized to; the reduced part is never
        smaller.

    Returns:
      The image, and the part in its pixels.

    Raises:
      UnreadableImage: as `decode`.
    """
    with _opened(data, max_pixels) as image:
        width, height = image.size
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        turned = orientation in (5, 6, 7, 8)
        box = choose((height, width) if turned else (width, height))
        if image.format == "JPEG" and orientation == 1:
            shortest = min(box[2] - box[0], box[3] - box[1])
            factor = next((f for f in _REDUCTIONS if shortest >= f * size), 1)
            reduced = image.draft(None, (width // factor, height // factor))
            if factor > 1 and reduced is not None:
                # The decoder may choose another factor, and tells the exact size.
                shrink = reduced[1][2] / width
                left, top, right, bottom = (side * shrink for side in box)
                box = (left, top, right, bottom)
        return _upright(image), box


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: transparent parts white, 16-bit gray scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these modes at 255 instead of scaling them.
        values = np.asarray(image, np.float64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257.0
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    # In place, since a copy of a large image takes as long as a quarter of its decoding.
    ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    if not data:
        raise UnreadableImage("empty", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage("too large", f"{width}x{height} pixels")
            yield image
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage("too large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not an image", f"{len(data)} bytes") from error
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged input (SyntaxError, struct.error,
        # IndexError, ...); all of it means the same to the caller.
        raise UnreadableImage("damaged", f"{type(error).__name__}: {error}") from error
