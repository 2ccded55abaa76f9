"""One's own images, masks and list of classes as a benchmark.

    DIR/images/NAME.jpg (or any format)   DIR/masks/NAME.png   DIR/classes.txt

``classes.txt`` has one class a line, synonyms between bars (``cat|kitten``). Where its first line
is ``background``, 0 in the masks is background and the next line is 1; otherwise the first line is
0. 255 in the masks is ignored. Masks are gray or palette PNG files, whose values are the labels.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.data.benchmarks.folders import png_values
from ovseg_jax.data.decoding import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.metric import IGNORE
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.shapes import UInt8

CLASSES, IMAGES, MASKS = "classes.txt", "images", "masks"
_MOST = IGNORE - 1  # labels that fit beside the ignored one, background not counted


@dataclass(frozen=True)
class OwnFolder:
    """See the module's docstring.

    Attributes:
      dir: the folder. count: of the first images by name; 0 for all.

    Raises:
      UserError: files are missing, names do not match, or a mask is no mask; it says which.
    """

    dir: str = ""
    count: int = 0

    name = "folder"
    unseen = ()

    def __post_init__(self):
        if self.count < 0:
            raise UserError("benchmark folder: count must not be negative")
        if not self.dir:
            raise UserError(
                f"benchmark folder needs a folder with {IMAGES}/, {MASKS}/ and {CLASSES}: give "
                "--data_dir=DIR"
            )
        Vocabulary.of(self.entries)
        if not self._pairs:
            raise UserError(f"benchmark folder: {Path(self.dir) / MASKS} holds no .png")

    @functools.cached_property
    def _lines(self) -> tuple[str, ...]:
        path = Path(self.dir) / CLASSES
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"benchmark folder: {path} cannot be read ({error}); it lists the classes, one a "
                "line"
            ) from None
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not 0 < len(lines) - (lines[:1] == ("background",)) <= _MOST:
            raise UserError(f"benchmark folder: {path} must list 1 to {_MOST} classes, one a line")
        return lines

    @functools.cached_property
    def _pairs(self) -> tuple[tuple[Path, Path], ...]:
        """(image, mask) of each mask, by name."""
        root = Path(self.dir)
        for part in (IMAGES, MASKS):
            if not (root / part).is_dir():
                raise UserError(f"benchmark folder: {root} has no folder {part}")
        images: dict[str, Path] = {}
        for path in sorted((root / IMAGES).iterdir()):
            if path.stem in images:
                raise UserError(f"benchmark folder: {images[path.stem]} and {path} have one name")
            images[path.stem] = path
        masks = sorted((root / MASKS).glob("*.png"))
        lacking = [mask.name for mask in masks if mask.stem not in images]
        if lacking:
            raise UserError(
                f"benchmark folder: {len(lacking)} masks have no image in {root / IMAGES}: "
                f"{', '.join(lacking[:5])}"
            )
        pairs = tuple((images[mask.stem], mask) for mask in masks)
        return pairs[: self.count] if self.count else pairs

    @property
    def has_background(self) -> bool:
        return self._lines[0] == "background"

    @property
    def entries(self) -> tuple[str, ...]:
        """The classes with their synonyms, see `vocabulary`."""
        return self._lines[self.has_background :]

    @property
    def class_names(self) -> tuple[str, ...]:
        return Vocabulary.of(self.entries).classes

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image_path, mask_path = self._pairs[index]
        try:
            image = np.asarray(decode(image_path.read_bytes()))
        except (OSError, UnreadableImage) as error:
            raise UserError(f"benchmark folder: {image_path} cannot be read ({error})") from None
        try:
            values = png_values(mask_path)
        except UserError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise UserError(f"benchmark folder: {mask_path} cannot be read ({error})") from None
        labels = len(self._lines)
        wrong = np.unique(values[(values != IGNORE) & ((values < 0) | (values >= labels))])
        if wrong.size:
            raise UserError(
                f"benchmark folder: {mask_path} has the label {int(wrong[0])}, but {CLASSES} has "
                f"{labels} lines (labels 0 to {labels - 1}; {IGNORE} is ignored)"
            )
        if values.shape != image.shape[:2]:
            raise UserError(
                f"benchmark folder: {image_path} has {image.shape[1]}x{image.shape[0]} pixels but "
                f"its mask {values.shape[1]}x{values.shape[0]}"
            )
        return image, values.astype(np.uint8)

    def describe(self) -> dict[str, Any]:
        """Where the images are."""
        return {"title": f"own images in {Path(self.dir).name}", "split": "all"}
