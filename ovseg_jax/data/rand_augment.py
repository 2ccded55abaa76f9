"""RandAugment (Cubuk et al., 2020) with the 15 operations that grow stronger with the magnitude.

The published recipe, rand-m9-mstd0.5-inc1 in timm's notation: of each image, 2 operations are
drawn with replacement and each is done with probability 0.5, at a magnitude drawn from a normal
distribution of mean 9 and deviation 0.5, within 0 to 10. What is uncovered by moving an image is
filled with the mean color of ImageNet.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0
FILL = (124, 116, 104)  # 255 times ImageNet's mean
_BILINEAR = Image.Resampling.BILINEAR

# The greatest change of each operation, at magnitude 10.
MAX_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_SHIFT = 0.45  # of the side
MAX_FACTOR_CHANGE = 0.9
MAX_ADDED = 110  # levels
ADD_BELOW = 128  # levels

# (image, strength 0..1, sign -1 or 1) -> image
Operation = Callable[[Image.Image, float, int], Image.Image]


def _rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.rotate(sign * strength * MAX_DEGREES, resample=_BILINEAR, fillcolor=FILL)


def _affine(image: Image.Image, *terms: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, terms, resample=_BILINEAR, fillcolor=FILL
    )


def _shear_x(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return _affine(image, 1.0, sign * strength * MAX_SHEAR, 0.0, 0.0, 1.0, 0.0)


def _shear_y(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return _affine(image, 1.0, 0.0, 0.0, sign * strength * MAX_SHEAR, 1.0, 0.0)


def _translate_x(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return _affine(image, 1.0, 0.0, sign * strength * MAX_SHIFT * image.width, 0.0, 1.0, 0.0)


def _translate_y(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return _affine(image, 1.0, 0.0, 0.0, 0.0, 1.0, sign * strength * MAX_SHIFT * image.height)


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    def enhanced(image: Image.Image, strength: float, sign: int) -> Image.Image:
        return kind(image).enhance(max(0.1, 1.0 + sign * strength * MAX_FACTOR_CHANGE))

    return enhanced


def _posterize(image: Image.Image, strength: float, sign: int) -> Image.Image:
    # 4 bits down to none, by masking them away.
    kept = 4 - int(strength * 4)
    mask = 256 - 2 ** (8 - kept)
    return image.point([level & mask for level in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(strength * 256))


def _solarize_add(image: Image.Image, strength: float, sign: int) -> Image.Image:
    added = int(strength * MAX_ADDED)
    table = [min(255, v + added) if v < ADD_BELOW else v for v in range(256)]
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
_NAMES = tuple(OPERATIONS)


def apply_operation(image: Image.Image, name: str, magnitude: float, sign: int) -> Image.Image:
    """One operation on an RGB image.

    Args:
      name: of `OPERATIONS`.
      magnitude: 0 to 10. The first three operations do not depend on it.
      sign: 1 or -1: the direction of those that have two (rotation, shears, shifts, and the four
        enhancements, which grow or shrink).
    """
    return OPERATIONS[name](image, magnitude / MAX_MAGNITUDE, sign)


def rand_augment(
    image: Image.Image, rng: np.random.Generator, spec: Mapping[str, Any]
) -> Image.Image:
    """The image after `operations` operations drawn at random.

    Args:
      spec: `operations`, how many; `probability` of each being done; `magnitude` and `deviation`,
        mean and standard deviation of their strength, which stays within 0 to 10.
    """
    for index in rng.integers(len(_NAMES), size=int(spec["operations"])):
        if rng.random() >= spec["probability"]:
            continue
        magnitude = float(rng.normal(spec["magnitude"], spec["deviation"]))
        magnitude = min(max(magnitude, 0.0), MAX_MAGNITUDE)
        sign = 1 if rng.random() < 0.5 else -1
        image = apply_operation(image, _NAMES[index], magnitude, sign)
    return image
