"""Training images of evaluation sets with a background, to choose a threshold on.

Thresholds are never chosen on the images that are reported. The layouts are those of the
validation sets (see their modules), with the training split's own lists.
"""

from collections.abc import Callable
from pathlib import Path

from ovseg_jax.data.benchmarks.coco_object import open_coco_object
from ovseg_jax.data.benchmarks.context import open_context
from ovseg_jax.data.benchmarks.folders import LabeledFolder
from ovseg_jax.data.benchmarks.voc import open_voc
from ovseg_jax.errors import UserError

TRAIN_OPENERS: dict[str, Callable[[str | Path, str, str], LabeledFolder]] = {
    "voc": open_voc,
    "context": open_context,
    "coco_object": open_coco_object,
}


def open_train(name: str, directory: str | Path, field: str) -> LabeledFolder:
    """The training images of the official folder of `name`.

    Args:
      directory, field: as for the functions of `data.benchmarks.OPENERS`.

    Raises:
      UserError: the set has no background and so no threshold, or files are missing.
    """
    if name not in TRAIN_OPENERS:
        raise UserError(
            f"benchmark {name} has no background, so there is no threshold to choose: leave out "
            "--sweep, or the benchmark"
        )
    return TRAIN_OPENERS[name](directory, field, "train")
