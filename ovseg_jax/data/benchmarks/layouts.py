"""The table of benchmarks: where the official folder of each has its images and its labels.

A new benchmark is a row of `LAYOUTS` and a file in `tables/`. Labels are PNG files, regions of
COCO's kind, or MATLAB files. Readers of these forms get the name of the benchmark, the root of its
folder, the file or folder with the labels, and the split. They give the keys in the official order
(paths of the images below their folder, without ending), a function from an index to labels, and
the PNG files if there are.
"""

import contextlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from ovseg_jax.data.benchmarks.class_tables import IGNORE, class_table
from ovseg_jax.data.benchmarks.folders import (
    LabeledFolder,
    find_root,
    first_existing,
    png_values,
    read_names,
    require,
)
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


# ---- the table


@dataclass(frozen=True)
class Form:
    """A form of the labels: its name in results, the file or folder (see `Layout`), and a reader.

    `differs` says in what these labels differ from those of published scores.
    """

    name: str
    path: str
    read: Callable[[str, Path, Path, str], Labels]
    differs: str = ""


@dataclass(frozen=True)
class Layout:
    """The official folder of a benchmark.

    In paths, '{split}' is "val" or "train", and 'a|b' is the first of the two that exists.

    Attributes:
      roots: where the layout may begin under the folder that the user gives, '' for itself.
      images, suffix: the folder of images, and how their names end behind the key.
      forms: of the labels; the first whose path exists is read.
    """

    roots: tuple[str, ...]
    images: str
    forms: list[Form]
    suffix: str = ".jpg"


_VOC_PNG = partial(png_files, listed="ImageSets/Segmentation/{split}.txt", keeps_ignore=True)
_CONTEXT_PNG = partial(png_files, listed="ImageSets/SegmentationContext/{split}.txt", in_order=True)
_CITYSCAPES_PNG = partial(png_files, suffix="_gtFine_labelIds.png", nested=True)
_COCO_ROOTS, _COCO_IMAGES = ("", "coco", "coco2017"), "{split}2017|images/{split}2017"
# The official archive unpacked, or as other programs keep it beside their files.
_COCO_MAPS = (
    "stuffthingmaps/{split}2017|stuffthingmaps_trainval2017/{split}2017|annotations/{split}2017"
)
_COCO_INSTANCES = "annotations/instances_{split}2017.json"
_PAINTED = (
    "its labels were painted from COCO's instances; published scores were computed from the pixel "
    "maps of COCO-Stuff (stuffthingmaps_trainval2017)"
)

_COCO_STUFF = [Form("pixel maps", _COCO_MAPS, png_files)]
# Published scores of COCO Object were computed from the pixel maps of COCO-Stuff, without its stuff
# (the conversion that GroupViT began, and others took over). These maps number classes from 0.
_COCO_OBJECT = [
    Form("pixel maps", _COCO_MAPS, partial(png_files, offset=-1)),
    Form("instances", _COCO_INSTANCES, coco_instances, _PAINTED),
]
# 'png' is as other programs convert them: the 59 in alphabetical order, 0 background.
_CONTEXT = [
    Form("png", "SegmentationClassContext", _CONTEXT_PNG),
    Form("json", "trainval_merged.json", context_json),
    Form("mat", "trainval", context_mat),
]
_VOC_ROOTS = [("", f"VOC{year}", f"VOCdevkit/VOC{year}") for year in (2012, 2010)]

LAYOUTS = {
    # PASCAL VOC 2012: 20 classes and background.
    "voc": Layout(_VOC_ROOTS[0], "JPEGImages", [Form("palette", "SegmentationClass", _VOC_PNG)]),
    # PASCAL Context: VOC 2010's images with labels for all pixels, reduced to 59 classes.
    "context": Layout(_VOC_ROOTS[1], "JPEGImages", _CONTEXT),
    # COCO Object: the 80 classes of COCO's instances, and background.
    "coco_object": Layout(_COCO_ROOTS, _COCO_IMAGES, _COCO_OBJECT),
    # COCO-Stuff 164k: 80 things and 91 stuff classes, no background.
    "coco_stuff": Layout(_COCO_ROOTS, _COCO_IMAGES, _COCO_STUFF),
    # ADE20K as in the scene parsing challenge of 2016: 150 classes, no background.
    "ade20k": Layout(
        ("", "ADEChallengeData2016"),
        "images/validation",
        [Form("gray", "annotations/validation", png_files)],
    ),
    # Cityscapes with fine annotation: 19 classes, no background.
    "cityscapes": Layout(
        ("", "cityscapes"),
        "leftImg8bit/val",
        [Form("labelIds", "gtFine/val", _CITYSCAPES_PNG)],
        "_leftImg8bit.png",
    ),
}


def open_folder(name: str, directory: str | Path, field: str, split: str = "val") -> LabeledFolder:
    """Opens the official folder of a benchmark, which is `directory` or below it.

    `split` is "val" or "train"; `field` is the flag or config field that holds `directory`. A
    UserError names files that are missing, or of another kind.
    """
    layout = LAYOUTS[name]
    images = layout.images.format(split=split)
    forms = {form.path.format(split=split): form for form in layout.forms}
    root = find_root(name, directory, layout.roots, (images, "|".join(forms)), field)
    path = next(path for path in forms if first_existing(root, path))
    form = forms[path]
    keys, read_labels, masks = form.read(name, root, first_existing(root, path), split)
    files = tuple(first_existing(root, images) / f"{key}{layout.suffix}" for key in keys)
    require(name, files, masks)
    keys = tuple(key.rpartition("/")[2] for key in keys)
    return LabeledFolder(
        name, class_table(name), root, form.name, keys, files, read_labels, form.differs
    )


# Benchmark -> (folder, name of the config field that holds it) -> its validation images.
OPENERS: dict[str, Callable[[str | Path, str], LabeledFolder]] = {
    name: partial(open_folder, name) for name in LAYOUTS
}


def open_train(name: str, directory: str | Path, field: str) -> LabeledFolder:
    """The training images; thresholds are never chosen on images that are reported."""
    if not class_table(name).background:
        none = f"benchmark {name} has no background, so there is no threshold to choose"
        raise UserError(f"{none}: leave out --sweep, or the benchmark")
    return open_folder(name, directory, field, "train")
