"""Labeled images to segment: what a benchmark is, the table of those that exist, their words."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.data import scenes
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.segmentation.official_folders import FOLDERS, ZSS, FolderBenchmark, UnseenAlone
from ovseg_jax.segmentation.own_folder import OwnFolder
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.vocabulary import Vocabulary, competition
from ovseg_jax.shapes import UInt8


@runtime_checkable
class Benchmark(Interface):
    """A list of images with true labels.

    Attributes:
      name: the name on the command line and in results.
      class_names: the C words to segment, background excluded.
      has_background: if true, labels are 0 (background) and 1 + class, otherwise the class. 255 is
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
        """Plain values that say which images these are, and how hard; stored with the result."""


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

    @functools.cache  # noqa: B019 (a frozen dataclass: equal benchmarks share an entry)
    def describe(self) -> dict[str, Any]:
        # The first 200 scenes give the statistics to a percent, and drawing takes time.
        statistics = scenes.describe(self.split, min(self.count, 200), self.seed, self.size)
        return {"split": self.split, "seed": self.seed, "size": self.size, **statistics}


# A new benchmark is a row: its name, and what makes it from the fields of a config.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "scenes": ScenesBenchmark,
    **{name: functools.partial(FolderBenchmark, name) for name in FOLDERS},
    **{f"{name}_zss": functools.partial(UnseenAlone, f"{name}_zss") for name in ZSS},
    "folder": OwnFolder,
}
# The fields of `config.eval.NAME` for each benchmark that is a folder.
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


def make_benchmark(name: str, fields: Mapping[str, Any] | None = None) -> Benchmark:
    """The benchmark called `name`, made from its fields.

    Raises:
      UserError: a name or a field that does not exist, or what the benchmark itself refuses.
    """
    check_name(name)
    try:
        return BENCHMARKS[name](**dict(fields or {}))
    except TypeError as error:
        raise UserError(f"benchmark {name}: {error}") from error


def benchmark_of(name: str, config: ConfigDict, **changes: Any) -> Benchmark:
    """A benchmark with the fields of ``config.eval.NAME`` (where there are any) and `changes`."""
    return make_benchmark(name, {**dict(config.get(name) or {}), **changes})


# ---- words of the classes

# Word lists with synonyms, by the protocol's `class_names`.
_LISTS = {"sclip": "protocols/sclip_words.json", "everyday": "protocols/everyday_words.json"}


def words_of(benchmark: Benchmark, protocol: Protocol) -> tuple[Vocabulary, dict[str, str]]:
    """The words that compete on a benchmark, and the file of its classes' words with its digest.

    Args:
      protocol: for this benchmark. Its `class_names` choose the classes' words, and its
        `competing_words` how many everyday words are added, see `vocabulary.competition`.

    Raises:
      UserError: there are no such words for this benchmark.
    """
    vocabulary, file = class_words(benchmark, protocol.class_names)
    return competition(vocabulary, protocol), file


def class_words(benchmark: Benchmark, which: str) -> tuple[Vocabulary, dict[str, str]]:
    """The words of a benchmark's classes, and their file with its digest.

    Args:
      which: 'released' (the words of the released model where they differ from the official
        names), 'official' names, 'sclip' (with synonyms, and words for the background), or
        'everyday' (the names with synonyms of ours; VOC and COCO Object only). Sets that are not
        published have only one list. A benchmark of some classes of another one has their words,
        and none for the background.

    Raises:
      UserError: there are no such words for this benchmark.
    """
    if isinstance(benchmark, UnseenAlone):
        vocabulary, file = class_words(benchmark.whole, which)
        lines = vocabulary.lines()
        return Vocabulary.of([lines[i] for i in benchmark.whole.zss]), file
    if benchmark.name not in FOLDERS:
        entries = getattr(benchmark, "entries", benchmark.class_names)
        return Vocabulary.of(entries), getattr(benchmark, "class_file", {})
    if which in _LISTS:
        content, file = _json_file("ovseg_jax.segmentation", _LISTS[which])
        if benchmark.name not in content["benchmarks"]:
            raise UserError(
                f"protocol: class_names={which!r} has no words for benchmark {benchmark.name}"
            )
        words = content["benchmarks"][benchmark.name]
        return Vocabulary.of(words["classes"], words["background"]), file
    table = f"tables/{FOLDERS[benchmark.name].base}.json"
    _, file = _json_file("ovseg_jax.data.benchmarks", table)
    names = benchmark.class_names if which == "released" else benchmark.official_names
    return Vocabulary.of(names), file


@functools.cache
def _json_file(package: str, file: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A data file of the package: its content, and its name with the start of its SHA-256."""
    content = (resources.files(package) / file).read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    return json.loads(content), {"file": file, "sha256": digest}
