"""COCO-Stuff 164k, the validation set: 80 things and 91 stuff classes, no background."""

from pathlib import Path

from ovseg_jax.data.benchmarks.coco_maps import image_places, map_places, pixel_maps
from ovseg_jax.data.benchmarks.folders import LabeledFolder, find_root, png_values
from ovseg_jax.data.benchmarks.tables import class_table

NAME = "coco_stuff"


def open_coco_stuff(directory: str | Path, field: str) -> LabeledFolder:
    """Opens the folder with val2017 and the pixel maps of stuffthingmaps_trainval2017.

    Raises:
      UserError: files are missing; it names them.
    """
    needed = ("|".join(image_places("val")), "|".join(map_places("val")))
    root = find_root(NAME, directory, ("", "coco", "coco2017"), needed, field)
    keys, images, maps = pixel_maps(NAME, root, "val")
    table = class_table(NAME)
    return LabeledFolder(
        NAME, table, root, "pixel maps", keys, images, lambda i: table.relabel(png_values(maps[i]))
    )
