"""Textured procedural backgrounds: a dozen families, each a pure function of a seed.

A family maps (rng, coordinates) to RGB. All lengths are fractions of the image side, so one seed
shows the same picture at every size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

Field = Float[np.ndarray, "size size"]
Picture = Float[np.ndarray, "size size 3"]


@dataclass(frozen=True)
class Background:
    """What a background is drawn from: family, seed, and amplitude of the pixel noise (0..255)."""

    family: str
    seed: int
    noise: float


def value_noise(
    rng: np.random.Generator, size: int, cells: int, octaves: int = 3, stretch: int = 1
) -> Field:
    """Multi-octave value noise in 0..1: random lattices, upsampled smoothly and summed.

    Every octave doubles the number of `cells` across and halves the weight. With `stretch`, there
    are that many times more cells down than across, hence horizontal grain.
    """
    total = np.zeros((size, size), np.float32)
    weight, weights = 1.0, 0.0
    for octave in range(octaves):
        count = cells << octave
        lattice = rng.random((count * stretch + 1, count + 1), dtype=np.float32)
        smooth = Image.fromarray(lattice).resize((size, size), Image.Resampling.BICUBIC)
        total += np.float32(weight) * np.asarray(smooth)
        weights += weight
        weight *= 0.5
    # Sums of uniform draws crowd around one half: stretch the contrast back.
    return np.clip((total / np.float32(weights) - 0.5) * 1.7 + 0.5, 0.0, 1.0)


def random_palette(rng: np.random.Generator, count: int) -> Float[np.ndarray, "{count} 3"]:
    """Colors in 0..255 that share a loose family of hues, as materials and places do."""
    hue, spread = rng.random(), rng.uniform(0.03, 0.3)
    hues = (hue + spread * rng.uniform(-1, 1, count)) % 1.0
    saturations = rng.uniform(0.08, 0.75) * rng.uniform(0.7, 1.2, count)
    # Values evenly spread, then shuffled: neighbors in the palette always differ visibly.
    values = np.clip(rng.uniform(0.3, 0.65) + np.linspace(0, 0.35, count), 0, 1)
    rng.shuffle(values)
    ramp = np.clip(np.abs((hues[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    mixed = 1 - np.clip(saturations, 0, 1)[:, None] * (1 - ramp)
    return (255 * values[:, None] * mixed).astype(np.float32)


def _blend(field: Field, colors: Float[np.ndarray, "count 3"]) -> Picture:
    """Map 0..1 through the colors, linearly between neighbors."""
    stops = np.linspace(0, 1, len(colors))
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, c) for c in colors.T], axis=-1)
    return table.astype(np.float32)[(field * 255).astype(np.uint8)]


def _shaded(picture: Picture, field: Field, depth: float) -> Picture:
    """Darken and brighten by a field in 0..1, `depth` up and down."""
    return picture * (1 + np.float32(depth) * (2 * field - 1))[..., None]


def _turned(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """Pixel coordinates as fractions of the side, turned by a random angle about the center."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    angle = rng.uniform(0, math.pi)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    down, across = axis[:, None], axis[None, :]
    return cos * across + sin * down, cos * down - sin * across


def _mist(rng: np.random.Generator, size: int) -> Picture:
    field = value_noise(rng, size, int(rng.integers(2, 6)), octaves=4)
    return _blend(field, random_palette(rng, 3))


def _clouds(rng: np.random.Generator, size: int) -> Picture:
    sky = np.linspace(0, 1, size, dtype=np.float32)[:, None].repeat(size, axis=1)
    cover = value_noise(rng, size, 3, octaves=4, stretch=2)
    white = np.clip((cover - rng.uniform(0.35, 0.55)) * 3, 0, 1)[..., None]
    blues = np.array([[70, 120, 190], [170, 205, 235]], np.float32) * rng.uniform(0.75, 1.05)
    return _blend(sky, blues.astype(np.float32)) * (1 - white) + np.float32(240) * white


def _gradient(rng: np.random.Generator, size: int) -> Picture:
    across, _ = _turned(rng, size)
    field = 0.5 + 0.7 * across + 0.5 * (value_noise(rng, size, 5, octaves=4) - 0.5)
    return _blend(np.clip(field, 0, 1), random_palette(rng, 3))


def _stripes(rng: np.random.Generator, size: int) -> Picture:
    across, _ = _turned(rng, size)
    warp = value_noise(rng, size, 3) * rng.uniform(0, 0.15)
    wave = np.sin((across + warp) * np.float32(2 * math.pi * rng.uniform(4, 12)))
    field = np.clip(wave * rng.uniform(0.6, 4) * 0.5 + 0.5, 0, 1)
    return _shaded(_blend(field, random_palette(rng, 2)), value_noise(rng, size, 8), 0.15)


def _checker(rng: np.random.Generator, size: int) -> Picture:
    across, down = _turned(rng, size)
    count = rng.uniform(4, 10)
    odd = (np.floor(across * count) + np.floor(down * count)) % 2
    return _shaded(_blend(odd, random_palette(rng, 2)), value_noise(rng, size, 6, 4), 0.25)


