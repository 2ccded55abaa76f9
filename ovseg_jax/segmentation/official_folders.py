"""Official folders of evaluation sets as benchmarks, and which of their classes count as unseen.

*Entities* (the paper's Table 7): a class is seen if training captions were filtered, and their
words masked, by an entity of its name. The paper lists only numbers, so membership follows a
written rule: a class is seen if its official name is one of the 100 surface forms, one of the 73
names of their entities, or in `OTHER_NAMES`. Kinds of an entity ("wine glass", "traffic light") are
unseen. By this rule VOC has 20 + 0, COCO Object 64 + 16, Context 31 + 28, ADE20K 32 + 118;
`PAPER_COUNTS` has the paper's. Each difference is one class: COCO's are 81 with background, and
Context and ADE20K have the paper's numbers if "person" is unseen, which its text calls seen.

*ZSS* (Table 2): the classes that zero-shot segmentation leaves out of training.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from ovseg_jax.data.benchmarks import OPENERS, LabeledFolder, open_train
from ovseg_jax.data.benchmarks.folders import PreparedSet, open_prepared, prepared_folder
from ovseg_jax.data.decoding import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.metric import IGNORE
from ovseg_jax.shapes import UInt8


@dataclass(frozen=True)
class Folder:
    """A kind of official folder.

    Attributes:
      base: the evaluation set that is read.
      images: size of its validation set.
      drop_background: whether the background is ignored.
    """

    base: str
    images: int
    drop_background: bool = False


# A new official folder is a row here, and one of `data.benchmarks.OPENERS`. The counts of VOC,
# Context, COCO Object and ADE20K are those of Sec. 4.1 of the paper.
FOLDERS = {
    "voc": Folder("voc", 1449),
    "voc20": Folder("voc", 1449, drop_background=True),
    "context": Folder("context", 5105),
    "context59": Folder("context", 5105, drop_background=True),
    "coco_object": Folder("coco_object", 5000),
    "coco_stuff": Folder("coco_stuff", 5000),
    "ade20k": Folder("ade20k", 2000),
    "cityscapes": Folder("cityscapes", 500),
}
# Classes whose masks zero-shot segmentation never trains on (Sec. 4.2).
ZSS = {
    "voc": ("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    "context": ("cow", "motorbike", "sofa", "cat"),
}
# (seen, unseen) in Table 7. COCO's sum is 81, one more than its classes without background.
PAPER_COUNTS = {
    "voc": (20, 0),
    "coco_object": (65, 16),
    "context": (30, 29),
    "ade20k": (31, 119),
}
# Classes of VOC and COCO under another name than the entity's.
OTHER_NAMES = {
    "person": "people",
    "diningtable": "table",
    "pottedplant": "plant",
    "tvmonitor": "tv",
    "cellphone": "phone",
}
_LOOKED_AT = 8  # label files that are read before anything is computed, evenly over the set


@functools.cache
def _surface_forms() -> frozenset[str]:
    path = resources.files("ovseg_jax.data") / "entity_lists" / "published.json"
    entities = json.loads(path.read_text(encoding="utf-8"))["entities"]
    forms = {form for words in entities.values() for form in words}
    return frozenset(form.lower() for form in (*forms, *entities))


def is_seen(name: str) -> bool:
    """Whether a class of this official name is an entity; see the module's docstring."""
    name = name.lower().strip()
    return OTHER_NAMES.get(name.replace(" ", ""), name) in _surface_forms()


