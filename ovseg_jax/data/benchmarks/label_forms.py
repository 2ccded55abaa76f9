"""The forms that labels have on disk: PNG files, regions of COCO's kind, MATLAB files.

Readers get the name of the benchmark, the root of its folder, the file or folder with the labels,
and the split. They give the keys in the official order (paths of the images below their folder,
without ending), a function from an index to labels, and the PNG files if there are.
"""

import contextlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from ovseg_jax.data.benchmarks.class_tables import IGNORE, class_table
from ovseg_jax.data.benchmarks.folders import png_values, read_names, require
from ovseg_jax.data.decoding import is_foreign
from ovseg_jax.errors import UserError

# 59_labels.txt spells three classes otherwise than labels.txt does.
_SPELLING = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
Labels = tuple[tuple[str, ...], Callable[[int], UInt8[np.ndarray, "H W"]], tuple[Path, ...]]


def png_files(
    name: str,
    root: Path,
    folder: Path,
    split: str,
    *,
    suffix: str = ".png",
    listed: str = "",
    nested: bool = False,
    offset: int = 0,
    in_order: bool = False,
    keeps_ignore: bool = False,
) -> Labels:
    """A gray or palette PNG for each image.

    Args:
      suffix: how the name of a file ends behind the key.
      listed: the file with the keys, one a line; by default, all files of the folder are taken.
      nested: the files are in folders of the folder.
      offset: what is added to the values of the class table.
      in_order: the values are 1, 2, ... in the order of the table, in place of the table's.
      keeps_ignore: pixels of the value 255 are ignored although the benchmark has a background.
    """
    table = class_table(name)
    if listed:
        path = root / listed.format(split=split)
        require(name, [path])
        keys = read_names(name, path)
    else:
        pattern = f"{'*/' * nested}*{suffix}"
        # COCO's archive also has maps with the numbers that some programs train with.
        paths = [p for p in sorted(folder.glob(pattern)) if "TrainIds" not in p.name]
        paths = [p.relative_to(folder).as_posix() for p in paths if not is_foreign(p.name)]
        keys = tuple(path.removesuffix(suffix) for path in paths)
        if not keys:
            raise UserError(f"benchmark {name}: {folder} holds no files {pattern}; unpack it again")
    files = tuple(folder / f"{key}{suffix}" for key in keys)
    largest = len(table.values) if in_order else table.largest
    values = tuple(value + offset for value in table.values)
    values = tuple(range(1, largest + 1)) if in_order else values

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        pixels = png_values(files[index])
        labels = table.relabel(pixels, values, largest)
        if keeps_ignore:
            labels[pixels == IGNORE] = IGNORE
        return labels

    return keys, read_labels, files


def coco_instances(name: str, root: Path, path: Path, split: str) -> Labels:
    """COCO's instances. Images without any object are background.

    Where regions overlap, the smaller object is on top: it is mostly a part of the larger one, or
    in front of it. Crowd regions are coarse, so they lie below every single object.
    """
    _load_codec()
    table = class_table(name)
    with _damage(name, path):
        document = json.loads(path.read_bytes())
        images = sorted(document["images"], key=lambda image: image["id"])
        keys = tuple(Path(image["file_name"]).stem for image in images)
        regions = _by_image(document["annotations"])
        names = {category["id"]: category["name"] for category in document["categories"]}
    if names != dict(zip(table.values, table.names, strict=True)):
        raise UserError(f"benchmark {name}: {path} has other categories than COCO's 80")
    label = {value: index + 1 for index, value in enumerate(table.values)}

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        image = images[index]
        # sorted() keeps the order of the file among equals.
        ordered = sorted(regions[image["id"]], key=lambda r: (-r.get("iscrowd", 0), -r["area"]))
        return _painted(image, ordered, label).astype(np.uint8)

    return keys, read_labels, ()


def context_json(name: str, root: Path, path: Path, split: str) -> Labels:
    """PASCAL Context's trainval_merged.json: numbers of the 459 classes, later regions on top."""
    _load_codec()
    with _damage(name, path):
        document = json.loads(path.read_bytes())
        images = [image for image in document["images"] if image["phase"] == split]
        keys = tuple(Path(image["file_name"]).stem for image in images)
        regions = _by_image(document["annos_segmentation"])
    if not keys:
        raise UserError(f"benchmark {name}: {path} has no image of the phase {split!r}")

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        image = images[index]
        return class_table(name).relabel(_painted(image, regions[image["image_id"]]))

    return keys, read_labels, ()


def context_mat(name: str, root: Path, path: Path, split: str) -> Labels:
    """PASCAL Context's official form, trainval/*.mat.

    A file has a LabelMap with numbers among the 459 classes, whose names are in labels.txt;
    59_labels.txt names the 59. Both have lines 'NUMBER: NAME'.
    """
    table = class_table(name)
    all_names, few_names = root / "labels.txt", root / "59_labels.txt"
    # VOC 2010's lists: every image of them is annotated.
    listed = root / f"ImageSets/Main/{split}.txt"
    require(name, [few_names, all_names, listed])
    numbers = _numbers(all_names)
    few = {_SPELLING.get(spelled, spelled) for spelled in _numbers(few_names)}
    for file, names in ((all_names, set(numbers)), (few_names, few)):
        if lacking := sorted(set(table.names) - names):
            classes = f"{', '.join(lacking[:5])} ({len(lacking)} of 59 classes)"
            wrong = f"{file} lacks {classes}"
            raise UserError(f"benchmark {name}: {wrong}; copy the official file again")
    values = tuple(numbers[official] for official in table.names)
    keys = read_names(name, listed)
    files = [path / f"{key}.mat" for key in keys]
    require(name, files)

    def read_labels(index: int) -> UInt8[np.ndarray, "H W"]:
        import scipy.io

        content = scipy.io.loadmat(files[index])
        return table.relabel(content["LabelMap"].astype(np.int32), values)

    return keys, read_labels, ()


def _numbers(path: Path) -> dict[str, int]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = re.findall(r"^\s*(\d+)\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return {name.replace(" ", ""): int(number) for number, name in lines}


# ---- masks in COCO's forms, through pycocotools, which is an extra


def _load_codec() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        install = "pip install 'ovseg_jax[benchmarks]'"
        raise UserError(f"reading COCO's masks needs pycocotools: {install}") from error
    return mask


@contextlib.contextmanager
def _damage(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        wrong = f"{path} is not the official annotation ({type(error).__name__}: {error})"
        raise UserError(f"benchmark {name}: {wrong}; copy it again") from error


def _by_image(regions: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped = defaultdict(list)
    for region in regions:
        grouped[region["image_id"]].append(region)
    return grouped


def _painted(
    image: dict[str, Any], regions: list[dict[str, Any]], label: dict[int, int] | None = None
) -> np.ndarray:
    """Labels of an image from its regions, later ones on top; by default, the category ids."""
    labels = np.zeros((image["height"], image["width"]), np.int32)
    for region in regions:
        category = region["category_id"]
        mask = _mask(region["segmentation"], image["height"], image["width"])
        labels[mask] = category if label is None else label[category]
    return labels


def _mask(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """The pixels of a region: a list of polygons, or run lengths as text or as numbers."""
    codec = _load_codec()
    if isinstance(segmentation, list):
        segmentation = codec.merge(codec.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = codec.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():
        # Its arrays follow the protocol of NumPy 1, which NumPy 2 still takes.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return codec.decode(segmentation).astype(bool)
