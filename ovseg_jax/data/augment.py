"""From encoded bytes to a square uint8 image. Bad files raise one exception with a cause."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ovseg_jax.errors import UserError

# More pixels than this are refused before they are decoded: a small file can hold a huge image.
MAX_PIXELS = 2**26
# Crops are drawn at most this often before the largest centered one is taken.
_TRIES = 10


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
    if not data:
        raise UnreadableImage("empty", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise UnreadableImage("too large", f"{width}x{height} pixels")
            return to_rgb(ImageOps.exif_transpose(opened))
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
    return image.convert("RGB")


def resize_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image at size x size pixels, bilinear with antialiasing; the aspect is not kept."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.uint8)


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    size: int,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> UInt8[np.ndarray, "size size 3"]:
    """A random part of the image at size x size pixels.

    Args:
      scale: least and greatest area of the part, as a fraction of the image.
      ratio: least and greatest width / height of the part; drawn uniformly in its logarithm.

    When no drawn part fits into the image, the largest centered one with an allowed ratio is
    taken.
    """
    box = _crop_box(image.size, rng, scale, ratio)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box), np.uint8)


def _crop_box(
    image_size: tuple[int, int],
    rng: np.random.Generator,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[float, float, float, float]:
    width, height = image_size
    low, high = np.log(ratio[0]), np.log(ratio[1])
    for _ in range(_TRIES):
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = float(np.exp(rng.uniform(low, high)))
        crop_width = float(np.sqrt(area * aspect))
        crop_height = float(np.sqrt(area / aspect))
        if crop_width <= width and crop_height <= height:
            left = float(rng.uniform(0, width - crop_width))
            top = float(rng.uniform(0, height - crop_height))
            return (left, top, min(left + crop_width, width), min(top + crop_height, height))
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return (left, top, left + crop_width, top + crop_height)


def horizontal_flip(
    image: UInt8[np.ndarray, "height width 3"],
) -> UInt8[np.ndarray, "height width 3"]:
    """The image mirrored left to right."""
    return np.ascontiguousarray(image[:, ::-1])


def train_transform(
    image: Image.Image, rng: np.random.Generator, spec: Mapping[str, Any]
) -> UInt8[np.ndarray, "size size 3"]:
    """The transform of a training image.

    Args:
      spec: `kind` is 'none' (the whole image, no randomness) or 'crop' (random resized crop, then
        a mirror image with probability `flip`); `size` in pixels; `scale` (0.4, 1.0), `ratio`
        (3/4, 4/3) and `flip` (0.5) for 'crop'.

    Raises:
      UserError: an unknown kind.
    """
    if spec["kind"] == "none":
        return resize_square(image, spec["size"])
    if spec["kind"] != "crop":
        raise UserError(f"the image transform {spec['kind']!r} is unknown; use 'none' or 'crop'")
    pixels = random_resized_crop(
        image, rng, spec["size"], spec.get("scale", (0.4, 1.0)), spec.get("ratio", (3 / 4, 4 / 3))
    )
    return horizontal_flip(pixels) if rng.random() < spec.get("flip", 0.5) else pixels
