"""The table of benchmarks: where the official folder of each has its images and its labels.

A new benchmark is a row of `LAYOUTS` and a file in `tables/`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ovseg_jax.data.benchmarks.class_tables import class_table
from ovseg_jax.data.benchmarks.folders import LabeledFolder, find_root, first_existing, require
from ovseg_jax.data.benchmarks.label_forms import (
    Labels,
    coco_instances,
    context_json,
    context_mat,
    png_files,
)
from ovseg_jax.errors import UserError


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
