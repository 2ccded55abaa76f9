"""The evaluation sets as TFDS builders, written and read without TensorFlow.

    from ovseg_jax.data.benchmarks.builders import build
    build("voc", folder="VOCdevkit", data_dir="tensorflow_datasets")

writes ``tensorflow_datasets/ovseg_voc/1.0.0`` (one split, validation), which evaluation reads, and
any program with ``tfds.builder_from_directory``. An example has `image`, as it is on disk;
`labels`, a palette PNG whose values are those of the benchmark; and `key`. So does TFDS' own
program, which (4.9.10) imports TensorFlow for its other commands:

    tfds build ovseg_voc --imports=ovseg_jax.data.benchmarks.builders --manual_dir=VOCdevkit \\
        --data_dir=tensorflow_datasets --file_format=array_record
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from ovseg_jax.data.benchmarks import OPENERS, class_table
from ovseg_jax.data.benchmarks.class_tables import ClassTable
from ovseg_jax.data.benchmarks.folders import SPLIT, LabeledFolder
from ovseg_jax.errors import UserError


def label_png(labels: UInt8[np.ndarray, "H W"], table: ClassTable) -> bytes:
    """Labels as a PNG whose pixel values they are, shown in the table's colors."""
    image = Image.fromarray(labels)
    image.putpalette(table.palette())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class _FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the validation images of the evaluation set that `BENCHMARK` names."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Give the unpacked official folder as manual_dir."
    BENCHMARK = ""
    # Nothing is downloaded, so there is no list of checksums; looking for one needs
    # importlib_resources, which TFDS 4.9.10 does not declare.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        table = class_table(self.BENCHMARK)
        names = ["background"] * table.background + list(table.names)
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "labels": tfds.features.Image(shape=(None, None, 1)),
            "key": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{table.title}. {table.source}. {table.rule}",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(names=names, words=list(table.words)),
            # In the official order, so that example i is image i of the benchmark.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = OPENERS[self.BENCHMARK](os.fspath(dl_manager.manual_dir), "manual_dir, or --dir")
        # Known only now; it is written with the rest when the data set is complete.
        self.info.metadata.update(form=folder.form, differs=folder.differs)
        return {SPLIT: self._generate_examples(folder)}

    def _generate_examples(self, folder: LabeledFolder) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, key in enumerate(folder.keys):
            labels = label_png(folder.labels(index), folder.table)
            yield index, {"image": folder.image_bytes(index), "labels": labels, "key": key}


def _builder(benchmark: str) -> type[_FolderBuilder]:
    """The class, such as OvsegVoc; defining it registers it with TFDS as 'ovseg_voc'."""
    name = "Ovseg" + "".join(map(str.capitalize, benchmark.split("_")))
    title = class_table(benchmark).title
    fields = {"BENCHMARK": benchmark, "__doc__": title, "__module__": __name__}
    return type(_FolderBuilder)(name, (_FolderBuilder,), fields)


BUILDERS = {benchmark: _builder(benchmark) for benchmark in OPENERS}


def build(name: str, folder: str | Path, data_dir: str | Path) -> Path:
    """Writes an evaluation set from its official folder, unless it is there already.

    Returns the folder that was written, below `data_dir`, where TFDS keeps its data sets.
    """
    if name not in BUILDERS:
        raise UserError(f"there is no evaluation set {name!r}; there are: {', '.join(BUILDERS)}")
    if not Path(folder).is_dir() or not any(Path(folder).iterdir()):
        raise UserError(f"benchmark {name}: {folder} is no folder, or an empty one; correct --dir")
    builder = BUILDERS[name](data_dir=str(data_dir), file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=str(folder))
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)
