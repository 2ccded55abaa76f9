"""Images that are read, and pictures that are drawn: overlays with a legend, panels, colors."""

import functools
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Integer
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from ovseg_jax.data.decoding import decode, is_foreign, upright
from ovseg_jax.errors import UserError
from ovseg_jax.shapes import UInt8

LARGEST = 2048  # pixels: the longest side of a picture
PANEL = 320  # pixels: small images are enlarged to about this side
MARGIN = 12
PAPER, INK, FRAME = (255, 255, 255), (25, 25, 25), (150, 150, 150)
FONT = 18
OPACITY = np.float32(0.55)
Legend = Sequence[tuple[str, tuple[int, int, int]]]


# ---- reading

# The bytes are those of an image file.
AnyImage = str | bytes | os.PathLike | Image.Image | np.ndarray | jax.Array


def read_image(image: AnyImage) -> np.ndarray:
    """An image as uint8 [H, W, 3]: upright, transparent parts white. UserError for a file that
    cannot be read, or an array of another form."""
    try:
        if isinstance(image, bytes):
            return np.asarray(decode(image))
        if isinstance(image, str | os.PathLike):
            return np.asarray(decode(Path(image).read_bytes()))
        if isinstance(image, Image.Image):
            return np.asarray(upright(image))
    except Exception as error:  # decoders raise nearly anything on damaged data
        names = {bytes: "the data", Image.Image: "the PIL image"}
        name = next((name for kind, name in names.items() if isinstance(image, kind)), image)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read as an image: {reason}") from None
    if not hasattr(image, "__array__"):
        kind = type(image).__name__
        raise UserError(f"an image is a path, bytes of a file, a PIL image or an array, not {kind}")
    array = np.asarray(image)
    gray = array.ndim == 2
    if array.dtype != np.uint8 or not (gray or array.ndim == 3 and array.shape[2] == 3):
        raise UserError(
            f"an image as an array is uint8 [height, width, 3], RGB, 0 to 255; not {array.dtype} "
            f"{list(array.shape)}: np.moveaxis(x, 0, -1) brings channels to the end, x[..., :3] "
            "drops transparency, (255 * x).round().astype('uint8') scales 0 to 1"
        )
    if 0 in array.shape:
        raise UserError(f"an image of {array.shape[0]} x {array.shape[1]} pixels is empty")
    return np.repeat(array[..., None], 3, axis=2) if gray else array


