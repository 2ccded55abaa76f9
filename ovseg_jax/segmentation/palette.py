"""Colors that can be told apart, for groups and for classes, and PNG files that use them."""

import functools
import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import Float, UInt8

BACKGROUND = (0, 0, 0)
# Okabe and Ito's set, made to be told apart with any kind of color vision, brightest first.
FIRST = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


@functools.cache
def colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` RGB colors, none of them near black (which is background) or one another.

    The first seven are safe for color-blind readers. Each further one is the color of a coarse RGB
    lattice that lies farthest, in a perceptual space, from all before it; so a longer list begins
    with the shorter one, and a class keeps its color when others are added.
    """
    if not 0 <= count <= 255:
        raise UserError(f"{count} colors: a palette image has room for 255 beside background")
    chosen = list(FIRST[:count])
    lattice = np.array(list(itertools.product(range(23, 255, 33), repeat=3)))
    places = _perceptual(lattice)
    clear = (places[:, 0] > 0.42) & (places[:, 0] < 0.95)  # lightness, away from black and white
    lattice, places = lattice[clear], places[clear]
    avoid = [BACKGROUND, (255, 255, 255), (128, 128, 128), *chosen]
    distance = np.full(len(lattice), np.inf)
    for color in avoid:
        distance = np.minimum(distance, _gap(places, color))
    while len(chosen) < count:
        color = tuple(int(c) for c in lattice[distance.argmax()])
        chosen.append(color)
        distance = np.minimum(distance, _gap(places, color))
    return tuple(chosen)


def _gap(places: Float[np.ndarray, "N 3"], color: tuple[int, int, int]) -> Float[np.ndarray, " N"]:
    return np.linalg.norm(places - _perceptual(np.array([color])), axis=1)


def _perceptual(rgb: Integer[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
    """sRGB 0..255 in Oklab coordinates (Ottosson 2020), whose distances follow what eyes see."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def paint(
    labels: Integer[np.ndarray, "H W"], count: int, *, background: bool = True
) -> UInt8[np.ndarray, "H W 3"]:
    """Labels as an RGB image [H,W,3] uint8.

    With `background`, label 0 is black and label i has color i - 1 of `colors(count)`; without,
    label i has color i. Anything else, such as an ignored pixel, is white.
    """
    table = np.full((max(256, int(labels.max(initial=0)) + 1), 3), 255, np.uint8)
    table[: count + background] = [BACKGROUND] * background + list(colors(count))
    return table[labels]


def write_palette_png(path: str | Path, labels: Integer[np.ndarray, "H W"], count: int) -> None:
    """A palette PNG whose pixel values are the labels: 0 background, 1..count the classes."""
    image = Image.fromarray(labels.astype(np.uint8))
    table = [BACKGROUND, *colors(count)] + [(255, 255, 255)] * (255 - count)
    image.putpalette([channel for color in table for channel in color])
    image.save(path, format="PNG")
