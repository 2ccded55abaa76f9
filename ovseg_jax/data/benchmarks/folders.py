"""Evaluation sets on disk: official folders, and what `builders` has written of them."""

import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from ovseg_jax.data.benchmarks.class_tables import ClassTable, WrongLabels, class_table
from ovseg_jax.data.decoding import orientation_of
from ovseg_jax.errors import UserError
from ovseg_jax.files import listed

LABEL_MODES = ("L", "P", "I", "I;16")  # of Pillow: one number a pixel


@dataclass(frozen=True)
class LabeledFolder:
    """The validation images of an official folder, with their labels.

    Attributes:
      name, table: of the evaluation set, and its classes.
      root: where the official folder begins.
      form: which of the annotation's forms is read, such as 'instances' or 'mat'.
      keys, images: one name an image, in the official order, and their files.
      read_labels: (index) -> labels as `table` numbers them.
      differs: in what these labels differ from those that published scores were computed from.
    """

    name: str
    table: ClassTable
    root: Path
    form: str
    keys: tuple[str, ...]
    images: tuple[Path, ...]
    read_labels: Callable[[int], UInt8[np.ndarray, "H W"]]
    differs: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def image_bytes(self, index: int) -> bytes:
        """An image as it is on disk; a UserError if it cannot be read."""
        try:
            return self.images[index].read_bytes()
        except OSError as error:
            raise UserError(f"benchmark {self.name}: {error}; copy the file again") from error

    def labels(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """The labels of an image; a UserError if they are damaged or of another kind."""
        where = f"benchmark {self.name}: the labels of {self.keys[index]} in {self.root}"
        try:
            return self.read_labels(index)
        except UserError:
            raise
        except WrongLabels as error:
            cause = "they were shifted or renumbered, as programs do for training"
            raise UserError(f"{where} {error}: {cause}; unpack the official ones again") from error
        except Exception as error:
            # Decoders of images, .mat and JSON files raise nearly anything on damaged files.
            cause = f"{type(error).__name__}: {error}"
            raise UserError(f"{where} cannot be read ({cause}); copy the files again") from error


def find_root(
    name: str, directory: str | Path, below: Sequence[str], needed: Sequence[str], field: str
) -> Path:
    """The folder in which the official layout begins, which has all that is `needed`.

    It is one of `below` the directory that the user gave in `field`; 'a|b' is satisfied by either.
    A UserError names what the likeliest folder lacks.
    """
    if not str(directory):
        official = f"its official folder (with {', '.join(needed).replace('|', ' or ')})"
        raise UserError(f"benchmark {name} needs {official}: give --{field}")
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"benchmark {name}: {directory} is no folder; correct --{field}")
    roots = [directory / start for start in below]
    lacking = {r: [paths for paths in needed if not first_existing(r, paths)] for r in roots}
    root = min(roots, key=lambda r: len(lacking[r]))
    if lacking[root]:
        wanted = ", ".join(lacking[root]).replace("|", " or ")
        unpack = "unpack the official files there, or give the folder that has them with"
        raise UserError(f"benchmark {name}: {root} lacks {wanted}; {unpack} --{field}")
    return root


def first_existing(root: Path, paths: str) -> Path | None:
    """The first that exists of some paths below a folder, 'a|b'."""
    return next((root / path for path in paths.split("|") if (root / path).exists()), None)


