"""Pictures: overlays with a legend, panels of image, groups, prediction and truth, and colors."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import UInt8

LARGEST = 2048  # pixels: the longest side of a picture
PANEL = 320  # pixels: small images are enlarged to about this side
MARGIN = 12
PAPER, INK, FRAME = (255, 255, 255), (25, 25, 25), (150, 150, 150)
FONT = 18
Legend = Sequence[tuple[str, tuple[int, int, int]]]


def overlay(
    image: UInt8[np.ndarray, "H W 3"],
    labels: Integer[np.ndarray, "H W"],
    class_names: Sequence[str],
    *,
    background: bool = True,
    opacity: float = 0.55,
    names: bool = False,
) -> Image.Image:
    """The image with its regions tinted and outlined, and a legend below of the classes in it.

    With `background`, label 0 is not tinted (the legend has it only where there is nothing else)
    and label i is class i - 1. Without, label i is class i. Small images are enlarged, and images
    beyond `LARGEST` pixels reduced.

    Args:
      names: also write each class's name on its regions, where they are widest.
    """
    side = max(image.shape[:2])
    factor, step = max(1, round(2 * PANEL / side)), -(-side // LARGEST)
    image, labels = (x[::step, ::step] for x in (image, labels.astype(np.int64, copy=False)))
    image, labels = (np.repeat(np.repeat(x, factor, 0), factor, 1) for x in (image, labels))
    mixed = _tinted(image, labels, len(class_names), background, opacity)
    shown = labels[labels > 0] if background and labels.any() else labels
    legend = _legend(shown, class_names, background)
    picture = Image.fromarray(mixed)
    if names:
        _write_names(picture, labels, class_names, background)
    return _with_legend(picture, legend)


def _tinted(
    image: np.ndarray, labels: np.ndarray, count: int, background: bool, opacity: float = 0.55
) -> np.ndarray:
    """The image with the colors of the labels mixed in, and white borders between them."""
    tint = paint(labels, count, background=background)
    inside = ((labels > 0) | (not background))[..., None]
    image = image.astype(np.float32)
    mixed = np.where(inside, image + np.float32(opacity) * (tint - image), image)
    mixed[_borders(labels)] = PAPER
    return mixed.astype(np.uint8)


def _write_names(
    picture: Image.Image, labels: np.ndarray, class_names: Sequence[str], background: bool
) -> None:
    """Writes names on their regions: in each connected part at the pixel farthest from its edge.
    Parts that a name would hide get none."""
    draw = ImageDraw.Draw(picture)
    first = int(background)
    for label in np.unique(labels):
        if not first <= label < first + len(class_names):
            continue
        # With a margin of zeros, so that the edge of the image is an edge too.
        inside = ndimage.distance_transform_edt(np.pad(labels == label, 1))[1:-1, 1:-1]
        parts, count = ndimage.label(inside > 0)
        text, font = _drawable(class_names[label - first])
        half = font.getlength(text) / 2
        for y, x in ndimage.maximum_position(inside, parts, range(1, count + 1)):
            if inside[y, x] < FONT:
                continue
            x = min(max(x, half + 2), picture.width - half - 2)
            draw.text((x, y), text, PAPER, font, anchor="mm", stroke_width=3, stroke_fill=INK)


def scene_panel(
    image: UInt8[np.ndarray, "H W 3"],
    groups: Integer[np.ndarray, "H W"],
    prediction: Integer[np.ndarray, "H W"],
    truth: Integer[np.ndarray, "H W"] | None,
    class_names: Sequence[str],
    *,
    title: str = "",
    background: bool = True,
    group_count: int | None = None,
) -> Image.Image:
    """image | groups | prediction | truth | overlay, and a legend of the classes in them.

    Args:
      groups: the group of each pixel.
      prediction, truth: labels as in `overlay`; ignored pixels of the truth are white. The truth
        may be left out.
      title: a line above, for example the caption.
      group_count: number of groups the model has, so that a group has one color in every picture.
    """
    count = group_count or int(groups.max(initial=0)) + 1
    shown = [("image", image), ("groups", _group_picture(image, groups, count))]
    labels = [("prediction", prediction)] + ([("truth", truth)] if truth is not None else [])
    for name, label in labels:
        shown.append((name, paint(label.astype(np.int64), len(class_names), background=background)))
    tiles = [(name, _enlarged(pixels)) for name, pixels in shown]
    large, labels_shown = (np.asarray(_enlarged(x)) for x in (image, prediction.astype(np.uint8)))
    named = Image.fromarray(
        _tinted(large, labels_shown.astype(np.int64), len(class_names), background)
    )
    _write_names(named, labels_shown, class_names, background)
    tiles.append(("overlay", named))
    sheet = _row(tiles, title)
    parts = np.concatenate([label.ravel() for _, label in labels])
    return _with_legend(sheet, _legend(parts, class_names, background))


def _row(tiles: Sequence[tuple[str, Image.Image]], title: str = "") -> Image.Image:
    """Framed pictures side by side, a name above each, and a title above all."""
    font = ImageFont.load_default(size=FONT)
    width = sum(tile.width + MARGIN for _, tile in tiles) + MARGIN
    head = MARGIN + (FONT + 8) * (2 if title else 1)
    sheet = Image.new("RGB", (width, head + tiles[0][1].height + MARGIN), PAPER)
    draw, left = ImageDraw.Draw(sheet), MARGIN
    if title:
        text = _shortened(title, font, width - 2 * MARGIN)
        draw.text((MARGIN, MARGIN // 2), text, INK, font)
    for name, tile in tiles:
        draw.text((left + tile.width // 2, head - 6), name, INK, font, anchor="ms")
        sheet.paste(tile, (left, head))
        box = (left - 1, head - 1, left + tile.width, head + tile.height)
        draw.rectangle(box, outline=FRAME)
        left += tile.width + MARGIN
    return sheet


def contact_sheet(rows: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Pictures below (and, with `columns`, beside) one another, with a rule between rows."""
    lines = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    wide = max(picture.width for picture in rows)
    heights = [max(picture.height for picture in line) + MARGIN for line in lines]
    sheet = Image.new("RGB", (wide * min(columns, len(rows)), sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(sheet), 0
    for line, height in zip(lines, heights, strict=True):
        for i, picture in enumerate(line):
            sheet.paste(picture, (i * wide, top))
        top += height
        draw.line((0, top - MARGIN // 2, sheet.width, top - MARGIN // 2), FRAME)
    return sheet


def _group_picture(image: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Groups in color, mixed with the gray image so that what each group covers can be seen."""
    gray = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    color = paint(groups.astype(np.int64), count, background=False)
    return (0.7 * color + 0.3 * gray).astype(np.uint8)


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbor has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def _enlarged(pixels: np.ndarray) -> Image.Image:
    """At panel size: repeated pixels for small images, so that label borders stay sharp."""
    height, width = pixels.shape[:2]
    factor = PANEL / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.NEAREST)


def _legend(labels: np.ndarray, class_names: Sequence[str], background: bool) -> Legend:
    """(name, color) of the labels present, most frequent first; ignored pixels are left out."""
    table = colors(len(class_names))
    names = ["background"] * background + list(class_names)
    palette = [BACKGROUND] * background + list(table)
    values, counts = np.unique(labels, return_counts=True)
    present = [int(v) for v in values[np.argsort(-counts)] if 0 <= v < len(names)]
    return [(names[v], palette[v]) for v in present]


def _with_legend(picture: Image.Image, legend: Legend) -> Image.Image:
    """The picture with colored boxes and names below it, in as many lines as they need."""
    places, x, y, box = [], MARGIN, MARGIN // 2, FONT
    for name, _ in legend:
        name, font = _drawable(name)
        name = _shortened(name, font, max(picture.width - 3 * MARGIN - box, FONT))
        width = box + 6 + round(font.getlength(name)) + 2 * MARGIN
        if x > MARGIN and x + width > picture.width:
            x, y = MARGIN, y + FONT + 10
        places.append((name, font, x, y))
        x += width
    sheet = Image.new("RGB", (picture.width, picture.height + y + FONT + MARGIN), PAPER)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for (name, font, x, y), (_, color) in zip(places, legend, strict=True):
        y += picture.height
        draw.rectangle((x, y, x + box, y + box), fill=color, outline=FRAME)
        draw.text((x + box + 6, y + box // 2), name, INK, font, anchor="lm")
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


# ---- fonts

_FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "C:/Windows/Fonts"),
)


@functools.cache
def _drawable(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text, and a font that has all of its letters; where none has, "?" for those it lacks."""
    default = ImageFont.load_default(size=FONT)
    if not _lacking(default, text):
        return text, default
    for path in _font_files():
        try:
            font = ImageFont.truetype(path, FONT)
            if not _lacking(font, text):
                return text, font
        except OSError:  # damaged, or with pictures of other sizes alone
            continue
    lacking = _lacking(default, text)
    logging.getLogger(__name__).warning(
        "pictures show %r with question marks: no font on this machine has all of its letters", text
    )
    return "".join("?" if letter in lacking else letter for letter in text), default


@functools.cache
def _font_files() -> tuple[str, ...]:
    folders = (Path(folder).expanduser() for folder in _FONT_FOLDERS)
    files = [path for folder in folders if folder.is_dir() for path in folder.rglob("*.?t[fc]")]
    # Plain fonts before bold and special ones.
    files.sort(key=lambda path: ("sans" not in path.name.lower(), len(path.name), path))
    return tuple(map(str, files))


def _lacking(font: ImageFont.FreeTypeFont, text: str) -> set[str]:
    """The letters of a text that the font draws as a box."""
    box = bytes(font.getmask("\U0010fffe"))
    return {
        letter for letter in text if not letter.isspace() and bytes(font.getmask(letter)) == box
    }


# ---- colors

BACKGROUND = (0, 0, 0)
# Okabe and Ito's set, distinct with any kind of color vision, brightest first.
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
    """`count` RGB colors, none of them black (which is background) or equal to one another.

    The first seven are safe for color-blind readers, the others those of the PASCAL VOC development
    kit, dark ones last. A longer list begins with the shorter one, so a class keeps its color when
    others are added.
    """
    if not 0 <= count <= 255:
        raise UserError(f"{count} colors: a palette image has room for 255 beside background")
    # Bits 0, 1 and 2 of the number are the highest bits of VOC's red, green and blue, bits 3, 4 and
    # 5 the next ones, and so on.
    number, channel = np.arange(1, 256)[:, None], np.arange(3)
    table = sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
    near = np.linalg.norm(table[:, None] - np.array([BACKGROUND, *FIRST]), axis=-1).min(1)
    late = (table.max(1) < 128) | (near < 40)
    table = table[np.argsort(late, kind="stable")].tolist()
    return (*FIRST, *map(tuple, table))[:count]


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


def palette_image(labels: Integer[np.ndarray, "H W"], count: int) -> Image.Image:
    """A palette image whose pixel values are the labels: 0 background, 1..count the classes."""
    image = Image.fromarray(labels.astype(np.uint8))
    table = [BACKGROUND, *colors(count)] + [(255, 255, 255)] * (255 - count)
    image.putpalette([channel for color in table for channel in color])
    return image
