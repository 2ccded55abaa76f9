"""Evaluation sets on disk: official folders, and what `builders` has written of them."""

import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
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
      name: of the evaluation set.
      table: its classes.
      root: where the official folder begins.
      form: which of the annotation's forms is read, such as 'instances' or 'mat'.
      keys: one name an image, in the official order.
      images: their files.
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
        """An image as it is on disk.

        Raises:
          UserError: it cannot be read.
        """
        try:
            return self.images[index].read_bytes()
        except OSError as error:
            raise UserError(f"benchmark {self.name}: {error}; copy the file again") from error

    def labels(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """The labels of an image.

        Raises:
          UserError: their file is damaged, or not of the kind it should be.
        """
        try:
            return self.read_labels(index)
        except UserError:
            raise
        except WrongLabels as error:
            raise UserError(
                f"benchmark {self.name}: the labels of {self.keys[index]} in {self.root} {error}: "
                "they were shifted or renumbered, as programs do for training; unpack the official "
                "ones again"
            ) from error
        except Exception as error:
            # Decoders of images, .mat and JSON files raise nearly anything on damaged files.
            raise UserError(
                f"benchmark {self.name}: the labels of {self.keys[index]} in {self.root} cannot be "
                f"read ({type(error).__name__}: {error}); copy the files again"
            ) from error


def find_root(
    name: str, directory: str | Path, below: Sequence[str], needed: Sequence[str], field: str
) -> Path:
    """The folder in which the official layout begins.

    Args:
      name: of the evaluation set.
      directory: what the user gave.
      below: where the layout may begin under it, '' for itself.
      needed: folders and files that it must hold; 'a|b' is satisfied by either.
      field: flag or config field that holds `directory`, for messages.

    Raises:
      UserError: none has them all; it names what the likeliest one lacks.
    """
    if not str(directory):
        raise UserError(
            f"benchmark {name} needs its official folder (with {_listed(needed)}): give --{field}"
        )
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"benchmark {name}: {directory} is no folder; correct --{field}")
    roots = [directory / start for start in below]
    lacking = {r: [paths for paths in needed if not first_existing(r, paths)] for r in roots}
    root = min(roots, key=lambda r: len(lacking[r]))
    if lacking[root]:
        raise UserError(
            f"benchmark {name}: {root} lacks {_listed(lacking[root])}; unpack the official files "
            f"there, or point --{field} at the folder that has them"
        )
    return root


def first_existing(root: Path, paths: str) -> Path | None:
    """The first that exists of some paths below a folder, 'a|b'."""
    return next((root / path for path in paths.split("|") if (root / path).exists()), None)


def _listed(needed: Sequence[str]) -> str:
    return ", ".join(paths.replace("|", " or ") for paths in needed)


def require(name: str, files: Iterable[Path]) -> None:
    """Checks that every file is there.

    Raises:
      UserError: naming the first few that are missing, with their number.
    """
    present: dict[Path, set[str]] = {}
    missing = []
    for path in files:
        # One listing a folder: asking for thousands of files one by one is slow on a bucket.
        folder = path.parent
        if folder not in present:
            present[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if path.name not in present[folder]:
            missing.append(path)
    if missing:
        raise UserError(
            f"benchmark {name} is incomplete: {len(missing)} files are missing: "
            f"{listed(missing)}; unpack the official files again"
        )


def require_equal_sizes(name: str, images: Sequence[Path], masks: Sequence[Path]) -> None:
    """Checks by their headers that every label file holds labels, one a pixel of its image.

    Raises:
      UserError: naming the first few that do not, with their number.
    """
    wrong = []
    for image, mask in zip(images, masks, strict=True):
        try:
            size = upright_size(image)
            with Image.open(mask) as labels:
                if labels.mode not in LABEL_MODES:
                    wrong.append(
                        f"{mask} holds {labels.mode} pixels and should hold one label each"
                    )
                elif labels.size != size:
                    wrong.append(
                        f"{mask} has {labels.width}x{labels.height} pixels, its image "
                        f"{size[0]}x{size[1]}"
                    )
        except OSError as error:
            wrong.append(f"{error} (of {image.name} and {mask.name})")
    if wrong:
        raise UserError(
            f"benchmark {name}: {len(wrong)} of {len(masks)} label files cannot be used: "
            f"{listed(wrong, '; ')}"
        )


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is decoded, from its header alone.

    Raises:
      OSError: it is no image.
    """
    with Image.open(path) as image:
        turned = orientation_of(image) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def read_names(name: str, path: Path) -> tuple[str, ...]:
    """The names of a split's images: the first word of each line, without folder and suffix.

    Raises:
      UserError: the file is not text, or has no names.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"benchmark {name}: {path} cannot be read ({error})") from error
    words = [line.split()[0] for line in lines if line.strip()]
    if not words:
        raise UserError(f"benchmark {name}: {path} lists no images")
    return tuple(re.sub(r"\.(jpg|png)$", "", word.rsplit("/", 1)[-1]) for word in words)