def _bricks(rng: np.random.Generator, size: int) -> Picture:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    rows = int(rng.integers(6, 13))
    row = np.floor(axis * rows).astype(np.int64)
    across = axis[None, :] * (rows / 2) + 0.5 * (row[:, None] % 2)
    column = np.floor(across).astype(np.int64)
    tone = rng.random((rows, rows // 2 + 3), dtype=np.float32)[row[:, None], column]
    gap = rng.uniform(0.05, 0.12)
    joint = ((axis * rows) % 1 < gap)[:, None] | (across % 1 < gap / 2)
    colors = random_palette(rng, 3)
    picture = _shaded(_blend(tone, colors[:2]), value_noise(rng, size, 12), 0.2)
    return np.where(joint[..., None], colors[2], picture)


def _dots(rng: np.random.Generator, size: int) -> Picture:
    across, down = _turned(rng, size)
    count = rng.uniform(5, 12)
    distance = np.hypot((across * count) % 1 - 0.5, (down * count) % 1 - 0.5)
    field = np.clip((rng.uniform(0.2, 0.4) - distance) * 12 + 0.5, 0, 1)
    return _shaded(_blend(field, random_palette(rng, 2)), value_noise(rng, size, 5, 4), 0.25)


def _grass(rng: np.random.Generator, size: int) -> Picture:
    colors = random_palette(rng, 4)
    if rng.random() < 0.6:
        colors = colors * np.array([0.7, 1.1, 0.45], np.float32)
    image = Image.new("RGB", (size, size), tuple(int(c) for c in np.clip(colors[0], 0, 255)))
    draw = ImageDraw.Draw(image)
    count = 350
    roots = rng.uniform(-0.05, 1.1, (count, 2))
    roots = roots[np.argsort(roots[:, 1])] * size
    tips = roots + rng.normal(0, [0.03, 0.02], (count, 2)) * size - [0, 0.1 * size]
    shades = np.clip(
        colors[rng.integers(0, 4, count)] * rng.uniform(0.7, 1.2, (count, 1)), 0, 255
    ).astype(int)
    width = max(1, round(size * 0.012))
    for root, tip, shade in zip(roots.tolist(), tips.tolist(), shades.tolist(), strict=True):
        draw.line((*root, *tip), fill=tuple(shade), width=width)
    return np.asarray(image).astype(np.float32)


def _wood(rng: np.random.Generator, size: int) -> Picture:
    across, down = _turned(rng, size)
    bend = value_noise(rng, size, 3) * rng.uniform(0.15, 0.4)
    radius = np.hypot(across * 0.35 + rng.uniform(-0.3, 0.3), down + rng.uniform(0.1, 0.8)) + bend
    rings = 0.5 + 0.5 * np.sin(radius * np.float32(2 * math.pi * rng.uniform(8, 20)))
    return _shaded(_blend(rings, random_palette(rng, 2)), value_noise(rng, size, 10, 3), 0.15)


def _cells(rng: np.random.Generator, size: int) -> Picture:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    points = rng.random((int(rng.integers(14, 30)), 2), dtype=np.float32)
    nearest = np.full((size, size), np.inf, np.float32)
    second, owner = nearest.copy(), np.zeros((size, size), np.int64)
    for index, (down, across) in enumerate(points):
        distance = ((axis - down) ** 2)[:, None] + ((axis - across) ** 2)[None, :]
        closer = distance < nearest
        second = np.where(closer, nearest, np.minimum(second, distance))
        owner[closer] = index
        nearest = np.minimum(nearest, distance)
    tones = rng.random(len(points), dtype=np.float32)[owner]
    picture = _shaded(_blend(tones, random_palette(rng, 3)), value_noise(rng, size, 7), 0.2)
    border = np.clip((np.sqrt(second) - np.sqrt(nearest)) * 60, 0, 1)
    return picture * (0.45 + 0.55 * border)[..., None]


def _camouflage(rng: np.random.Generator, size: int) -> Picture:
    levels = int(rng.integers(3, 6))
    field = value_noise(rng, size, int(rng.integers(3, 7)))
    steps = np.minimum(np.floor(field * levels), levels - 1) / (levels - 1)
    return _shaded(_blend(steps, random_palette(rng, 4)), value_noise(rng, size, 16, 2), 0.12)


def _weave(rng: np.random.Generator, size: int) -> Picture:
    across, down = _turned(rng, size)
    turns = np.float32(2 * math.pi * rng.uniform(6, 14))
    field = 0.5 + 0.25 * (np.sin(across * turns) + np.sin(down * turns * np.float32(0.8)))
    return _shaded(_blend(field, random_palette(rng, 3)), value_noise(rng, size, 4, 4), 0.25)


def _planks(rng: np.random.Generator, size: int) -> Picture:
    grain = value_noise(rng, size, 2, octaves=3, stretch=12)
    boards = int(rng.integers(4, 9))
    board = np.arange(size) * boards // size
    tone = rng.random(boards, dtype=np.float32)[board][:, None]
    picture = _shaded(_blend(0.6 * grain + 0.4 * tone, random_palette(rng, 3)), grain, 0.1)
    seam = np.diff(board, prepend=-1) > 0
    return picture * np.where(seam, np.float32(0.5), np.float32(1))[:, None, None]


_PAINTERS: list[Callable[[np.random.Generator, int], Picture]] = [
    _mist, _clouds, _gradient, _stripes, _checker, _bricks, _dots, _grass, _wood, _cells,
    _camouflage, _weave, _planks,
]  # fmt: skip
_FAMILIES = {painter.__name__.removeprefix("_"): painter for painter in _PAINTERS}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def draw_background(background: Background, size: int) -> Picture:
    """RGB in 0..255 (float32), without the pixel noise, which goes over the finished scene."""
    rng = np.random.Generator(np.random.Philox(background.seed))
    return _FAMILIES[background.family](rng, size).astype(np.float32)
