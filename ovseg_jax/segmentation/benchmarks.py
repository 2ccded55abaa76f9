"""Labeled images to segment: what a benchmark is, and the table of those that exist."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ovseg_jax.data import scenes
from ovseg_jax.data.benchmarks import OPENERS, LabeledFolder
from ovseg_jax.data.benchmarks.prepared import PreparedSet, is_prepared, open_prepared
from ovseg_jax.data.decoding import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.shapes import UInt8


@runtime_checkable
class Benchmark(Protocol):
    """A list of images with true labels.

    Attributes:
      name: as it is written on the command line and in results.
      class_names: the C words to segment; background is not one of them.
      has_background: with it labels are 0 (background) and 1 + class; without, the class. 255 is
        ignored either way.
      unseen: classes (indices) that training captions never name; empty where that is unknown.
    """

    name: str
    class_names: tuple[str, ...]
    has_background: bool
    unseen: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [H,W,3], labels uint8 [H,W])."""

    def describe(self) -> dict[str, Any]:
        """Plain values that tell which images these are, and how hard; stored with the result."""


@dataclass(frozen=True)
class ScenesBenchmark:
    """The embedded data set: all its classes, and background."""

    split: str = "test"
    count: int = 500
    seed: int = 0
    size: int = 140

    name = "scenes"
    has_background = True

    def __post_init__(self):
        if self.count < 1 or self.size < 1:
            raise UserError("benchmark scenes: count and size must be at least 1")
        if self.split not in scenes.SPLITS:
            raise UserError(
                f"benchmark scenes has no split {self.split!r}; there are: "
                + ", ".join(scenes.SPLITS)
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in scenes.CLASSES)

    @property
    def unseen(self) -> tuple[int, ...]:
        return tuple(i for i, entry in enumerate(scenes.CLASSES) if not entry.seen)

    def __len__(self) -> int:
        return self.count

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "size size 3"], UInt8[np.ndarray, "size size"]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = scenes.scene_at(self.seed, self.split, index, self.size)
        return scene.image, scene.labels

    def describe(self) -> dict[str, Any]:
        statistics = _scene_statistics(self.split, self.count, self.seed, self.size)
        return {"split": self.split, "seed": self.seed, "size": self.size, **statistics}


@functools.cache
def _scene_statistics(split: str, count: int, seed: int, size: int) -> dict[str, float]:
    # The first 200 scenes tell it to a percent, and drawing takes time.
    return scenes.describe(split, min(count, 200), seed, size)


@dataclass(frozen=True)
class FolderBenchmark:
    """The validation set of an official folder, in its official order.

    Attributes:
      name: of `data.benchmarks.OPENERS`.
      dir: the official folder, or what `data.benchmarks.builders` has written of it.
      count: of the first images, for a quick look; 0 for all, which alone is to be reported.

    Raises:
      UserError: files are missing (it names them), or a field is wrong.
    """

    name: str
    dir: str = ""
    count: int = 0

    unseen = ()

    def __post_init__(self):
        if self.count < 0:
            raise UserError(f"benchmark {self.name}: count must not be negative")
        # Opened here, so that a missing file is reported before any model runs.
        if not len(self._images):
            raise UserError(f"benchmark {self.name}: {self._images.root} holds no images")

    @functools.cached_property
    def _images(self) -> LabeledFolder | PreparedSet:
        if is_prepared(self.dir):
            return open_prepared(self.name, self.dir)
        return OPENERS[self.name](self.dir, f"config.eval.{self.name}.dir")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._images.table.words

    @property
    def has_background(self) -> bool:
        return self._images.table.background

    def __len__(self) -> int:
        return min(self.count, len(self._images)) if self.count else len(self._images)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            image = np.asarray(decode(self._images.image_bytes(index)))
        except UnreadableImage as error:
            raise UserError(
                f"benchmark {self.name}: image {index} of {self._images.root} cannot be read "
                f"({error}); copy the official file again"
            ) from error
        labels = self._images.labels(index)
        if labels.shape != image.shape[:2]:
            raise UserError(
                f"benchmark {self.name}: image {index} of {self._images.root} has "
                f"{image.shape[1]}x{image.shape[0]} pixels but its labels "
                f"{labels.shape[1]}x{labels.shape[0]}: they are not of the same release"
            )
        return image, labels

    def describe(self) -> dict[str, Any]:
        table = self._images.table
        return {
            "title": table.title,
            "source": table.source,
            "rule": table.rule,
            "form": self._images.form,
            "whole": len(self) == len(self._images),
        }


# A new benchmark is one more row: its name, and what makes it from the fields of a config.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "scenes": ScenesBenchmark,
    **{name: functools.partial(FolderBenchmark, name) for name in OPENERS},
}
# The fields of `config.eval.NAME` for each of them that is a folder.
FOLDER_FIELDS = {name: {"dir": "", "count": 0} for name in OPENERS}


def make_benchmark(name: str, config: Mapping[str, Any] | None = None) -> Benchmark:
    """The benchmark called `name`, made from the fields in `config`.

    Raises:
      UserError: a name or a field that does not exist, or what the benchmark itself refuses.
    """
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(
            f"unknown benchmark {name!r}{nearest(name, list(BENCHMARKS))}; there are: {known}"
        )
    try:
        return BENCHMARKS[name](**{key: config[key] for key in config or {}})
    except TypeError as error:
        raise UserError(f"benchmark {name}: {error}") from error
