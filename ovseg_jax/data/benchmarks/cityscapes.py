"""Cityscapes, the validation set with fine annotation: 19 classes, no background."""

from pathlib import Path

from ovseg_jax.data.benchmarks.folders import (
    LabeledFolder,
    find_root,
    png_values,
    require,
    require_equal_sizes,
)
from ovseg_jax.data.benchmarks.tables import class_table
from ovseg_jax.errors import UserError

NAME = "cityscapes"
IMAGES, MASKS = "leftImg8bit/val", "gtFine/val"


def open_cityscapes(directory: str | Path, field: str) -> LabeledFolder:
    """Opens the folder with leftImg8bit and gtFine (or the one above it).

    Raises:
      UserError: files are missing; it names them.
    """
    root = find_root(NAME, directory, ("", "cityscapes"), (IMAGES, MASKS), field)
    suffix = "_gtFine_labelIds.png"
    masks = tuple(sorted((root / MASKS).glob(f"*/*{suffix}")))
    if not masks:
        raise UserError(f"benchmark {NAME}: {root / MASKS} holds no CITY/*{suffix}; unpack gtFine")
    keys = tuple(path.name.removesuffix(suffix) for path in masks)
    images = tuple(
        root / IMAGES / mask.parent.name / f"{key}_leftImg8bit.png"
        for mask, key in zip(masks, keys, strict=True)
    )
    require(NAME, images)
    require_equal_sizes(NAME, images, masks)
    table = class_table(NAME)
    return LabeledFolder(
        NAME, table, root, "labelIds", keys, images, lambda i: table.relabel(png_values(masks[i]))
    )
