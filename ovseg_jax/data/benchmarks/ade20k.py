"""ADE20K as in the scene parsing challenge of 2016: 150 classes, no background."""

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

NAME = "ade20k"
IMAGES, MASKS = "images/validation", "annotations/validation"


def open_ade20k(directory: str | Path, field: str) -> LabeledFolder:
    """Opens ADEChallengeData2016 (or the folder above it).

    Raises:
      UserError: files are missing; it names them.
    """
    root = find_root(NAME, directory, ("", "ADEChallengeData2016"), (IMAGES, MASKS), field)
    keys = tuple(sorted(path.stem for path in (root / MASKS).glob("*.png")))
    if not keys:
        raise UserError(f"benchmark {NAME}: {root / MASKS} holds no .png; unpack it again")
    images = tuple(root / IMAGES / f"{key}.jpg" for key in keys)
    masks = [root / MASKS / f"{key}.png" for key in keys]
    require(NAME, images)
    require_equal_sizes(NAME, images, masks)
    table = class_table(NAME)
    return LabeledFolder(
        NAME, table, root, "gray", keys, images, lambda i: table.relabel(png_values(masks[i]))
    )
