"""From a layout to pixels and labels.

Objects are composed back to front with their alpha at the final size; a pixel belongs to an object
where the alpha is above one half and nothing in front is, so labels show visible parts only.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ovseg_jax.data.scenes.backgrounds import draw_background, random_palette, value_noise
from ovseg_jax.data.scenes.layout import Patch, PlacedObject, SceneLayout, layout_at
from ovseg_jax.data.scenes.sprites import sprite

_LONGEST_SIDE = 0.75  # of the image: keeps thin objects, scaled by area, inside it
_NOISE_STREAM = 1


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


class _Canvas:
    """The picture so far, and which item owns each pixel (0 = background)."""

    def __init__(self, picture: Float[np.ndarray, "size size 3"]):
        self.picture = picture
        self.owner = np.zeros(picture.shape[:2], np.int32)

    def put(
        self, pixels: Float[np.ndarray, "height width 4"], center: tuple[float, float], owner: int
    ) -> int:
        """Compose premultiplied pixels around a center (across, down, as fractions).

        Returns the pixels inside the frame that are now owned, before anything covers them.
        """
        size = self.picture.shape[0]
        height, width = pixels.shape[:2]
        top, left = round(center[1] * size - height / 2), round(center[0] * size - width / 2)
        rows = slice(max(0, top), min(size, top + height))
        columns = slice(max(0, left), min(size, left + width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return 0  # wholly outside: the slices below would wrap around
        pixels = pixels[rows.start - top : rows.stop - top]
        pixels = pixels[:, columns.start - left : columns.stop - left]
        alpha = pixels[..., 3:]
        view = self.picture[rows, columns]
        view *= 1 - alpha
        view += pixels[..., :3]
        solid = alpha[..., 0] > 0.5
        self.owner[rows, columns][solid] = owner
        return int(solid.sum())


def draw(
    layout: SceneLayout, size: int
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], Int[np.ndarray, "{size} {size}"], list[int]]:
    """Image, the number of the object that owns each pixel (0 = none, else 1..n in drawing order),
    and the area in pixels that each object would show if nothing covered it.
    """
    canvas = _Canvas(draw_background(layout.background, size))
    areas = []
    for number in range(len(layout.objects) + 1):
        for patch in layout.patches:
            if patch.below == number:
                canvas.put(_patch_pixels(patch, size), patch.center, 0)
        if number < len(layout.objects):
            item = layout.objects[number]
            areas.append(canvas.put(_object_pixels(item, size), item.center, number + 1))
    rng = np.random.Generator(np.random.Philox([layout.background.seed, _NOISE_STREAM]))
    grain = rng.standard_normal((size, size, 3), dtype=np.float32)
    picture = canvas.picture + np.float32(layout.background.noise) * grain
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), canvas.owner, areas


def render(
    layout: SceneLayout, size: int
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], UInt8[np.ndarray, "{size} {size}"]]:
    """RGB image and label ids (0 = background, 1..C) of a layout, `size` pixels square."""
    image, owner, _ = draw(layout, size)
    labels = np.array([0, *(item.label for item in layout.objects)], np.uint8)
    return image, labels[owner]


def scene_at(seed: int, split: str, index: int, size: int) -> Scene:
    """Scene `index` of a split, drawn: a pure function of its arguments."""
    layout = layout_at(seed, split, index)
    image, labels = render(layout, size)
    return Scene(image=image, labels=labels, layout=layout)