def require(name: str, files: Sequence[Path], masks: Sequence[Path] = ()) -> None:
    """A UserError names missing files, or masks whose headers do not fit their images, `files`."""
    present: dict[Path, set[str]] = {}
    for folder in {path.parent for path in (*files, *masks)}:
        # One listing a folder: asking for thousands of files one by one is slow on a bucket.
        present[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    missing = [path for path in (*files, *masks) if path.name not in present[path.parent]]
    if missing:
        lacking = f"{len(missing)} files are missing: {listed(missing)}"
        raise UserError(f"benchmark {name}: {lacking}; unpack the official files again")
    wrong = []
    for image, mask in zip(files, masks, strict=True) if masks else ():
        try:
            size = upright_size(image)
            with Image.open(mask) as labels:
                if labels.mode not in LABEL_MODES:
                    wrong.append(f"{mask} holds {labels.mode} pixels and should hold labels")
                elif labels.size != size:
                    shapes = f"{labels.width}x{labels.height} pixels, its image {size[0]}x{size[1]}"
                    wrong.append(f"{mask} has {shapes}")
        except OSError as error:
            wrong.append(f"{error} (of {image.name} and {mask.name})")
    if wrong:
        unusable = f"{len(wrong)} of {len(masks)} label files cannot be used"
        raise UserError(f"benchmark {name}: {unusable}: {listed(wrong, '; ')}")


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is decoded, from its header; an OSError if it is none."""
    with Image.open(path) as image:
        turned = orientation_of(image) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def read_names(name: str, path: Path) -> tuple[str, ...]:
    """The names of a split's images: the first word of each line, without folder and suffix."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"benchmark {name}: {path} cannot be read ({error})") from error
    words = [line.split()[0] for line in lines if line.strip()]
    if not words:
        raise UserError(f"benchmark {name}: {path} lists no images")
    return tuple(re.sub(r"\.(jpg|png)$", "", word.rsplit("/", 1)[-1]) for word in words)


def png_values(path: Path) -> Integer[np.ndarray, "H W"]:
    """The pixel values of a gray or palette PNG, as they are stored."""
    with Image.open(path) as image:
        if image.mode not in LABEL_MODES:
            wrong = f"{path} holds {image.mode} pixels and should hold labels"
            raise UserError(f"{wrong}; copy the official file again")
        return stored_values(image)


def stored_values(image: Image.Image) -> Integer[np.ndarray, "H W"]:
    """The labels of an opened mask. Pillow stretches gray of 2 and 4 bits to 255: undone here."""
    stored = str(image.tile[0][3]) if image.tile else ""
    return np.asarray(image) // np.uint8({"L;2": 85, "L;4": 17}.get(stored, 1))


# ---- sets that `builders` has written, read back without TensorFlow

SPLIT = "validation"


def is_prepared(directory: str | Path) -> bool:
    """Whether this is the folder of a data set that TFDS has written."""
    return bool(str(directory)) and (Path(directory) / "dataset_info.json").is_file()


def prepared_folder(name: str, directory: str | Path) -> Path | None:
    """The written set that `directory` is or, in ovseg_NAME/VERSION, holds (newest version)."""
    if not str(directory) or is_prepared(directory):
        return Path(directory) if str(directory) else None
    versions = [p for p in Path(directory).glob(f"ovseg_{name}/*.*.*") if is_prepared(p)]
    numbers = {p: [int(x) for x in p.name.split(".") if x.isdigit()] for p in versions}
    return max(versions, key=numbers.__getitem__, default=None)


@dataclass(frozen=True)
class PreparedSet:
    """A written evaluation set, as a `LabeledFolder`; `form` names that of its origin too."""

    name: str
    table: ClassTable
    root: Path
    source: Any = field(repr=False)
    form: str
    differs: str

    def __len__(self) -> int:
        return len(self.source)

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.source[i]["key"].decode() for i in range(len(self.source)))

    def image_bytes(self, index: int) -> bytes:
        return self.source[index]["image"]

    def labels(self, index: int) -> UInt8[np.ndarray, "H W"]:
        with Image.open(io.BytesIO(self.source[index]["labels"])) as image:
            return np.array(image)


def open_prepared(name: str, directory: str | Path) -> PreparedSet:
    """Opens the folder of one version of a set, such as tensorflow_datasets/ovseg_voc/1.0.0."""
    # Imported here, since few runs read prepared sets and TFDS takes a second to import.
    import tensorflow_datasets as tfds

    where = f"benchmark {name}: the data set in {directory}"
    try:
        builder = tfds.builder_from_directory(str(directory))
        if builder.name != f"ovseg_{name}":
            raise UserError(f"{where} is {builder.name!r}, not 'ovseg_{name}'")
        # Bytes, not arrays: images are decoded by the same rules as in training.
        skip = {key: tfds.decode.SkipDecoding() for key in ("image", "labels")}
        source = builder.as_data_source(SPLIT, decoders=skip)
    except UserError:
        raise
    except Exception as error:
        # TFDS raises nearly anything on files that were cut short or changed.
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{where} cannot be read ({cause}); build it again") from error
    told = builder.info.metadata or {}
    form, differs = f"tfds, {told.get('form', 'unknown')}", told.get("differs", "")
    return PreparedSet(name, class_table(name), Path(directory), source, form, differs)
