"""The transform of a training image: crop, flip, colors, RandAugment; from bytes to uint8.

Random erasing belongs to the transform too, but fills in noise after normalization, so the train
step does it on the device (`ovseg_jax.train.erasing`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ovseg_jax.data.color_jitter import color_jitter
from ovseg_jax.data.crop import Box, crop_box, resized_part
from ovseg_jax.data.decoding import decode, decode_reduced
from ovseg_jax.data.rand_augment import MAX_MAGNITUDE, rand_augment
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

KINDS = ("none", "crop")
# Every field but kind and size, with what it is where the config leaves it out.
DEFAULTS: dict[str, Any] = {
    "scale": (0.4, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "flip": 0.5,
    "color_jitter": (0.0, 0.0, 0.0),
    "rand_augment": {"operations": 0, "magnitude": 9.0, "deviation": 0.5, "probability": 0.5},
    "erase": {"probability": 0.0, "area": (0.02, 1 / 3), "aspect": (0.3, 1 / 0.3)},
    "reduced_decoding": False,
}


def complete_transform(spec: Mapping[str, Any], where: str = "transform") -> dict[str, Any]:
    """A transform with every field present, checked.

    Args:
      spec: `kind` is 'none' (the whole image, no randomness) or 'crop'; `size` in pixels. Of the
        crop: `scale`, `ratio` (see `crop.crop_box`), `flip` (probability of a mirror image),
        `color_jitter` (strengths of brightness, contrast, saturation), `rand_augment` (see
        `rand_augment.rand_augment`), `erase` (see `ovseg_jax.train.erasing`) and
        `reduced_decoding` (see `decoding.decode_reduced`).
      where: what to call it in errors.

    Raises:
      UserError: an unknown field, a missing one, or a value that cannot be.
    """
    known = {"kind": None, "size": None, **DEFAULTS}
    _check_names(spec, known, where)
    for name in ("kind", "size"):
        if name not in spec:
            raise UserError(f"{where} lacks {name!r}")
    full = {**DEFAULTS, **{key: spec[key] for key in spec}}
    for name in ("rand_augment", "erase"):
        _check_names(full[name], DEFAULTS[name], f"{where}.{name}")
        full[name] = {**DEFAULTS[name], **{key: full[name][key] for key in full[name]}}
    if full["kind"] not in KINDS:
        raise UserError(
            f"the image transform {full['kind']!r} is unknown; use {' or '.join(map(repr, KINDS))}"
        )
    if full["size"] < 1:
        raise UserError(f"{where}.size must be at least 1 pixel")
    if len(full["color_jitter"]) != 3 or min(full["color_jitter"]) < 0:
        raise UserError(
            f"{where}.color_jitter must be three numbers from 0: brightness, contrast, saturation"
        )
    augment, erase = full["rand_augment"], full["erase"]
    if augment["operations"] < 0 or augment["deviation"] < 0:
        raise UserError(f"{where}.rand_augment: operations and deviation must not be negative")
    if not 0 <= augment["magnitude"] <= MAX_MAGNITUDE:
        raise UserError(f"{where}.rand_augment.magnitude must be from 0 to {MAX_MAGNITUDE:g}")
    for name, pair in (
        ("scale", full["scale"]),
        ("ratio", full["ratio"]),
        ("erase.area", erase["area"]),
        ("erase.aspect", erase["aspect"]),
    ):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise UserError(f"{where}.{name} must be two numbers above 0, the lesser first")
    for name, most in (("scale", full["scale"][1]), ("erase.area", erase["area"][1])):
        if most > 1:
            raise UserError(f"{where}.{name} is a share of the image: it must not exceed 1")
    for name, value in (
        ("flip", full["flip"]),
        ("rand_augment.probability", augment["probability"]),
        ("erase.probability", erase["probability"]),
    ):
        # True would be a probability of 1.
        if isinstance(value, bool) or not 0 <= value <= 1:
            raise UserError(f"{where}.{name} is a probability: a number from 0.0 to 1.0")
    if full["kind"] == "none":
        changed = [
            name
            for name, part in (
                ("color_jitter", max(full["color_jitter"])),
                ("rand_augment", augment["operations"]),
                ("erase", erase["probability"]),
                ("reduced_decoding", full["reduced_decoding"]),
            )
            if part
        ]
        if changed:
            raise UserError(
                f"{where}.kind is 'none', which leaves images as they are, but "
                f"{', '.join(changed)} would change them: set kind = 'crop'"
            )
    return full


def _check_names(spec: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for name in spec:
        if name not in known:
            raise UserError(f"{where}.{name} is no field{nearest(name, list(known))}")


def resize_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image at size x size pixels, bilinear with antialiasing; the aspect is not kept."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.uint8)


def train_image(
    data: bytes, rng: np.random.Generator, spec: Mapping[str, Any]
) -> UInt8[np.ndarray, "size size 3"]:
    """The pixels of one view of an encoded image, for training.

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
    return _changed(resized_part(image, box, spec["size"]), rng, spec)


def _changed(
    image: Image.Image, rng: np.random.Generator, spec: Mapping[str, Any]
) -> UInt8[np.ndarray, "size size 3"]:
    """What follows the crop, in the order of timm's training transform."""
    if rng.random() < spec["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if max(spec["color_jitter"]) > 0:
        image = color_jitter(image, rng, spec["color_jitter"])
    if spec["rand_augment"]["operations"]:
        image = rand_augment(image, rng, spec["rand_augment"])
    return np.asarray(image, np.uint8)
