"""Evaluation sets read from their official folders, and as TFDS builders (see `builders`)."""

from collections.abc import Callable
from pathlib import Path

from ovseg_jax.data.benchmarks.ade20k import open_ade20k
from ovseg_jax.data.benchmarks.cityscapes import open_cityscapes
from ovseg_jax.data.benchmarks.coco_object import open_coco_object
from ovseg_jax.data.benchmarks.coco_stuff import open_coco_stuff
from ovseg_jax.data.benchmarks.context import open_context
from ovseg_jax.data.benchmarks.folders import LabeledFolder
from ovseg_jax.data.benchmarks.tables import ClassTable, class_table
from ovseg_jax.data.benchmarks.voc import open_voc

# (folder, name of the config field that holds it) -> what is in it
OPENERS: dict[str, Callable[[str | Path, str], LabeledFolder]] = {
    "voc": open_voc,
    "context": open_context,
    "coco_object": open_coco_object,
    "coco_stuff": open_coco_stuff,
    "ade20k": open_ade20k,
    "cityscapes": open_cityscapes,
}

__all__ = ["OPENERS", "ClassTable", "LabeledFolder", "class_table"]
