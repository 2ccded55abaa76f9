"""COCO Object: the 80 classes of COCO's instances, and background, on val2017.

Its labels come in two forms, looked for in this order:

'pixel maps'  stuffthingmaps_trainval2017, those of COCO-Stuff without its stuff. Published scores
              were computed from these (the conversion that GroupViT began, and others took over).
'instances'   annotations/instances_val2017.json, regions painted by our own rule. Where objects
              overlap, and where a pixel map has none, labels differ.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ovseg_jax.data.benchmarks.coco_maps import (
    first_folder,
    image_places,
    map_places,
    pixel_maps,
)
from ovseg_jax.data.benchmarks.coco_masks import load_codec, mask_of
from ovseg_jax.data.benchmarks.folders import LabeledFolder, find_root, png_values, require
from ovseg_jax.data.benchmarks.tables import ClassTable, class_table
from ovseg_jax.errors import UserError

NAME = "coco_object"
DIFFERS = (
    "its labels were painted from COCO's instances; published scores were computed from the pixel "
    "maps of COCO-Stuff (stuffthingmaps_trainval2017)"
)


def open_coco_object(directory: str | Path, field: str, split: str = "val") -> LabeledFolder:
    """Opens the folder with val2017 and one of the forms of its labels, or with those of "train".

    Images without any object belong to it: they are background throughout.

    Raises:
      UserError: files are missing (it names them), or pycocotools is.
    """
    instances = f"annotations/instances_{split}2017.json"
    places = image_places(split)
    needed = ("|".join(places), "|".join((*map_places(split), instances)))
    root = find_root(NAME, directory, ("", "coco", "coco2017"), needed, field)
    if first_folder(root, map_places(split)) is None:
        return _open_instances(root, root / instances, first_folder(root, places))
    keys, images, maps = pixel_maps(NAME, root, split)
    table = class_table(NAME)
    # The maps number classes from 0.
    values = tuple(value - 1 for value in table.values)
    return LabeledFolder(
        NAME,
        table,
        root,
        "pixel maps",
        keys,
        images,
        lambda index: table.relabel(png_values(maps[index]), values),
    )


def _open_instances(root: Path, path: Path, folder: Path) -> LabeledFolder:
    load_codec()
    table = class_table(NAME)
    try:
        document = json.loads(path.read_bytes())
        entries = sorted(document["images"], key=lambda entry: entry["id"])
        regions = defaultdict(list)
        for region in document["annotations"]:
            regions[region["image_id"]].append(region)
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"benchmark {NAME}: {path} is no COCO instance file "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error
    if names != dict(zip(table.values, table.names, strict=True)):
        raise UserError(f"benchmark {NAME}: {path} has other categories than COCO's 80")
    images = tuple(folder / entry["file_name"] for entry in entries)
    require(NAME, images)
    keys = tuple(path.stem for path in images)

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        entry = entries[index]
        return painted(table, regions[entry["id"]], entry["height"], entry["width"])

    return LabeledFolder(NAME, table, root, "instances", keys, images, read_labels, DIFFERS)


def painted(
    table: ClassTable, regions: list[dict[str, Any]], height: int, width: int
) -> UInt8[np.ndarray, "H W"]:
    """Labels of an image from its regions.

    Where regions overlap, the smaller object is on top: it is mostly a part of the larger one, or
    in front of it. Crowd regions are coarse, so they lie below every single object.
    """
    labels = np.zeros((height, width), np.uint8)
    number = {value: index + 1 for index, value in enumerate(table.values)}
    # sorted() keeps the order of the file among equals.
    for region in sorted(regions, key=lambda r: (-r.get("iscrowd", 0), -r["area"])):
        mask = mask_of(region["segmentation"], height, width)
        labels[mask] = number[region["category_id"]]
    return labels
