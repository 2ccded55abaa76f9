"""Evaluation sets that `builders` has written, read back without TensorFlow."""

import functools
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ovseg_jax.data.benchmarks.class_tables import ClassTable, class_table
from ovseg_jax.errors import UserError

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
    """A written evaluation set; it offers what `folders.LabeledFolder` does.

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
