"""PASCAL VOC 2012, the segmentation validation set: 20 classes and background."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ovseg_jax.data.benchmarks.folders import (
    LabeledFolder,
    find_root,
    png_values,
    read_names,
    require,
    require_equal_sizes,
)
from ovseg_jax.data.benchmarks.tables import IGNORE, class_table

NAME = "voc"


def open_voc(directory: str | Path, field: str, split: str = "val") -> LabeledFolder:
    """Opens VOCdevkit/VOC2012 (or a folder above it); `split` is "val" or "train".

    Raises:
      UserError: files are missing; it names them.
    """
    listed = f"ImageSets/Segmentation/{split}.txt"
    below = ("", "VOC2012", "VOCdevkit/VOC2012")
    root = find_root(NAME, directory, below, ("JPEGImages", "SegmentationClass", listed), field)
    keys = read_names(NAME, root / listed)
    images = tuple(root / "JPEGImages" / f"{key}.jpg" for key in keys)
    masks = tuple(root / "SegmentationClass" / f"{key}.png" for key in keys)
    require(NAME, (*images, *masks))
    require_equal_sizes(NAME, images, masks)
    table = class_table(NAME)

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        values = png_values(masks[index])
        labels = table.relabel(values)
        labels[values == IGNORE] = IGNORE
        return labels

    return LabeledFolder(NAME, table, root, "palette", keys, images, read_labels)
