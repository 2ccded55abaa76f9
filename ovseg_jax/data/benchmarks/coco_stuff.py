"""COCO-Stuff 164k, the validation set: 80 things and 91 stuff classes, no background."""

from pathlib import Path

from ovseg_jax.data.benchmarks.folders import LabeledFolder, find_root, png_values, require
from ovseg_jax.data.benchmarks.tables import class_table
from ovseg_jax.errors import UserError

NAME = "coco_stuff"
IMAGES = ("val2017", "images/val2017")
# The official archive, and where other programs keep its pixel maps beside their own files.
MASKS = ("stuffthingmaps/val2017", "stuffthingmaps_trainval2017/val2017", "annotations/val2017")


def open_coco_stuff(directory: str | Path, field: str) -> LabeledFolder:
    """Opens the folder with val2017 and the pixel maps of stuffthingmaps_trainval2017.

    Raises:
      UserError: files are missing; it names them.
    """
    needed = ("|".join(IMAGES), "|".join(MASKS))
    root = find_root(NAME, directory, ("", "coco", "coco2017"), needed, field)
    image_folder, mask_folder = (
        next(root / place for place in places if (root / place).is_dir())
        for places in (IMAGES, MASKS)
    )
    masks = [path for path in sorted(mask_folder.glob("*.png")) if "TrainIds" not in path.name]
    if not masks:
        raise UserError(f"benchmark {NAME}: {mask_folder} holds no pixel maps (*.png)")
    keys = tuple(path.stem for path in masks)
    images = tuple(image_folder / f"{key}.jpg" for key in keys)
    require(NAME, images)
    table = class_table(NAME)
    return LabeledFolder(
        NAME, table, root, "pixel maps", keys, images, lambda i: table.relabel(png_values(masks[i]))
    )
