"""Evaluation sets written for TFDS and read back, without TensorFlow, equal to their folders."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.benchmarks import miniatures as mini
from PIL import Image

from ovseg_jax.data.benchmarks import OPENERS, class_table
from ovseg_jax.data.benchmarks.__main__ import main
from ovseg_jax.data.benchmarks.builders import BUILDERS, build, label_png
from ovseg_jax.data.benchmarks.folders import is_prepared, open_prepared
from ovseg_jax.errors import UserError


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """VOC's official folder, and what was written of it."""
    root = tmp_path_factory.mktemp("voc")
    mini.voc(root / "official")
    return root / "official", build("voc", root / "official", root / "tfds")


@pytest.mark.parametrize("name", ["voc", "cityscapes"])
def test_what_is_read_back_equals_the_folder(name, tmp_path):
    getattr(mini, name)(tmp_path / "official")
    written = build(name, tmp_path / "official", tmp_path / "tfds")
    assert is_prepared(written) and not is_prepared(tmp_path) and not is_prepared("")
    folder, prepared = OPENERS[name](tmp_path / "official", ""), open_prepared(name, written)
    assert len(prepared) == len(folder) and prepared.table == folder.table
    for index in range(len(folder)):
        assert prepared.image_bytes(index) == folder.image_bytes(index)
        np.testing.assert_array_equal(prepared.labels(index), folder.labels(index))
    assert "tensorflow" not in sys.modules
    assert any(path.suffix != ".json" and "array_record" in path.name for path in written.iterdir())


def test_tfds_decodes_it_for_other_programs(voc):
    official, written = voc
    builder = tfds.builder_from_directory(str(written))
    source, folder = builder.as_data_source("validation"), OPENERS["voc"](official, "")
    with Image.open(io.BytesIO(folder.image_bytes(1))) as image:
        np.testing.assert_array_equal(source[1]["image"], np.asarray(image))
    np.testing.assert_array_equal(source[1]["labels"][..., 0], folder.labels(1))
    assert source[1]["key"].decode() == folder.keys[1]
    assert builder.info.metadata["names"] == ["background", *class_table("voc").names]


def test_the_build_command_of_tfds_writes_the_same(voc, tmp_path):
    """The module behind `tfds build`: the program itself imports TensorFlow for other commands."""
    from tensorflow_datasets.scripts.cli import build as command
    from tensorflow_datasets.scripts.cli import cli_utils

    official, written = voc
    parse = cli_utils.make_flags_parser(command.Args, description="")
    flags = ["--imports=ovseg_jax.data.benchmarks.builders", "--file_format=array_record"]
    flags += [f"--data_dir={tmp_path / 'tfds'}", f"--manual_dir={official}"]
    parse(["tfds build", "ovseg_voc", *flags]).execute()
    builder = tfds.builder("ovseg_voc", data_dir=str(tmp_path / "tfds"), file_format="array_record")
    ours, theirs = open_prepared("voc", written), open_prepared("voc", builder.data_dir)
    assert len(builder.as_data_source("validation")) == len(theirs) == len(ours) == 2
    for index in range(2):
        assert theirs.image_bytes(index) == ours.image_bytes(index)
        np.testing.assert_array_equal(theirs.labels(index), ours.labels(index))
    assert "tensorflow" not in sys.modules


def test_label_files_show_the_official_colors():
    table = class_table("voc")
    labels = np.array([[0, 1, 20, 255]], np.uint8)
    with Image.open(io.BytesIO(label_png(labels, table))) as image:
        assert np.asarray(image).tolist() == labels.tolist()
        shown = np.asarray(image.convert("RGB"))[0]
    expected = [(0, 0, 0), table.colors[0], table.colors[19], (255, 255, 255)]
    assert shown.tolist() == [list(color) for color in expected]


def test_which_labels_it_was_written_from_is_kept(tmp_path):
    table = class_table("coco_object")
    mini.coco_object(tmp_path / "coco", dict(zip(table.values, table.names, strict=True)))
    prepared = open_prepared("coco_object", build("coco_object", tmp_path / "coco", tmp_path))
    folder = OPENERS["coco_object"](tmp_path / "coco", "")
    assert prepared.form == "tfds, instances" and prepared.differs == folder.differs != ""
    assert prepared.keys == folder.keys


def test_mistakes_are_told(voc, tmp_path, capsys):
    assert {name: builder.name for name, builder in BUILDERS.items()} == {
        name: f"ovseg_{name}" for name in OPENERS
    }
    with pytest.raises(UserError, match="ade20k"):
        build("ade", tmp_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for place in ("none", "empty"):
        with pytest.raises(UserError, match=f"{place} is no folder, or an empty one"):
            build("voc", tmp_path / place, tmp_path / "out")
    with pytest.raises(UserError, match="SegmentationClass"):
        build("voc", tmp_path, tmp_path / "out")
    where = [f"--dir={voc[0]}", f"--out={tmp_path / 'tfds'}"]
    assert main(["--benchmark=voc", *where]) == 0
    written = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(open_prepared("voc", written)) == 2
    with pytest.raises(UserError, match="'ovseg_voc', not 'ovseg_context'"):
        open_prepared("context", written)
    (written / "features.json").unlink()
    with pytest.raises(UserError, match="build it again"):
        open_prepared("voc", written)