def unseen_classes(base: str, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the classes that are no entities, for the sets of Table 7; () for others."""
    if base not in PAPER_COUNTS:
        return ()
    return tuple(i for i, name in enumerate(names) if not is_seen(name))


def zss_unseen(base: str, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the classes of Table 2; () for other benchmarks."""
    return tuple(i for i, name in enumerate(names) if name in ZSS.get(base, ()))


@dataclass(frozen=True)
class FolderBenchmark:
    """The images of an official folder, in their official order; see `benchmarks.Benchmark`.

    Attributes:
      name: a key of `FOLDERS`.
      dir: the official folder or the one above it, or what `data.benchmarks.builders` has written
        of it, or the folder with those.
      count: only the first images, for a quick look; 0 for all. Report only results of all.
      split: 'validation', or 'train' to choose a threshold on.
      every: only every so many-th image.

    Raises:
      UserError: files are missing (it names them), labels are of another kind, or a field is wrong.
    """

    name: str
    dir: str = ""
    count: int = 0
    split: str = "validation"
    every: int = 1

    def __post_init__(self):
        if self.count < 0:
            raise UserError(f"benchmark {self.name}: count must not be negative")
        # Opened here, so that a missing file is reported before any model runs.
        if not len(self._images):
            raise UserError(f"benchmark {self.name}: {self._images.root} holds no images")
        # Labels of another kind show in nearly every file.
        looked_at = range(0, len(self), -(-len(self) // _LOOKED_AT))
        has_background = [(self._images.labels(i * self.every) == 0).any() for i in looked_at]
        if self._images.table.background and len(looked_at) > 1 and not any(has_background):
            raise UserError(
                f"benchmark {self.name}: none of {len(looked_at)} label files in "
                f"{self._images.root} has the value 0, background. They seem to be shifted by one, "
                "as some programs train with them: unpack the official ones"
            )

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
        """The name of each image, in the official order."""
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
        """(seen, unseen) classes in Table 7; None where `unseen` is not known."""
        return PAPER_COUNTS.get(FOLDERS[self.name].base)

    @property
    def has_background(self) -> bool:
        return self._images.table.background and not FOLDERS[self.name].drop_background

    def __len__(self) -> int:
        present = -(-len(self._images) // self.every)
        return min(self.count, present) if self.count else present

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        index *= self.every
        where = f"benchmark {self.name}: image {index} of {self._images.root}"
        try:
            image = np.asarray(decode(self._images.image_bytes(index)))
        except UnreadableImage as error:
            raise UserError(
                f"{where} cannot be read ({error}); copy the official file again"
            ) from error
        labels = self._images.labels(index)
        if labels.shape != image.shape[:2]:
            raise UserError(
                f"{where} has {image.shape[1]}x{image.shape[0]} pixels but its labels "
                f"{labels.shape[1]}x{labels.shape[0]}: they are not of the same release"
            )
        if FOLDERS[self.name].drop_background:
            # 0 becomes 255, which is ignored, as 255 itself must stay.
            labels = np.where(labels == IGNORE, IGNORE, labels - np.uint8(1)).astype(np.uint8)
        return image, labels

    def describe(self) -> dict[str, Any]:
        table, folder = self._images.table, FOLDERS[self.name]
        return {
            "title": table.title,
            "source": table.source,
            "rule": table.rule + " Here background is ignored." * folder.drop_background,
            "form": self._images.form,
            "differs": self._images.differs,
            "split": self.split,
            "whole": len(self) == len(self._images),
            "every": self.every,
            "images_expected": folder.images if self.split == "validation" else None,
        }


class UnseenAlone:
    """A benchmark whose classes are only the unseen ones of Table 2; other pixels are ignored.

    Attributes:
      whole: the benchmark with all its classes.
      name: such as 'voc_zss'.
    """

    has_background = False
    unseen = ()

    def __init__(self, name: str, **fields: Any):
        self.name = name
        self.whole = FolderBenchmark(name.removesuffix("_zss"), **fields)
        self.class_names = tuple(self.whole.class_names[i] for i in self.whole.zss)
        self._lookup = np.full(256, IGNORE, np.uint8)
        self._lookup[1 + np.array(self.whole.zss)] = np.arange(len(self.whole.zss))

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        image, labels = self.whole[index]
        return image, self._lookup[labels]

    def describe(self) -> dict[str, Any]:
        rule = "Only the classes that zero-shot segmentation does not train on; others are ignored."
        return {**self.whole.describe(), "rule": rule}
