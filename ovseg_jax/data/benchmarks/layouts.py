"""The table of benchmarks: where the official folder of each has its images and its labels.

A new benchmark is a row of `LAYOUTS` and a file in `tables/`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ovseg_jax.data.benchmarks.class_tables import class_table
from ovseg_jax.data.benchmarks.folders import (
    LabeledFolder,
    find_root,
    first_existing,
    require,
    require_equal_sizes,
)
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
    """One form of the labels of a benchmark.

    Attributes:
      name: what results call it.
      path: the file or folder with the labels; see `Layout`.
      read: a reader of `label_forms`.
      differs: in what these labels differ from those that published scores were computed from.
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
      images: the folder of images.
      forms: of the labels; the first whose path exists is read.
      suffix: how the name of an image file ends behind the key.
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

LAYOUTS = {
    # PASCAL VOC 2012: 20 classes and background.
    "voc": Layout(
        ("", "VOC2012", "VOCdevkit/VOC2012"),
        "JPEGImages",
        [Form("palette", "SegmentationClass", _VOC_PNG)],
    ),
    # PASCAL Context: VOC 2010's images with labels for all pixels, reduced to 59 classes; 'png' is
    # as other programs convert them: the 59 in alphabetical order, 0 background.
    "context": Layout(
        ("", "VOC2010", "VOCdevkit/VOC2010"),
        "JPEGImages",
        [
            Form("png", "SegmentationClassContext", _CONTEXT_PNG),
            Form("json", "trainval_merged.json", context_json),
            Form("mat", "trainval", context_mat),
        ],
    ),
    # COCO Object: the 80 classes of COCO's instances, and background. Published scores were
    # computed from the pixel maps of COCO-Stuff, without its stuff (the conversion that GroupViT
    # began, and others took over). These maps number classes from 0.
    "coco_object": Layout(
        _COCO_ROOTS,
        _COCO_IMAGES,
        [
            Form("pixel maps", _COCO_MAPS, partial(png_files, offset=-1)),
            Form("instances", _COCO_INSTANCES, coco_instances, _PAINTED),
        ],
    ),
    # COCO-Stuff 164k: 80 things and 91 stuff classes, no background.
    "coco_stuff": Layout(_COCO_ROOTS, _COCO_IMAGES, [Form("pixel maps", _COCO_MAPS, png_files)]),
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
    """Opens the official folder of a benchmark.

    Args:
      name: such as 'voc'.
      directory: the official folder, or a folder above it.
      field: flag or config field that holds `directory`, for messages.
      split: "val" or "train".

    Raises:
      UserError: files are missing, or of another kind; it names them.
    """
    layout = LAYOUTS[name]
    images = layout.images.format(split=split)
    forms = {form.path.format(split=split): form for form in layout.forms}
    root = find_root(name, directory, layout.roots, (images, "|".join(forms)), field)
    paths = [path for path in forms if first_existing(root, path)]
    form = forms[paths[0]]
    keys, read_labels, masks = form.read(name, root, first_existing(root, paths[0]), split)
    files = tuple(first_existing(root, images) / f"{key}{layout.suffix}" for key in keys)
    require(name, (*files, *masks))
    if masks:
        require_equal_sizes(name, files, masks)
    keys = tuple(key.rpartition("/")[2] for key in keys)
    return LabeledFolder(
        name, class_table(name), root, form.name, keys, files, read_labels, form.differs
    )


# Benchmark -> (folder, name of the config field that holds it) -> its validation images.
OPENERS: dict[str, Callable[[str | Path, str], LabeledFolder]] = {
    name: partial(open_folder, name) for name in LAYOUTS
}


def open_train(name: str, directory: str | Path, field: str) -> LabeledFolder:
    """The training images of a benchmark; thresholds are never chosen on images that are reported.

    Raises:
      UserError: the set has no background and so no threshold, or files are missing.
    """
    if not class_table(name).background:
        raise UserError(
            f"benchmark {name} has no background, so there is no threshold to choose: leave out "
            "--sweep, or the benchmark"
        )
    return open_folder(name, directory, field, "train")
