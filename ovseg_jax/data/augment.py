"""The transform of a training image: crop, flip, color jitter, RandAugment; from bytes to uint8.

Random erasing is a field of the transform too, but it fills in noise after normalization, so the
train step applies it on the device (`ovseg_jax.train.apply`).

RandAugment (Cubuk et al., 2020) has the 15 operations that grow stronger with the magnitude. The
published recipe is rand-m9-mstd0.5-inc1 in timm's notation: two operations are drawn for each image
with replacement, and each is applied with probability 0.5 at a magnitude drawn from a normal
distribution of mean 9 and deviation 0.5, clipped to 0..10. Pixels that a moved image uncovers get
the mean color of ImageNet.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from ovseg_jax.data.decoding import Box, crop_box, decode, decode_reduced, resized_crop
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

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
    """A transform with every field present, checked.

    Args:
      spec: `kind` is 'none' (the whole image, no randomness) or 'crop'; `size` is in pixels. Fields
        of a crop: `scale`, `ratio` (see `decoding.crop_box`), `flip` (probability of a mirror
        image), `color_jitter` (strengths of brightness, contrast, saturation), `rand_augment` (see
        `rand_augment`), `erase` (see `ovseg_jax.train.apply`) and `reduced_decoding` (see
        `decoding.decode_reduced`).
      where: the name of the transform in errors.

    Raises:
      UserError: a field is unknown, missing or out of range.
    """
    _check_names(spec, {"kind": None, "size": None, **DEFAULTS}, where)
    for name in ("kind", "size"):
        if name not in spec:
            raise UserError(f"{where} lacks {name!r}")
    full = {**DEFAULTS, **dict(spec.items())}
    for name in ("rand_augment", "erase"):
        _check_names(full[name], DEFAULTS[name], f"{where}.{name}")
        full[name] = {**DEFAULTS[name], **dict(full[name].items())}
    if full["kind"] not in KINDS:
        raise UserError(
            f"the image transform {full['kind']!r} is unknown; use {' or '.join(map(repr, KINDS))}"
        )
    _check_values(full, where)
    augment, erase = full["rand_augment"], full["erase"]
    changes = {
        "color_jitter": max(full["color_jitter"]),
        "rand_augment": augment["operations"],
        "erase": erase["probability"],
        "reduced_decoding": full["reduced_decoding"],
    }
    changed = [name for name, strength in changes.items() if strength]
    if full["kind"] == "none" and changed:
        raise UserError(
            f"{where}.kind is 'none', which leaves images as they are, but "
            f"{', '.join(changed)} would change them: set kind = 'crop'"
        )
    return full


def _check_names(spec: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for name in spec:
        if name not in known:
            raise UserError(f"{where}.{name} is no field{nearest(name, list(known))}")


def _check_values(full: Mapping[str, Any], where: str) -> None:
    jitter, augment, erase = full["color_jitter"], full["rand_augment"], full["erase"]
    if full["size"] < 1:
        raise UserError(f"{where}.size must be at least 1 pixel")
    if len(jitter) != 3 or min(jitter) < 0:
        raise UserError(
            f"{where}.color_jitter must be three numbers from 0: brightness, contrast, saturation"
        )
    if augment["operations"] < 0 or augment["deviation"] < 0:
        raise UserError(f"{where}.rand_augment: operations and deviation must not be negative")
    if not 0 <= augment["magnitude"] <= MAX_MAGNITUDE:
        raise UserError(f"{where}.rand_augment.magnitude must be from 0 to {MAX_MAGNITUDE:g}")
    ranges = {"scale": full["scale"], "ratio": full["ratio"]}
    ranges |= {"erase.area": erase["area"], "erase.aspect": erase["aspect"]}
    for name, pair in ranges.items():
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise UserError(f"{where}.{name} must be two numbers above 0, the lesser first")
        if name in ("scale", "erase.area") and pair[1] > 1:
            raise UserError(f"{where}.{name} is a share of the image: it must not exceed 1")
    probabilities = {"flip": full["flip"]}
    probabilities |= {"rand_augment.probability": augment["probability"]}
    probabilities |= {"erase.probability": erase["probability"]}
    for name, value in probabilities.items():
        # A boolean is an int in Python: True would be a probability of 1.
        if isinstance(value, bool) or not 0 <= value <= 1:
            raise UserError(f"{where}.{name} is a probability: a number from 0.0 to 1.0")


def resize_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image at size x size pixels, bilinear with antialiasing; the aspect is not kept."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.uint8)


def train_image(
    data: bytes, rng: np.random.Generator, spec: Mapping[str, Any]
) -> UInt8[np.ndarray, "size size 3"]:
    """The pixels of a view of an encoded image, for training, in the order of timm's transform.

    Args:
      spec: from `complete_transform`.

    Raises:
      UnreadableImage: the image cannot be decoded.
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

    Args:
      strengths: of (brightness, contrast, saturation); a factor is uniform in [1 - s, 1 + s] and
        at least 0. At strength 0 the property does not change.
    """
    for index in rng.permutation(len(_JITTERED)):
        strength = strengths[index]
        if strength > 0:
            factor = float(rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength))
            image = _JITTERED[index](image).enhance(factor)
    return image


FILL = (124, 116, 104)  # 255 times ImageNet's mean
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
    degrees = sign * strength * MAX_DEGREES
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=FILL)


def _affine(
    image: Image.Image,
    shear_x: float = 0.0,
    shift_x: float = 0.0,
    shear_y: float = 0.0,
    shift_y: float = 0.0,
) -> Image.Image:
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    terms = (1.0, shear_x, shift_x, shear_y, 1.0, shift_y)
    return image.transform(image.size, affine, terms, resample=bilinear, fillcolor=FILL)


def _enhance(kind: Callable[[Image.Image], Any], image: Image.Image, change: float) -> Image.Image:
    return kind(image).enhance(max(0.1, 1.0 + change * MAX_FACTOR_CHANGE))


def _posterize(image: Image.Image, strength: float, sign: int) -> Image.Image:
    # Keeps 4 bits at strength 0 and none at 1, which ImageOps.posterize refuses.
    mask = 256 - 2 ** (4 + int(strength * 4))
    return image.point([level & mask for level in range(256)] * len(image.getbands()))


def _solarize_add(image: Image.Image, strength: float, sign: int) -> Image.Image:
    added = int(strength * MAX_ADDED)
    table = [min(255, v + added) if v < ADD_BELOW else v for v in range(256)]
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda i, strength, sign: ImageOps.autocontrast(i),
    "equalize": lambda i, strength, sign: ImageOps.equalize(i),
    "invert": lambda i, strength, sign: ImageOps.invert(i),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda i, strength, sign: ImageOps.solarize(i, 256 - int(strength * 256)),
    "solarize_add": _solarize_add,
    "color": lambda i, strength, sign: _enhance(ImageEnhance.Color, i, sign * strength),
    "contrast": lambda i, strength, sign: _enhance(ImageEnhance.Contrast, i, sign * strength),
    "brightness": lambda i, strength, sign: _enhance(ImageEnhance.Brightness, i, sign * strength),
    "sharpness": lambda i, strength, sign: _enhance(ImageEnhance.Sharpness, i, sign * strength),
    "shear_x": lambda i, strength, sign: _affine(i, shear_x=sign * strength * MAX_SHEAR),
    "shear_y": lambda i, strength, sign: _affine(i, shear_y=sign * strength * MAX_SHEAR),
    "translate_x": lambda i, strength, sign: _affine(
        i, shift_x=sign * strength * MAX_SHIFT * i.width
    ),
    "translate_y": lambda i, strength, sign: _affine(
        i, shift_y=sign * strength * MAX_SHIFT * i.height
    ),
}
_NAMES = tuple(OPERATIONS)


def apply_operation(image: Image.Image, name: str, magnitude: float, sign: int) -> Image.Image:
    """An operation on an RGB image.

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
    """The image after operations drawn at random.

    Args:
      spec: `operations`, how many are drawn; `probability` that a drawn operation is applied;
        `magnitude` and `deviation`, the mean and standard deviation of its strength.
    """
    for index in rng.integers(len(_NAMES), size=int(spec["operations"])):
        if rng.random() >= spec["probability"]:
            continue
        magnitude = float(rng.normal(spec["magnitude"], spec["deviation"]))
        magnitude = min(max(magnitude, 0.0), MAX_MAGNITUDE)
        sign = 1 if rng.random() < 0.5 else -1
        image = apply_operation(image, _NAMES[index], magnitude, sign)
    return image
