"""Labeled images to segment: what a benchmark is, the table of those that exist, their words."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.data import scenes
from ovseg_jax.data.benchmarks.class_tables import IGNORE
from ovseg_jax.data.benchmarks.folders import LABEL_MODES, stored_values, upright_size
from ovseg_jax.data.decoding import IMAGES
from ovseg_jax.errors import UserError
from ovseg_jax.files import listed
from ovseg_jax.flags import nearest
from ovseg_jax.segmentation.official_folders import FOLDERS, FolderBenchmark, Labeled
from ovseg_jax.segmentation.pictures import files_in, read_image
from ovseg_jax.segmentation.protocol import Protocol, data_file, digest
from ovseg_jax.segmentation.vocabulary import Vocabulary, competition, read_text, read_words
from ovseg_jax.shapes import UInt8


@runtime_checkable
class Benchmark(Interface):
    """A list of images (uint8 [H,W,3]) with true labels (uint8 [H,W])."""

    name: str
    class_names: tuple[str, ...]  # the C words to segment, background excluded
    # Whether labels are 0 (background) and 1 + class, otherwise the class; 255 is ignored.
    has_background: bool
    # Classes (indices) that training captions never name; empty where that is unknown.
    unseen: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

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
    class_names = tuple(entry.name for entry in scenes.CLASSES)
    unseen = tuple(i for i, entry in enumerate(scenes.CLASSES) if not entry.seen)

    def __post_init__(self):
        if self.count < 1 or self.size < 1:
            raise UserError("benchmark scenes: count and size must be at least 1")
        if self.split not in scenes.SPLITS:
            known = ", ".join(scenes.SPLITS)
            raise UserError(f"benchmark scenes has no split {self.split!r}; there are {known}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Labeled:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = scenes.scene_at(self.seed, self.split, index, self.size)
        return scene.image, scene.labels

    @functools.cache  # noqa: B019 (a frozen dataclass: equal benchmarks share an entry)
    def describe(self) -> dict[str, Any]:
        # The first 200 scenes give the statistics to a percent, and drawing takes time.
        statistics = scenes.describe(self.split, min(self.count, 200), self.seed, self.size)
        return {"split": self.split, "seed": self.seed, "size": self.size, **statistics}


class OwnFolder:
    """Images, masks and a list of classes of your own (README, "Evaluation"):

        DIR/images/NAME.jpg (or any format)   DIR/masks/NAME.png   DIR/classes.txt

    Photographs are turned upright by their EXIF tag, and masks are of that size. All masks are
    checked at once, and not after hours. `count` takes only the first images by name, 0 all.
    """

    name = "folder"
    unseen = ()

    def __init__(self, dir: str = "", count: int = 0):
        if count < 0:
            raise UserError("benchmark folder: count must not be negative")
        if not dir:
            raise UserError("benchmark folder needs a folder: give --data_dir=DIR")
        self._root = Path(dir)
        self._list = self._root / "classes.txt"
        where = f"benchmark folder: {self._list}"
        text = read_text(self._list)
        self.entries, self.has_background = read_words(text, where, numbered_from=(0,))
        self.class_names = Vocabulary.of(self.entries).classes
        if len(self.entries) >= IGNORE:
            raise UserError(f"{where} has {len(self.entries)} classes, and masks room for 254")
        if len(self.entries) == 1 and not self.has_background:
            raise UserError(f"{where} has one class: add 'background' as its first line")
        self._pairs = self._find_pairs(count)
        wrong, present = [], set()
        for index in range(len(self)):
            try:
                present |= set(np.unique(self._labels(index)).tolist())
            except UserError as error:
                wrong.append(str(error))
        if wrong:
            which = f"{len(wrong)} of {len(self)} masks"
            raise UserError(f"benchmark folder: {which} cannot be used: {listed(wrong, '; ')}")
        if self.has_background and not count and 0 not in present:
            hint = "labels are the numbers of lines, from 0 up; these may count from 1"
            raise UserError(
                f"benchmark folder: none of {len(self)} masks has the value 0, background: {hint}"
            )
        if self.has_background and not present - {0, IGNORE}:
            values = " and ".join(map(str, sorted(present)))
            hint = f"labels are the numbers of lines, 1 and up; {IGNORE} is ignored"
            raise UserError(f"benchmark folder: the masks have no class, only {values}: {hint}")

    def _find_pairs(self, count: int) -> list[tuple[Path, Path]]:
        """(image, mask) of each mask, by name."""
        folders = self._root / "images", self._root / "masks"
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"benchmark folder: {self._root} has no folder {folder.name}")
        paths, others = files_in(folders[0], IMAGES)
        masks, more = files_in(folders[1], (".png",))
        images = {path.stem: path for path in paths}
        for files in (paths, masks):
            names = {path.stem: path for path in files}
            if same := [path for path in files if names[path.stem] != path]:
                both = f"{same[0]} and {names[same[0].stem]}"
                raise UserError(f"benchmark folder: {both} have one name: remove or rename one")
        passed_over = [path.name for path in others + more]
        beside = f"; there are {listed(passed_over)}" if passed_over else ""
        if not masks:
            raise UserError(f"benchmark folder: {folders[1]} holds no .png{beside}")
        if lacking := [mask.name for mask in masks if mask.stem not in images]:
            where = f"{folders[0]}: {listed(lacking)}{beside}"
            raise UserError(f"benchmark folder: {len(lacking)} masks have no image in {where}")
        self._facts = {
            "title": f"own images in {self._root.name}",
            "split": "all",
            "whole": not 0 < count < len(masks),
            "images_without_mask": len(images) - len(masks),
            "passed_over": passed_over,
        }
        return [(images[mask.stem], mask) for mask in masks[: count or None]]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Labeled:
        return read_image(self._pairs[index][0]), self._labels(index)

    def _labels(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """A mask; UserError for what is wrong with it."""
        image_path, mask_path = self._pairs[index]
        try:
            width, height = upright_size(image_path)
            with Image.open(mask_path) as mask:
                mode = mask.mode
                values = stored_values(mask) if mode in LABEL_MODES else np.asarray(mask)
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise UserError(f"{mask_path} or its image cannot be read ({error})") from None
        if mode not in (*LABEL_MODES, "1"):
            raise UserError(f"{mask_path} holds {mode} pixels: save labels as gray or palette PNG")
        values, labels = values.astype(np.int64), len(self.entries) + self.has_background
        wrong = np.unique(values[(values != IGNORE) & ((values < 0) | (values >= labels))])
        if wrong.size:
            text = f"has the label {int(wrong[0])}, but classes.txt has {labels} lines, from 0 up"
            raise UserError(f"{mask_path} {text}; {IGNORE} is ignored")
        if values.shape != (height, width):
            turned = ", turned upright by its EXIF tag," * (values.shape == (width, height))
            size = f"{width}x{height} pixels{turned}"
            of_mask = f"{values.shape[1]}x{values.shape[0]}"
            raise UserError(f"{image_path} has {size} but its mask {of_mask}")
        return values.astype(np.uint8)

    @property
    def class_file(self) -> dict[str, str]:
        """The list of classes, and the first digits of its SHA-256."""
        return {"file": "classes.txt", "sha256": digest(self._list.read_bytes())}

    def describe(self) -> dict[str, Any]:
        """Where the images are, and which files were not used."""
        return self._facts


# A new benchmark is a row: its name, and what makes it from the fields of a config.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "scenes": ScenesBenchmark,
    **{name: functools.partial(FolderBenchmark, name) for name in FOLDERS},
    "folder": OwnFolder,
}
# The fields of `config.eval.NAME` for each benchmark that is a folder.
FOLDER_FIELDS = {name: {"dir": "", "count": 0} for name in BENCHMARKS if name != "scenes"}


def check_name(name: str, others: Sequence[str] = ()) -> None:
    """Raises UserError if there is no benchmark called `name`; `others` are known besides."""
    known = [*BENCHMARKS, *others]
    if name not in BENCHMARKS:
        hint = f"there are {', '.join(known)}{nearest(name, known)}"
        raise UserError(f"unknown benchmark {name!r}; {hint}")


def make_benchmark(name: str, fields: Mapping[str, Any]) -> Benchmark:
    """The benchmark called `name`, made from its fields; UserError for what does not exist."""
    check_name(name)
    try:
        return BENCHMARKS[name](**fields)
    except TypeError as error:
        raise UserError(f"benchmark {name}: {error}") from error


def benchmark_of(name: str, config: ConfigDict, **changes: Any) -> Benchmark:
    """A benchmark with the fields of ``config.eval.NAME`` (where there are any) and `changes`."""
    return make_benchmark(name, {**dict(config.get(name) or {}), **changes})


# ---- words of the classes

# Word lists with synonyms, by the protocol's `class_names`.
_LISTS = {"sclip": "protocols/sclip_words.json", "everyday": "protocols/everyday_words.json"}


def words_of(benchmark: Benchmark, protocol: Protocol) -> tuple[Vocabulary, dict[str, str]]:
    """The words that compete on a benchmark under its protocol (`vocabulary.competition`), and the
    file of its classes' words with its digest (`class_words`)."""
    vocabulary, file = class_words(benchmark, protocol.class_names)
    return competition(vocabulary, protocol), file


