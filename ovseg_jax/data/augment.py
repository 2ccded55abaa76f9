"""The transform of a training image: crop, flip, color jitter, RandAugment; from bytes to uint8.

Random erasing fills in noise after normalization, so the train step applies it on the device
(`ovseg_jax.train.apply`). RandAugment (Cubuk et al., 2020) has the 15 operations that grow
stronger with the magnitude. The published recipe is rand-m9-mstd0.5-inc1 in timm's notation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from ovseg_jax.data.decoding import Box, crop_box, decode, decode_reduced, resized_crop
from ovseg_jax.errors import UserError
from ovseg_jax.flags import filled

KINDS = ("none", "crop")
# Every field but kind and size, with its value where the config leaves it out.
DEFAULTS: dict[str, Any] = {
    "scale": (0.4, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "flip": 0.5,
    "color_jitter": (0.0, 0.0, 0.0),
    "rand_augment": {"operations": 0, "magnitude": 9.0, "deviation": 0.5, "probability": 0.5},
    "erase": {"probability": 0.0, "area": (0.02, 1 / 3), "aspect": (0.3, 1 / 0.3)},
    "reduced_decoding": False,
}
MAX_MAGNITUDE = 10.0


def complete_transform(spec: Mapping[str, Any], where: str = "transform") -> dict[str, Any]:
    """A transform with every field present, checked; errors call it `where`.

    `kind` is 'none' (the whole image, no randomness) or 'crop'; `size` is in pixels. Fields of a
    crop: `scale`, `ratio` (see `decoding.crop_box`), `flip` (probability of a mirror image),
    `color_jitter` (strengths of brightness, contrast, saturation), `rand_augment` (see there),
    `erase` (see `ovseg_jax.train.apply`) and `reduced_decoding` (see `decoding.decode_reduced`).

    Raises:
      UserError: a field is unknown, missing or out of range.
    """
    full = filled(spec, {"kind": None, "size": None, **DEFAULTS}, where)
    for name in ("kind", "size"):
        if name not in spec:
            raise UserError(f"{where} lacks {name!r}")
    jitter, augment, erase = full["color_jitter"], full["rand_augment"], full["erase"]
    # Field -> (its value is right, what it must be).
    rules = {
        "kind": (full["kind"] in KINDS, " or ".join(map(repr, KINDS))),
        "size": (full["size"] >= 1, "at least 1 pixel"),
        "color_jitter": (len(jitter) == 3 and min(jitter) >= 0, "three numbers from 0"),
        "rand_augment.operations": (augment["operations"] >= 0, "a number from 0"),
        "rand_augment.deviation": (augment["deviation"] >= 0, "a number from 0"),
        "rand_augment.magnitude": (0 <= augment["magnitude"] <= MAX_MAGNITUDE, "from 0 to 10"),
        "scale": (_is_range(full["scale"], 1.0), "two shares of the image, the lesser first"),
        "ratio": (_is_range(full["ratio"]), "two numbers above 0, the lesser first"),
        "erase.area": (_is_range(erase["area"], 1.0), "two shares of the image, the lesser first"),
        "erase.aspect": (_is_range(erase["aspect"]), "two numbers above 0, the lesser first"),
    }
    chances = {"flip": full["flip"], "rand_augment.probability": augment["probability"]}
    for name, value in {**chances, "erase.probability": erase["probability"]}.items():
        # A boolean is an int in Python: True would be a probability of 1.
        is_right = not isinstance(value, bool) and 0 <= value <= 1
        rules[name] = (is_right, "a probability, from 0.0 to 1.0")
    for name, (is_right, wanted) in rules.items():
        if not is_right:
            raise UserError(f"{where}.{name} must be {wanted}")
    changes = {
        "color_jitter": max(jitter),
        "rand_augment": augment["operations"],
        "erase": erase["probability"],
        "reduced_decoding": full["reduced_decoding"],
    }
    changed = ", ".join(name for name, strength in changes.items() if strength)
    if full["kind"] == "none" and changed:
        raise UserError(f"{where}.kind is 'none', but {changed} would change images: use 'crop'")
    return full


def _is_range(pair: Sequence[float], most: float = math.inf) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= most


def resize_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image at size x size pixels, bilinear with antialiasing; the aspect is not kept."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.uint8)


def train_image(
    data: bytes, rng: np.random.Generator, spec: Mapping[str, Any]
) -> UInt8[np.ndarray, "size size 3"]:
    """The pixels of a view of an encoded image, for training, in the order of timm's transform.

    `spec` is from `complete_transform`. Raises UnreadableImage.
    """
    if spec["kind"] == "none":
        return resize_square(decode(data), spec["size"])

    def choose(image_size: tuple[int, int]) -> Box:
        return crop_box(image_size, rng, spec["scale"], spec["ratio"])

    if spec["reduced_decoding"]:
        image, box = decode_reduced(data, choose, spec["size"])
    else:
        image = decode(data)
        box = choose(image.size)
    image = resized_crop(image, box, spec["size"])
    if rng.random() < spec["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if max(spec["color_jitter"]) > 0:
        image = color_jitter(image, rng, spec["color_jitter"])
    if spec["rand_augment"]["operations"]:
        image = rand_augment(image, rng, spec["rand_augment"])
    return np.asarray(image, np.uint8)


_JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def color_jitter(
    image: Image.Image, rng: np.random.Generator, strengths: Sequence[float]
) -> Image.Image:
    """The image with brightness, contrast and saturation scaled by random factors, in random order.

    For each strength s in this order, the factor is uniform in [1 - s, 1 + s] and at least 0.
    """
    for index in rng.permutation(len(_JITTERED)):
        strength = strengths[index]
        if strength > 0:
            factor = float(rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength))
            image = _JITTERED[index](image).enhance(factor)
    return image


FILL = (124, 116, 104)  # 255 times ImageNet's mean
# The greatest change of each operation, at magnitude 10: the shift in shares of the side.
_DEGREES, _SHEAR, _SHIFT, _FACTOR = 30.0, 0.3, 0.45, 0.9
# Levels that are added, to levels below this.
_ADDED, _ADD_BELOW = 110, 128


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=FILL)


def _affine(image: Image.Image, *terms: int | float) -> Image.Image:
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, affine, terms, resample=bilinear, fillcolor=FILL)


def _enhance(kind: Callable[[Image.Image], Any], image: Image.Image, change: float) -> Image.Image:
    return kind(image).enhance(max(0.1, 1.0 + change * _FACTOR))


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    # Keeps 4 bits at strength 0 and none at 1, which ImageOps.posterize refuses.
    mask = 256 - 2 ** (4 + int(strength * 4))
    return image.point([level & mask for level in range(256)] * len(image.getbands()))


def _solarize_add(image: Image.Image, strength: float) -> Image.Image:
    added = int(strength * _ADDED)
    table = [min(255, v + added) if v < _ADD_BELOW else v for v in range(256)]
    return image.point(table * len(image.getbands()))


# (i: the image, s: the strength, 0 to 1, g: the sign, -1 or 1) -> image.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "auto_contrast": lambda i, s, g: ImageOps.autocontrast(i),
    "equalize": lambda i, s, g: ImageOps.equalize(i),
    "invert": lambda i, s, g: ImageOps.invert(i),
    "rotate": lambda i, s, g: _rotate(i, g * s * _DEGREES),
    "posterize": lambda i, s, g: _posterize(i, s),
    "solarize": lambda i, s, g: ImageOps.solarize(i, 256 - int(s * 256)),
    "solarize_add": lambda i, s, g: _solarize_add(i, s),
    "color": lambda i, s, g: _enhance(ImageEnhance.Color, i, g * s),
    "contrast": lambda i, s, g: _enhance(ImageEnhance.Contrast, i, g * s),
    "brightness": lambda i, s, g: _enhance(ImageEnhance.Brightness, i, g * s),
    "sharpness": lambda i, s, g: _enhance(ImageEnhance.Sharpness, i, g * s),
    "shear_x": lambda i, s, g: _affine(i, 1, g * s * _SHEAR, 0, 0, 1, 0),
    "shear_y": lambda i, s, g: _affine(i, 1, 0, 0, g * s * _SHEAR, 1, 0),
    "translate_x": lambda i, s, g: _affine(i, 1, 0, g * s * _SHIFT * i.width, 0, 1, 0),
    "translate_y": lambda i, s, g: _affine(i, 1, 0, 0, 0, 1, g * s * _SHIFT * i.height),
}
_NAMES = tuple(OPERATIONS)


def apply_operation(image: Image.Image, name: str, magnitude: float, sign: int) -> Image.Image:
    """An operation of `OPERATIONS` on an RGB image, at a magnitude from 0 to 10.

    The sign, 1 or -1, is the direction of rotation, shears and shifts, and whether the four
    enhancements grow or shrink.
    """
    return OPERATIONS[name](image, magnitude / MAX_MAGNITUDE, sign)


def rand_augment(
    image: Image.Image, rng: np.random.Generator, spec: Mapping[str, Any]
) -> Image.Image:
    """The image after `operations` drawn at random with replacement, each done with `probability`.

    The strength is normal with mean `magnitude` and the standard deviation `deviation`, clipped to
    0..10. Pixels that a moved image uncovers get the mean color of ImageNet.
    """
    for index in rng.integers(len(_NAMES), size=int(spec["operations"])):
        if rng.random() >= spec["probability"]:
            continue
        magnitude = float(rng.normal(spec["magnitude"], spec["deviation"]))
        magnitude = min(max(magnitude, 0.0), MAX_MAGNITUDE)
        sign = 1 if rng.random() < 0.5 else -1
        image = apply_operation(image, _NAMES[index], magnitude, sign)
    return image
