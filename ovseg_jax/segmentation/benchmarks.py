"""Labeled images to segment: what a benchmark is, and the table of those that exist."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ovseg_jax.data import scenes
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.segmentation.official import FOLDERS, FolderBenchmark, UnseenAlone
from ovseg_jax.segmentation.own_folder import OwnFolder
from ovseg_jax.segmentation.splits import ZSS
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


class Every:
    """Every `step`-th image of a benchmark, `count` in all."""

    def __init__(self, whole: Benchmark, step: int, count: int):
        self.name, self.class_names = whole.name, whole.class_names
        self.has_background, self.unseen = whole.has_background, whole.unseen
        self.official_names = getattr(whole, "official_names", whole.class_names)
        self._whole, self._step, self._count = whole, step, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._whole[index * self._step]

    def describe(self) -> dict[str, Any]:
        """As the whole, with the choice of images."""
        return {**self._whole.describe(), "every": self._step, "count": self._count}


# A new benchmark is one more row: its name, and what makes it from the fields of a config.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "scenes": ScenesBenchmark,
    **{name: functools.partial(FolderBenchmark, name) for name in FOLDERS},
    **{f"{name}_zss": functools.partial(UnseenAlone, f"{name}_zss") for name in ZSS},
    "folder": OwnFolder,
}
# The fields of `config.eval.NAME` for each of them that is a folder.
FOLDER_FIELDS = {name: {"dir": "", "count": 0} for name in BENCHMARKS if name != "scenes"}


def check_name(name: str, others: Sequence[str] = ()) -> None:
    """Raises UserError if there is no benchmark called `name`.

    Args:
      others: names that are known besides, for the message.
    """
    if name not in BENCHMARKS:
        known = [*BENCHMARKS, *others]
        raise UserError(
            f"unknown benchmark {name!r}{nearest(name, known)}; there are: {', '.join(known)}"
        )


def make_benchmark(name: str, config: Mapping[str, Any] | None = None) -> Benchmark:
    """The benchmark called `name`, made from the fields in `config`.

    Raises:
      UserError: a name or a field that does not exist, or what the benchmark itself refuses.
    """
    check_name(name)
    try:
        return BENCHMARKS[name](**{key: config[key] for key in config or {}})
    except TypeError as error:
        raise UserError(f"benchmark {name}: {error}") from error