def class_words(benchmark: Benchmark, which: str) -> tuple[Vocabulary, dict[str, str]]:
    """The words of a benchmark's classes, and their file with its digest.

    Args:
      which: 'official' names; 'released': the words of the released model where they differ;
        'sclip': with synonyms, and words for the background; 'everyday': with synonyms of ours, VOC
        and COCO Object only. Sets that are not published have only one list.
    """
    if not isinstance(benchmark, FolderBenchmark):
        entries = getattr(benchmark, "entries", benchmark.class_names)
        return Vocabulary.of(entries), getattr(benchmark, "class_file", {})
    name, table = benchmark.name.removesuffix("_zss"), benchmark.table
    if which in _LISTS:
        package, file = "ovseg_jax.segmentation", _LISTS[which]
        lists = data_file(file)["benchmarks"]
        if name not in lists:
            raise UserError(f"protocol: class_names={which!r} has no words for benchmark {name}")
        entries, background = lists[name]["classes"], lists[name]["background"]
    else:
        package, file = "ovseg_jax.data.benchmarks", f"tables/{FOLDERS[name].base}.json"
        entries, background = table.words if which == "released" else table.names, ()
    if name != benchmark.name:  # the unseen classes alone have no words for the background
        entries, background = [entries[i] for i in benchmark.chosen], ()
    content = (resources.files(package) / file).read_bytes()
    return Vocabulary.of(entries, background), {"file": file, "sha256": digest(content)}