def png_values(path: Path) -> Integer[np.ndarray, "H W"]:
    """The pixel values of a gray or palette PNG, as they are stored.

    Raises:
      UserError: it has colors, not labels.
    """
    with Image.open(path) as image:
        if image.mode not in LABEL_MODES:
            raise UserError(
                f"{path} holds {image.mode} pixels and should hold one label each; copy the "
                "official file again"
            )
        return np.asarray(image)


# ---- sets that `builders` has written, read back without TensorFlow

SPLIT = "validation"


def is_prepared(directory: str | Path) -> bool:
    """Whether this is the folder of a data set that TFDS has written."""
    return bool(str(directory)) and (Path(directory) / "dataset_info.json").is_file()


def prepared_folder(name: str, directory: str | Path) -> Path | None:
    """The written set that `directory` is or, in ovseg_NAME/VERSION, holds (newest version)."""
    if is_prepared(directory):
        return Path(directory)
    if not str(directory):
        return None
    versions = [p for p in Path(directory).glob(f"ovseg_{name}/*.*.*") if is_prepared(p)]
    return max(
        versions, key=lambda p: [int(x) for x in p.name.split(".") if x.isdigit()], default=None
    )


@dataclass(frozen=True)
class PreparedSet:
    """A written evaluation set; it offers what `LabeledFolder` does.

    `form` is 'tfds' and that of the folder it was written from.
    """

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
        """One name an image, in the official order."""
        return tuple(self.source[i]["key"].decode() for i in range(len(self.source)))

    def image_bytes(self, index: int) -> bytes:
        """An image as it was found in the official folder."""
        return self.source[index]["image"]

    def labels(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """The labels of an image."""
        with Image.open(io.BytesIO(self.source[index]["labels"])) as image:
            return np.array(image)


def open_prepared(name: str, directory: str | Path) -> PreparedSet:
    """Opens the folder of one version of a set, such as tensorflow_datasets/ovseg_voc/1.0.0.

    Raises:
      UserError: it holds another data set, or is damaged.
    """
    # Imported here, since few runs read prepared sets and TFDS takes a second to import.
    import tensorflow_datasets as tfds

    directory = Path(directory)
    try:
        builder = tfds.builder_from_directory(str(directory))
        # Bytes, not arrays: images are decoded by the same rules as in training.
        skip = {key: tfds.decode.SkipDecoding() for key in ("image", "labels")}
        is_right = builder.name == f"ovseg_{name}"
        source = builder.as_data_source(SPLIT, decoders=skip) if is_right else None
    except Exception as error:
        # TFDS raises nearly anything on files that were cut short or changed.
        raise UserError(
            f"benchmark {name}: the data set in {directory} cannot be read "
            f"({type(error).__name__}: {error}); build it again"
        ) from error
    if source is None:
        raise UserError(
            f"benchmark {name}: {directory} holds the data set {builder.name!r}, not 'ovseg_{name}'"
        )
    metadata = builder.info.metadata or {}
    form = f"tfds, {metadata.get('form', 'unknown')}"
    return PreparedSet(
        name, class_table(name), directory, source, form, metadata.get("differs", "")
    )