def files_in(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """(files whose names end so, in any case; all else, such as folders and links to nothing), by
    name, without what other programs left (.DS_Store)."""
    paths = sorted(path for path in folder.iterdir() if not is_foreign(path.name))
    wanted = [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    return wanted, [path for path in paths if path not in set(wanted)]


# ---- drawing


def overlay(
    image: UInt8[np.ndarray, "H W 3"], labels: Integer[np.ndarray, "H W"], names: Sequence[str]
) -> Image.Image:
    """The image with its regions tinted, outlined and named, and a legend below.

    Label 0 is background and not tinted (the legend has it only where there is nothing else), label
    i is class i - 1. Small images are enlarged, and images beyond `LARGEST` pixels reduced.
    """
    side = max(image.shape[:2])
    factor, step = max(1, round(2 * PANEL / side)), -(-side // LARGEST)
    image, labels = (x[::step, ::step] for x in (image, labels.astype(np.int64, copy=False)))
    image, labels = (np.repeat(np.repeat(x, factor, 0), factor, 1) for x in (image, labels))
    shown = labels[labels > 0] if labels.any() else labels
    return _with_legend(_tinted(image, labels, names, True), _legend(shown, names, True))


def _tinted(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], background: bool
) -> Image.Image:
    """The image with the colors of the labels mixed in, white borders between them, and a name in
    each connected part that it would not hide, at the pixel farthest from its edge."""
    tint = paint(labels, len(class_names), background=background)
    inside = ((labels > 0) | (not background))[..., None]
    image = image.astype(np.float32)
    mixed = np.where(inside, image + OPACITY * (tint - image), image)
    # Pixels whose right or lower neighbor has another label.
    mixed[:, :-1][labels[:, :-1] != labels[:, 1:]] = PAPER
    mixed[:-1][labels[:-1] != labels[1:]] = PAPER
    picture = Image.fromarray(mixed.astype(np.uint8))
    draw, names = ImageDraw.Draw(picture), [None] * background + list(class_names)
    for label in np.unique(labels):
        if label >= len(names) or names[label] is None:
            continue
        # With a margin of zeros, so that the edge of the image is an edge too.
        depth = ndimage.distance_transform_edt(np.pad(labels == label, 1))[1:-1, 1:-1]
        parts, count = ndimage.label(depth > 0)
        text, font = _drawable(names[label])
        half = font.getlength(text) / 2
        for y, x in ndimage.maximum_position(depth, parts, range(1, count + 1)):
            if depth[y, x] >= FONT:
                x = min(max(x, half + 2), picture.width - half - 2)
                draw.text((x, y), text, PAPER, font, anchor="mm", stroke_width=3, stroke_fill=INK)
    return picture


def scene_panel(
    image: UInt8[np.ndarray, "H W 3"],
    groups: Integer[np.ndarray, "H W"],
    prediction: Integer[np.ndarray, "H W"],
    truth: Integer[np.ndarray, "H W"],
    class_names: Sequence[str],
    *,
    title: str = "",
    background: bool = True,
    group_count: int,
) -> Image.Image:
    """image | groups | prediction | truth | overlay, with a title and a legend of the classes.

    Groups are of each pixel, among `group_count` of the model; labels as `paint` takes them.
    """
    # Groups are mixed with the gray image so that what each of them covers can be seen.
    gray = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    mixed = 0.7 * paint(groups, group_count, background=False) + 0.3 * gray
    painted = (paint(x, len(class_names), background=background) for x in (prediction, truth))
    shown = (image, mixed.astype(np.uint8), *painted)
    names = ("image", "groups", "prediction", "truth")
    tiles = [(name, _enlarged(pixels)) for name, pixels in zip(names, shown, strict=True)]
    large, labels = (np.asarray(_enlarged(x)) for x in (image, prediction.astype(np.uint8)))
    tiles.append(("overlay", _tinted(large, labels.astype(np.int64), class_names, background)))
    # Framed and side by side, a name above each, and the title above all.
    font, (wide, high) = ImageFont.load_default(size=FONT), tiles[0][1].size
    width, head = (wide + MARGIN) * len(tiles) + MARGIN, MARGIN + (FONT + 8) * (2 if title else 1)
    sheet = Image.new("RGB", (width, head + high + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN // 2), _shortened(title, font, width - 2 * MARGIN), INK, font)
    for left, (name, tile) in zip(range(MARGIN, width, wide + MARGIN), tiles, strict=False):
        draw.text((left + wide // 2, head - 6), name, INK, font, anchor="ms")
        sheet.paste(tile, (left, head))
        draw.rectangle((left - 1, head - 1, left + wide, head + high), outline=FRAME)
    labels = np.concatenate([prediction.ravel(), truth.ravel()])
    return _with_legend(sheet, _legend(labels, class_names, background))


def contact_sheet(rows: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Pictures below (and, with `columns`, beside) one another, with a rule between rows."""
    wide, high = (max(sizes) for sizes in zip(*(picture.size for picture in rows), strict=True))
    high, lines = high + MARGIN, -(-len(rows) // columns)
    sheet = Image.new("RGB", (wide * min(columns, len(rows)), high * lines), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(rows):
        sheet.paste(picture, (i % columns * wide, i // columns * high))
    for below in range(high, sheet.height + 1, high):
        draw.line((0, below - MARGIN // 2, sheet.width, below - MARGIN // 2), FRAME)
    return sheet


def _enlarged(pixels: np.ndarray) -> Image.Image:
    """At panel size: repeated pixels for small images, so that label borders stay sharp."""
    height, width = pixels.shape[:2]
    factor = PANEL / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.NEAREST)


def _legend(labels: np.ndarray, class_names: Sequence[str], background: bool) -> Legend:
    """(name, color) of the labels present, most frequent first; ignored pixels are left out."""
    legend = named_colors(class_names, background)
    values, counts = np.unique(labels, return_counts=True)
    return [legend[v] for v in values[np.argsort(-counts)] if 0 <= v < len(legend)]


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


def png(picture: Image.Image, **texts: str) -> bytes:
    """The picture as a PNG file with some texts in it."""
    stream, info = io.BytesIO(), PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    picture.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


# ---- fonts

_FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "C:/Windows/Fonts"),
)


@functools.cache
def _drawable(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text, and a font that has all of its letters; where none has, "?" for those it lacks."""
    default = ImageFont.load_default(size=FONT)
    lacking = _lacking(default, text)
    for path in _font_files() if lacking else ():
        try:
            font = ImageFont.truetype(path, FONT)
            if not _lacking(font, text):
                return text, font
        except OSError:  # damaged, or with pictures of other sizes alone
            continue
    if lacking:
        logging.getLogger(__name__).warning(
            "pictures show %r with question marks: no font on this machine has all of its letters",
            text,
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
    return {x for x in text if not x.isspace() and bytes(font.getmask(x)) == box}


# ---- colors

BACKGROUND = (0, 0, 0)
# Okabe and Ito's set, distinct with any kind of color vision, brightest first.
FIRST = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)


@functools.cache
def colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` different RGB colors, none of them black; a longer list begins with the shorter one.

    The first seven are safe for color-blind readers, the others those of the PASCAL VOC development
    kit, dark ones last.
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


def named_colors(class_names: Sequence[str], background: bool) -> Legend:
    """(name, color) of each label."""
    classes = list(zip(class_names, colors(len(class_names)), strict=True))
    return [("background", BACKGROUND)] * background + classes


def paint(
    labels: Integer[np.ndarray, "H W"], count: int, *, background: bool = True
) -> UInt8[np.ndarray, "H W 3"]:
    """Labels in color: with `background`, label 0 is black and label i has color i - 1 of
    `colors(count)`; without, label i has color i. Ignored pixels are white."""
    table = np.full((max(256, int(labels.max(initial=0)) + 1), 3), 255, np.uint8)
    table[: count + background] = [BACKGROUND] * background + list(colors(count))
    return table[labels]


def palette_image(labels: Integer[np.ndarray, "H W"], count: int) -> Image.Image:
    """A palette image whose pixel values are the labels: 0 background, 1..count the classes."""
    image = Image.fromarray(labels.astype(np.uint8))
    table = [BACKGROUND, *colors(count)] + [(255, 255, 255)] * (255 - count)
    image.putpalette([channel for color in table for channel in color])
    return image
