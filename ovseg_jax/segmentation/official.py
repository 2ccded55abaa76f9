"""Official folders of evaluation sets as benchmarks, and parts of them."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovseg_jax.data.benchmarks import OPENERS, LabeledFolder, open_train
from ovseg_jax.data.benchmarks.prepared import PreparedSet, open_prepared, prepared_folder
from ovseg_jax.data.decoding import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.metric import IGNORE
from ovseg_jax.segmentation.splits import PAPER_COUNTS, unseen_classes, zss_unseen
from ovseg_jax.shapes import UInt8

_LOOKED_AT = 8  # label files that are read before anything is computed, evenly over the set


@dataclass(frozen=True)
class FolderBenchmark:
    """The images of an official folder, in their official order.

    Attributes:
      name: of `FOLDERS`.
      dir: the official folder or the one above it, or what `data.benchmarks.builders` has written
        of it, or the folder with those.
      count: of the first images, for a quick look; 0 for all, which alone is to be reported.
      split: 'validation', or 'train' to choose a threshold on.

    Raises:
      UserError: files are missing (it names them), or a field is wrong.
    """

    name: str
    dir: str = ""
    count: int = 0
    split: str = "validation"

    def __post_init__(self):
        if self.count < 0:
            raise UserError(f"benchmark {self.name}: count must not be negative")
        # Opened here, so that a missing file is reported before any model runs.
        if not len(self._images):
            raise UserError(f"benchmark {self.name}: {self._images.root} holds no images")
        # Labels of another kind show in nearly every file.
        for index in range(0, len(self), -(-len(self) // _LOOKED_AT)):
            self._images.labels(index)

    @functools.cached_property
    def _images(self) -> LabeledFolder | PreparedSet:
        base = FOLDERS[self.name].base
        field = f"data_dir, or --config.eval.{self.name}.dir"
        if self.split != "validation":
            return open_train(base, self.dir, field)
        prepared = prepared_folder(base, self.dir)
        if prepared is not None:
            return open_prepared(base, prepared)
        return OPENERS[base](self.dir, field)

    @property
    def keys(self) -> tuple[str, ...]:
        """One name an image, in the official order."""
        return self._images.keys

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._images.table.words

    @property
    def official_names(self) -> tuple[str, ...]:
        return self._images.table.names

    @property
    def unseen(self) -> tuple[int, ...]:
        return unseen_classes(FOLDERS[self.name].base, self.official_names)

    @property
    def zss(self) -> tuple[int, ...]:
        """Classes that zero-shot segmentation leaves out of training (Table 2)."""
        return zss_unseen(FOLDERS[self.name].base, self.official_names)

    @property
    def paper_counts(self) -> tuple[int, int] | None:
        """(seen, unseen) classes in Table 7."""
        return PAPER_COUNTS.get(FOLDERS[self.name].base)

    @property
    def entities_known(self) -> bool:
        """Whether `unseen` is known: for the sets of Table 7."""
        return self.paper_counts is not None

    @property
    def has_background(self) -> bool:
        return self._images.table.background and not FOLDERS[self.name].drop_background

    @property
    def expected(self) -> int:
        """How many images the validation set has where it is complete."""
        return FOLDERS[self.name].images

    def __len__(self) -> int:
        return min(self.count, len(self._images)) if self.count else len(self._images)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            image = np.asarray(decode(self._images.image_bytes(index)))
        except UnreadableImage as error:
            raise UserError(
                f"benchmark {self.name}: image {index} of {self._images.root} cannot be read "
                f"({error}); copy the official file again"
            ) from error
        labels = self._images.labels(index)
        if labels.shape != image.shape[:2]:
            raise UserError(
                f"benchmark {self.name}: image {index} of {self._images.root} has "
                f"{image.shape[1]}x{image.shape[0]} pixels but its labels "
                f"{labels.shape[1]}x{labels.shape[0]}: they are not of the same release"
            )
        if FOLDERS[self.name].drop_background:
            # 0 becomes 255, which is ignored, as 255 itself must stay.
            labels = np.where(labels == IGNORE, IGNORE, labels - np.uint8(1)).astype(np.uint8)
        return image, labels

    def describe(self) -> dict[str, Any]:
        table = self._images.table
        dropped = " Here background is ignored." * FOLDERS[self.name].drop_background
        return {
            "title": table.title,
            "source": table.source,
            "rule": table.rule + dropped,
            "form": self._images.form,
            "differs": self._images.differs,
            "split": self.split,
            "whole": len(self) == len(self._images),
            "images_expected": self.expected if self.split == "validation" else None,
        }


class UnseenAlone:
    """The unseen classes of Table 2 as the only candidates; every other pixel is ignored.

    Attributes:
      whole: the benchmark with all its classes. name: such as 'voc_zss'.
    """

    has_background = False
    unseen = ()

    def __init__(self, name: str, **fields: Any):
        self.name = name
        self.whole = FolderBenchmark(name.removesuffix("_zss"), **fields)
        self._lookup = np.full(256, IGNORE, np.uint8)
        self._lookup[1 + np.array(self.whole.zss)] = np.arange(len(self.whole.zss))

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.whole.class_names[i] for i in self.whole.zss)

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        image, labels = self.whole[index]
        return image, self._lookup[labels]

    def describe(self) -> dict[str, Any]:
        """As the whole benchmark, with what is left out."""
        rule = "Only the classes that zero-shot segmentation does not train on; others are ignored."
        return {**self.whole.describe(), "rule": rule}


@dataclass(frozen=True)
class _Folder:
    """One kind of official folder: `images` of its validation set; `base` is what is read."""

    base: str
    images: int
    drop_background: bool = False


# The counts of VOC, Context, COCO Object and ADE20K are those of Sec. 4.1 of the paper.
FOLDERS = {
    "voc": _Folder("voc", 1449),
    "voc20": _Folder("voc", 1449, drop_background=True),
    "context": _Folder("context", 5105),
    "context59": _Folder("context", 5105, drop_background=True),
    "coco_object": _Folder("coco_object", 5000),
    "coco_stuff": _Folder("coco_stuff", 5000),
    "ade20k": _Folder("ade20k", 2000),
    "cityscapes": _Folder("cityscapes", 500),
}
