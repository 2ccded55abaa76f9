"""Labeled images to segment: what a benchmark is, the table of those that exist, their words."""

import functools
import hashlib
import json
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
from ovseg_jax.data.benchmarks.folders import LABEL_MODES, upright_size
from ovseg_jax.data.decoding import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.files import listed
from ovseg_jax.flags import nearest
from ovseg_jax.segmentation.inputs import IMAGES, files_in
from ovseg_jax.segmentation.metric import IGNORE
from ovseg_jax.segmentation.official_folders import FOLDERS, ZSS, FolderBenchmark, UnseenAlone
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.vocabulary import Vocabulary, competition, read_text, read_words
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


_MOST = IGNORE - 1  # classes that fit beside the ignored label


@dataclass(frozen=True)
class OwnFolder:
    """Images, masks and a list of classes of your own:

        DIR/images/NAME.jpg (or any format)   DIR/masks/NAME.png   DIR/classes.txt

    ``classes.txt`` has one class a line, synonyms between bars (``cat|kitten``), see
    `vocabulary.read_words`. Where its first line is ``background`` (or LabelMe's ``_background_``),
    0 in the masks is background and the next line is 1; otherwise the first line is 0. 255 in the
    masks is ignored. Masks are gray, palette or black-and-white PNG files whose values are the
    labels. Photographs are turned upright by their EXIF tag, and masks are of that size.

    Attributes:
      dir: the folder.
      count: only the first images by name; 0 for all.

    Raises:
      UserError: files are missing, names do not match, or masks are no masks; it says which.
    """

    dir: str = ""
    count: int = 0

    name = "folder"
    unseen = ()

    def __post_init__(self):
        if self.count < 0:
            raise UserError("benchmark folder: count must not be negative")
        if not self.dir:
            raise UserError(
                "benchmark folder needs a folder with images/, masks/ and classes.txt: give "
                "--data_dir=DIR"
            )
        Vocabulary.of(self.entries)
        # Every mask, so that a bad one is reported now and not after hours.
        wrong, present = [], set()
        for index in range(len(self._pairs)):
            try:
                present |= set(np.unique(self._labels(index)).tolist())
            except UserError as error:
                wrong.append(str(error))
        if wrong:
            raise UserError(
                f"benchmark folder: {len(wrong)} of {len(self._pairs)} masks cannot be used: "
                f"{listed(wrong, '; ')}"
            )
        if self.has_background and not present - {0, IGNORE}:
            hint = ""
            if IGNORE in present:
                hint = f"; {IGNORE} is ignored: write a class as the number of its line, 1 and up"
            raise UserError(
                f"benchmark folder: no mask in {Path(self.dir) / 'masks'} has a pixel of any "
                f"class, only {' and '.join(map(str, sorted(present)))}{hint}"
            )

    @functools.cached_property
    def _words(self) -> tuple[tuple[str, ...], bool]:
        path = Path(self.dir) / "classes.txt"
        where = f"benchmark folder: {path}"
        entries, background = read_words(read_text(path), where, numbered_from=(0,))
        if len(entries) > _MOST:
            raise UserError(f"{where} has {len(entries)} classes; masks have room for {_MOST}")
        if len(entries) == 1 and not background:
            raise UserError(
                f"{where}: with its one class every pixel would be right; add 'background' as its "
                "first line"
            )
        return entries, background

    @functools.cached_property
    def _files(self) -> tuple[dict[str, Path], list[Path], list[Path]]:
        """(images by their names without suffix, masks, files that are neither)."""
        folders = Path(self.dir) / "images", Path(self.dir) / "masks"
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"benchmark folder: {self.dir} has no folder {folder.name}")
        (paths, others), (masks, more) = files_in(folders[0], IMAGES), files_in(folders[1], ".png")
        images: dict[str, Path] = {}
        for path in paths:
            if path.stem in images:
                raise UserError(f"benchmark folder: {images[path.stem]} and {path} have one name")
            images[path.stem] = path
        return images, masks, others + more

    @functools.cached_property
    def _pairs(self) -> tuple[tuple[Path, Path], ...]:
        """(image, mask) of each mask, by name."""
        images, masks, others = self._files
        beside = f"; there are {listed([path.name for path in others])}" if others else ""
        if not masks:
            raise UserError(f"benchmark folder: {self.dir}/masks holds no .png{beside}")
        if lacking := [mask.name for mask in masks if mask.stem not in images]:
            raise UserError(
                f"benchmark folder: {len(lacking)} masks have no image in {self.dir}/images: "
                f"{listed(lacking)}{beside}"
            )
        pairs = tuple((images[mask.stem], mask) for mask in masks)
        return pairs[: self.count] if self.count else pairs

    @property
    def has_background(self) -> bool:
        return self._words[1]

    @property
    def entries(self) -> tuple[str, ...]:
        """The classes with their synonyms, see `vocabulary`."""
        return self._words[0]

    @property
    def class_names(self) -> tuple[str, ...]:
        return Vocabulary.of(self.entries).classes

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        path, labels = self._pairs[index][0], self._labels(index)
        try:
            return np.asarray(decode(path.read_bytes())), labels
        except (OSError, UnreadableImage) as error:
            raise UserError(f"benchmark folder: {path} cannot be read ({error})") from None

    def _labels(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """A mask, after all that can be wrong with it."""
        image_path, mask_path = self._pairs[index]
        try:
            width, height = upright_size(image_path)
            with Image.open(mask_path) as mask:
                mode, values = mask.mode, np.asarray(mask)
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise UserError(f"{mask_path} or its image cannot be read ({error})") from None
        if mode not in (*LABEL_MODES, "1"):
            raise UserError(
                f"{mask_path} holds {mode} pixels: save it as gray or palette PNG, whose values "
                "are the numbers of the lines of classes.txt"
            )
        values, labels = values.astype(np.int64), len(self.entries) + self.has_background
        wrong = np.unique(values[(values != IGNORE) & ((values < 0) | (values >= labels))])
        if wrong.size:
            raise UserError(
                f"{mask_path} has the label {int(wrong[0])}, but classes.txt has {labels} lines "
                f"(labels 0 to {labels - 1}; {IGNORE} is ignored)"
            )
        if values.shape != (height, width):
            turned = ", turned upright by its EXIF tag," * (values.shape == (width, height))
            raise UserError(
                f"{image_path} has {width}x{height} pixels{turned} but its mask "
                f"{values.shape[1]}x{values.shape[0]}"
            )
        return values.astype(np.uint8)

    @property
    def class_file(self) -> dict[str, str]:
        """The list of classes, and the first digits of its SHA-256."""
        content = (Path(self.dir) / "classes.txt").read_bytes()
        return {"file": "classes.txt", "sha256": hashlib.sha256(content).hexdigest()[:12]}

    def describe(self) -> dict[str, Any]:
        """Where the images are, and which files were not used."""
        images, masks, others = self._files
        return {
            "title": f"own images in {Path(self.dir).name}",
            "split": "all",
            "whole": len(self) == len(masks),
            "images_without_mask": len(images) - len(masks),
            "passed_over": [path.name for path in others],
        }


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
