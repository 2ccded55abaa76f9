"""Random resized crops, as image classifiers train with (Szegedy et al., 2015) and timm draws."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# Left, top, right, bottom in pixels: whole ones, or fractions where the image was reduced.
Box = tuple[int | float, int | float, int | float, int | float]
# Crops are drawn at most this often before the largest centered one is taken.
_TRIES = 10


def crop_box(
    image_size: tuple[int, int],
    rng: np.random.Generator,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> Box:
    """A random part (left, top, right, bottom) of an image, in whole pixels.

    Args:
      image_size: (width, height).
      scale: least and greatest area of the part, as a fraction of the image.
      ratio: least and greatest width / height of the part; drawn uniformly in its logarithm.

    When no drawn part fits into the image, the largest centered one with an allowed ratio is
    taken.
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


def resized_part(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The part of the image at size x size pixels, bilinear with antialiasing.

    A part in whole pixels is cut out first, so that no pixel outside of it counts.
    """
    whole = tuple(int(side) for side in box)
    if whole == tuple(box):
        return image.crop(whole).resize((size, size), Image.Resampling.BILINEAR)
    right, bottom = min(box[2], image.width), min(box[3], image.height)
    inside = (box[0], box[1], right, bottom)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=inside)
