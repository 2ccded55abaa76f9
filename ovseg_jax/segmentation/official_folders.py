"""Official folders of evaluation sets as benchmarks, and which of their classes count as unseen.

*Entities* (the paper's Table 7): a class is seen if training captions were filtered, and their
words masked, by an entity of its name. The paper lists only numbers, so we call a class seen if its
official name is one of the 100 surface forms, of the 73 names of their entities, or in
`OTHER_NAMES`; kinds of an entity ("wine glass") are unseen. `PAPER_COUNTS` differ by one class:
COCO's are 81 with background, and Context's and ADE20K's come out if "person" is unseen.

*ZSS* (Table 2): the classes that zero-shot segmentation leaves out of training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ovseg_jax.data.benchmarks import OPENERS, open_train
from ovseg_jax.data.benchmarks.class_tables import IGNORE
from ovseg_jax.data.benchmarks.folders import open_prepared, prepared_folder
from ovseg_jax.data.decoding import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.protocol import data_file
from ovseg_jax.shapes import UInt8


class Folder(NamedTuple):
    """A kind of official folder."""

    base: str  # the evaluation set that is read
    images: int  # of its validation set
    drop_background: bool = False
    only_unseen: bool = False  # only the unseen classes of Table 2 count, and all else is ignored


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
    "voc_zss": Folder("voc", 1449, only_unseen=True),
    "context_zss": Folder("context", 5105, only_unseen=True),
}
# Classes whose masks zero-shot segmentation never trains on (Sec. 4.2).
ZSS = {
    "voc": ("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    "context": ("cow", "motorbike", "sofa", "cat"),
}
# (seen, unseen) in Table 7.
PAPER_COUNTS = {"voc": (20, 0), "coco_object": (65, 16), "context": (30, 29), "ade20k": (31, 119)}
# Classes of VOC and COCO under another name than the entity's.
OTHER_NAMES = {
    "person": "people",
    "diningtable": "table",
    "pottedplant": "plant",
    "tvmonitor": "tv",
    "cellphone": "phone",
}
Labeled = tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]  # image and labels
_LOOKED_AT = 8  # label files that are read before anything is computed, evenly over the set


def is_seen(name: str) -> bool:
    """Whether a class of this official name is an entity; see the module's docstring."""
    entities = data_file("entity_lists/published.json", "ovseg_jax.data")["entities"]
    forms = {form.lower() for words in entities.values() for form in words}
    name = name.lower().strip()
    return OTHER_NAMES.get(name.replace(" ", ""), name) in forms | {x.lower() for x in entities}


def unseen_classes(base: str, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the classes that are no entities, for the sets of Table 7; () for others."""
    return tuple(i for i, name in enumerate(names) if base in PAPER_COUNTS and not is_seen(name))


class FolderBenchmark:
    """The images of an official folder, in their official order; see `benchmarks.Benchmark`. What
    is missing or of another kind is a UserError before any model runs.

    Attributes:
      table: the classes of the whole evaluation set; chosen: those of them that count here.
      zss: classes that zero-shot segmentation leaves out of training (Table 2).
      paper_counts: (seen, unseen) classes in Table 7; None where `unseen` is not known.

    Args:
      dir: the official folder or the one above it, or one that `data.benchmarks.builders` wrote.
      count, every: only the first images (0 for all), only every so many-th image.
      split: 'validation', or 'train' to choose a threshold on.
    """

    def __init__(
        self, name: str, dir: str = "", count: int = 0, split: str = "validation", every: int = 1
    ):
        if count < 0:
            raise UserError(f"benchmark {name}: count must not be negative")
        self.name, self._folder, self._every, self._split = name, FOLDERS[name], every, split
        base, unseen_alone = self._folder.base, self._folder.only_unseen
        field = f"data_dir, or --config.eval.{name}.dir"
        if split != "validation":
            self._images = open_train(base, dir, field)
        elif prepared := prepared_folder(base, dir):
            self._images = open_prepared(base, prepared)
        else:
            self._images = OPENERS[base](dir, field)
        self.table, total = self._images.table, len(self._images)
        if not total:
            raise UserError(f"benchmark {name}: {self._images.root} holds no images")
        present = -(-total // every)
        self._count = min(count, present) if count else present
        names, left_out = self.table.names, ZSS.get(base, ())
        table_2 = tuple(i for i, name in enumerate(names) if name in left_out)
        self.chosen = table_2 if unseen_alone else tuple(range(len(names)))
        self.class_names = tuple(self.table.words[i] for i in self.chosen)
        self.zss = () if unseen_alone else table_2
        self.unseen = () if unseen_alone else unseen_classes(base, names)
        self.paper_counts = None if unseen_alone else PAPER_COUNTS.get(base)
        dropped = self._folder.drop_background or unseen_alone
        self.has_background = self.table.background and not dropped
        # The label here of each label of the table.
        self._lookup = np.arange(256, dtype=np.uint8)
        if dropped:
            self._lookup = np.full(256, IGNORE, np.uint8)
            self._lookup[1 + np.array(self.chosen)] = np.arange(len(self.chosen))
        # Labels of another kind show in nearly every file.
        looked_at = range(0, len(self), -(-len(self) // _LOOKED_AT))
        has_background = [(self._images.labels(i * every) == 0).any() for i in looked_at]
        if self.table.background and len(looked_at) > 1 and not any(has_background):
            files = f"none of {len(looked_at)} label files in {self._images.root}"
            hint = "they seem to be shifted by one; unpack the official ones"
            raise UserError(f"benchmark {name}: {files} has the value 0, background: {hint}")

    @property
    def keys(self) -> tuple[str, ...]:
        """The name of each image, in the official order."""
        return self._images.keys

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Labeled:
        if not 0 <= index < len(self):
            raise IndexError(index)
        index *= self._every
        where = f"benchmark {self.name}: image {index} of {self._images.root}"
        try:
            image = np.asarray(decode(self._images.image_bytes(index)))
        except UnreadableImage as error:
            text = f"{where} cannot be read ({error}); copy the official file again"
            raise UserError(text) from None
        labels = self._images.labels(index)
        if labels.shape != image.shape[:2]:
            (height, width), (down, across) = image.shape[:2], labels.shape
            raise UserError(f"{where} has {width}x{height} pixels, its labels {across}x{down}")
        return image, self._lookup[labels]

    def describe(self) -> dict[str, Any]:
        """Which images these are, and by which rule they are labeled."""
        rule = self.table.rule + " Here background is ignored." * self._folder.drop_background
        if self._folder.only_unseen:
            rule = "Only classes that zero-shot segmentation does not train on; others are ignored."
        return {
            "title": self.table.title,
            "source": self.table.source,
            "rule": rule,
            "form": self._images.form,
            "differs": self._images.differs,
            "split": self._split,
            "whole": len(self) == len(self._images),
            "every": self._every,
            "images_expected": self._folder.images if self._split == "validation" else None,
        }
