"""PASCAL Context: VOC 2010's images with labels for all pixels, reduced to 59 classes.

Its annotation is around in three forms, looked for in this order:

'png'   SegmentationClassContext/*.png with the 59 classes in alphabetical order, 0 background, and
        ImageSets/SegmentationContext/val.txt, as other programs convert it;
'json'  trainval_merged.json, run lengths of regions with their number among the 459 classes; later
        regions lie on top;
'mat'   trainval/*.mat, the official form: a LabelMap with numbers among the 459 classes, whose
        names are in labels.txt; 59_labels.txt names the 59.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ovseg_jax.data.benchmarks.coco_masks import load_codec, mask_of
from ovseg_jax.data.benchmarks.folders import (
    LabeledFolder,
    find_root,
    png_values,
    read_names,
    require,
    require_equal_sizes,
)
from ovseg_jax.data.benchmarks.tables import ClassTable, class_table
from ovseg_jax.errors import UserError

NAME = "context"
PNG, JSON, MAT = "SegmentationClassContext", "trainval_merged.json", "trainval"
PNG_SPLITS, SPLITS = "ImageSets/SegmentationContext", "ImageSets/Main"
# 59_labels.txt spells three classes otherwise than labels.txt does.
SPELLING = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


def open_context(directory: str | Path, field: str, split: str = "val") -> LabeledFolder:
    """Opens VOCdevkit/VOC2010 (or a folder above it) with one of the forms of the annotation.

    Args:
      split: "val" or "train".

    Raises:
      UserError: files are missing; it names them.
    """
    needed = ("JPEGImages", f"{PNG}|{JSON}|{MAT}")
    root = find_root(NAME, directory, ("", "VOC2010", "VOCdevkit/VOC2010"), needed, field)
    if (root / PNG).is_dir():
        return _open_png(root, split)
    return _open_json(root, split) if (root / JSON).is_file() else _open_mat(root, split)


def _images(root: Path, keys: Sequence[str]) -> tuple[Path, ...]:
    return tuple(root / "JPEGImages" / f"{key}.jpg" for key in keys)


def _open_png(root: Path, split: str) -> LabeledFolder:
    table, listed = class_table(NAME), root / PNG_SPLITS / f"{split}.txt"
    require(NAME, [listed])
    keys = read_names(NAME, listed)
    images, masks = _images(root, keys), tuple(root / PNG / f"{key}.png" for key in keys)
    require(NAME, (*images, *masks))
    require_equal_sizes(NAME, images, masks)
    numbers = tuple(range(1, len(table.names) + 1))
    return LabeledFolder(
        NAME,
        table,
        root,
        "png",
        keys,
        images,
        lambda index: table.relabel(png_values(masks[index]), numbers, len(numbers)),
    )


def _open_json(root: Path, split: str) -> LabeledFolder:
    load_codec()
    table = class_table(NAME)
    try:
        document = json.loads((root / JSON).read_bytes())
        entries = [entry for entry in document["images"] if entry["phase"] == split]
        keys = tuple(Path(entry["file_name"]).stem for entry in entries)
        regions = defaultdict(list)
        for region in document["annos_segmentation"]:
            regions[region["image_id"]].append(region)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"benchmark {NAME}: {root / JSON} is not the merged annotation "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error
    if not keys:
        raise UserError(f"benchmark {NAME}: {root / JSON} has no image of the phase {split!r}")
    images = _images(root, keys)
    require(NAME, images)

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        entry = entries[index]
        numbers = np.zeros((entry["height"], entry["width"]), np.int32)
        for region in regions[entry["image_id"]]:
            mask = mask_of(region["segmentation"], entry["height"], entry["width"])
            numbers[mask] = region["category_id"]
        return table.relabel(numbers)

    return LabeledFolder(NAME, table, root, "json", keys, images, read_labels)


def _open_mat(root: Path, split: str) -> LabeledFolder:
    table, listed = class_table(NAME), f"{SPLITS}/{split}.txt"
    require(NAME, [root / name for name in ("59_labels.txt", "labels.txt", listed)])
    values = official_values(table, root / "labels.txt", root / "59_labels.txt")
    # VOC 2010's own lists: every image of them is annotated.
    keys = read_names(NAME, root / listed)
    images, maps = _images(root, keys), tuple(root / MAT / f"{key}.mat" for key in keys)
    require(NAME, (*images, *maps))

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        import scipy.io

        content = scipy.io.loadmat(maps[index])
        return table.relabel(content["LabelMap"].astype(np.int32), values)

    return LabeledFolder(NAME, table, root, "mat", keys, images, read_labels)


def official_values(table: ClassTable, all_names: Path, few_names: Path) -> tuple[int, ...]:
    """The numbers of the 59 classes among the 459, in the table's order, from the official lists.

    Args:
      all_names: labels.txt, lines 'NUMBER: NAME'. few_names: 59_labels.txt, the same.

    Raises:
      UserError: a class is not in the lists.
    """
    numbers = {name: number for number, name in _numbered(all_names).items()}
    wanted = {SPELLING.get(name, name) for name in _numbered(few_names).values()}
    for path, names in ((all_names, set(numbers)), (few_names, wanted)):
        lacking = sorted(set(table.names) - names)
        if lacking:
            raise UserError(
                f"benchmark {NAME}: {path} lacks {', '.join(lacking[:5])} "
                f"({len(lacking)} of 59 classes); copy the official file again"
            )
    return tuple(numbers[name] for name in table.names)


def _numbered(path: Path) -> dict[int, str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^\s*(\d+)\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return {int(number): name.replace(" ", "") for number, name in found}
