"""Images, masks and a list of classes of your own as a benchmark.

    DIR/images/NAME.jpg (or any format)   DIR/masks/NAME.png   DIR/classes.txt

``classes.txt`` has one class a line, synonyms between bars (``cat|kitten``). Where its first line
is ``background``, 0 in the masks is background and the next line is 1; otherwise the first line is
0. 255 in the masks is ignored. Masks are gray, palette or black-and-white PNG files, whose values
are the labels; all of them are read before anything is computed. Photographs are turned upright by
their EXIF tag, and masks are of that size.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovseg_jax.data.benchmarks.folders import LABEL_MODES, upright_size
from ovseg_jax.data.decoding import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.metric import IGNORE
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.shapes import UInt8

CLASSES, IMAGES, MASKS = "classes.txt", "images", "masks"
_MOST = IGNORE - 1  # labels that fit beside the ignored one, background not counted
_NAMED = 5  # masks that a message describes before it only counts them


@dataclass(frozen=True)
class OwnFolder:
    """See the module's docstring.

    Attributes:
      dir: the folder. count: of the first images by name; 0 for all.

    Raises:
      UserError: files are missing, names do not match, or masks are no masks; it says which.
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
        self._check_masks()

    def _check_masks(self) -> None:
        """Reads every mask, so that a bad mask is reported now and not after hours."""
        wrong, present = [], set()
        for index in range(len(self._pairs)):
            try:
                present |= set(np.unique(self._labels(index)).tolist())
            except UserError as error:
                wrong.append(str(error))
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise UserError(
                f"benchmark folder: {len(wrong)} of {len(self._pairs)} masks cannot be used: "
                f"{'; '.join(wrong[:_NAMED])}{more}"
            )
        if self.has_background and not present - {0, IGNORE}:
            hint = ""
            if IGNORE in present:
                hint = f"; {IGNORE} is ignored: write a class as the number of its line, 1 and up"
            raise UserError(
                f"benchmark folder: no mask in {Path(self.dir) / MASKS} has a pixel of any class, "
                f"only {' and '.join(map(str, sorted(present)))}{hint}"
            )

    @functools.cached_property
    def _lines(self) -> tuple[str, ...]:
        path = Path(self.dir) / CLASSES
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"benchmark folder: {path} cannot be read ({error}); it lists the classes, one a "
                "line"
            ) from None
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        background = bool(lines) and lines[0].lower() == "background"
        if not 0 < len(lines) - background <= _MOST:
            raise UserError(f"benchmark folder: {path} must list 1 to {_MOST} classes, one a line")
        if len(lines) == 1:
            raise UserError(
                f"benchmark folder: with the one class of {path} every pixel would be right; add "
                "'background' as its first line"
            )
        return lines

    @functools.cached_property
    def _images(self) -> dict[str, Path]:
        """The files in `images` by their names without suffix."""
        images: dict[str, Path] = {}
        for path in sorted((Path(self.dir) / IMAGES).iterdir()):
            if path.stem in images:
                raise UserError(f"benchmark folder: {images[path.stem]} and {path} have one name")
            images[path.stem] = path
        return images

    @functools.cached_property
    def _pairs(self) -> tuple[tuple[Path, Path], ...]:
        """(image, mask) of each mask, by name."""
        root = Path(self.dir)
        for part in (IMAGES, MASKS):
            if not (root / part).is_dir():
                raise UserError(f"benchmark folder: {root} has no folder {part}")
        images = self._images
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
        return self._lines[0].lower() == "background"

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
        path, labels = self._pairs[index][0], self._labels(index)
        try:
            image = np.asarray(decode(path.read_bytes()))
        except (OSError, UnreadableImage) as error:
            raise UserError(f"benchmark folder: {path} cannot be read ({error})") from None
        return image, labels

    def _labels(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """A mask, after all that can be wrong with it."""
        image_path, mask_path = self._pairs[index]
        try:
            width, height = upright_size(image_path)
            with Image.open(mask_path) as mask:
                mode, values = mask.mode, np.asarray(mask)
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise UserError(f"{mask_path} or its image cannot be read ({error})") from None
        if mode not in (*LABEL_MODES, "1"):
            raise UserError(
                f"{mask_path} holds {mode} pixels: save it as gray or palette PNG, whose values "
                f"are the numbers of the lines of {CLASSES}"
            )
        values, labels = values.astype(np.int64), len(self._lines)
        wrong = np.unique(values[(values != IGNORE) & ((values < 0) | (values >= labels))])
        if wrong.size:
            raise UserError(
                f"{mask_path} has the label {int(wrong[0])}, but {CLASSES} has {labels} lines "
                f"(labels 0 to {labels - 1}; {IGNORE} is ignored)"
            )
        if values.shape != (height, width):
            turned = ", turned upright by its EXIF tag," * (values.shape == (width, height))
            raise UserError(
                f"{image_path} has {width}x{height} pixels{turned} but its mask "
                f"{values.shape[1]}x{values.shape[0]}"
            )
        return values.astype(np.uint8)

    @property
    def class_file(self) -> dict[str, str]:
        """The list of classes, and the first digits of its SHA-256."""
        content = (Path(self.dir) / CLASSES).read_bytes()
        return {"file": CLASSES, "sha256": hashlib.sha256(content).hexdigest()[:12]}

    def describe(self) -> dict[str, Any]:
        """Where the images are, and how many were not used."""
        known = Image.registered_extensions()
        images = sum(path.suffix.lower() in known for path in self._images.values())
        masked = len(list((Path(self.dir) / MASKS).glob("*.png")))
        return {
            "title": f"own images in {Path(self.dir).name}",
            "split": "all",
            "whole": len(self) == masked,
            "images_without_mask": max(0, images - masked),
        }
