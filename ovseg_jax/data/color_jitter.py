"""Color jitter: brightness, contrast and saturation by random factors, in random order."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def color_jitter(
    image: Image.Image, rng: np.random.Generator, strengths: Sequence[float]
) -> Image.Image:
    """The image with its brightness, contrast and saturation changed, each by its own factor.

    Args:
      strengths: of (brightness, contrast, saturation); a factor is uniform in 1 - s .. 1 + s, not
        below 0. At 0 that property stays as it is.
    """
    for index in rng.permutation(len(_ENHANCERS)):
        strength = strengths[index]
        if strength > 0:
            factor = float(rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength))
            image = _ENHANCERS[index](image).enhance(factor)
    return image
