"""Every evaluation set from a miniature of its official layout, and what is said of gaps."""

import numpy as np
import pytest
from data.benchmarks import miniatures as mini
from PIL import Image

from ovseg_jax.data.benchmarks import OPENERS, class_table
from ovseg_jax.errors import UserError

FIELD = "config.eval.NAME.dir"


def expected(name, values):
    """Labels by the rule of the set's table, pixel by pixel."""
    table = class_table(name)
    number = {value: i + table.background for i, value in enumerate(table.values)}
    other = 0 if table.background else 255
    if name == "voc":
        number[255] = 255
    return np.array([[number.get(int(v), other) for v in row] for row in values])


def make(name, root):
    """Writes a miniature; returns the labels that it should have, by key."""
    table = class_table(name)
    names = dict(zip(table.values, table.names, strict=True))
    if name == "coco_object":
        return mini.coco_object(root, names)
    maps = mini.context_mat(root, names) if name == "context" else getattr(mini, name)(root)
    return {key: expected(name, values) for key, values in maps.items()}


@pytest.mark.parametrize("name", OPENERS)
def test_a_miniature_of_the_official_layout(name, tmp_path):
    labels = make(name, tmp_path)
    folder = OPENERS[name](tmp_path, FIELD)
    assert set(folder.keys) == set(labels) and len(folder) == len(labels)
    assert len({int(v) for one in labels.values() for v in one.flat}) > 2
    for index, key in enumerate(folder.keys):
        found = folder.labels(index)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, labels[key], err_msg=key)
        assert key in folder.images[index].name
        assert folder.image_bytes(index) == folder.images[index].read_bytes()


def test_overlapping_objects_and_crowds(tmp_path):
    """The rule of the table: the crowd below, then the large object, the small one on top."""
    labels = make("coco_object", tmp_path)["000000000001"]
    names = ("background", *class_table("coco_object").names)
    assert names[labels[5, 8]] == "person"  # the crowd, alone
    assert names[labels[4, 5]] == "dog"
    assert names[labels[1, 1]] == "toothbrush"
    folder = OPENERS["coco_object"](tmp_path, FIELD)
    np.testing.assert_array_equal(folder.labels(0), labels)
    assert not folder.labels(2).any()  # an image without objects belongs to the set


def test_objects_from_pixel_maps(tmp_path):
    """What published scores were computed from: things alone, stuff and unlabeled background."""
    maps = mini.coco_stuff(tmp_path)
    folder = OPENERS["coco_object"](tmp_path, FIELD)
    assert (folder.form, folder.keys, folder.differs) == ("pixel maps", tuple(maps), "")
    names = ("background", *class_table("coco_object").names)
    called = {0: "person", 10: "fire hydrant", 12: "stop sign", 89: "toothbrush"}
    for index, values in enumerate(maps.values()):
        found = folder.labels(index)
        for value in np.unique(values):
            (label,) = np.unique(found[values == value])
            assert names[label] == called.get(int(value), "background"), value
    # With the instances beside them, the maps are taken; without, it is said that labels differ.
    make("coco_object", tmp_path)
    assert OPENERS["coco_object"](tmp_path, FIELD).form == "pixel maps"
    (tmp_path / "stuffthingmaps").rename(tmp_path / "elsewhere")
    other = OPENERS["coco_object"](tmp_path, FIELD)
    assert other.form == "instances" and "pixel maps" in other.differs


def test_context_in_other_forms(tmp_path):
    for form in ("json", "png"):
        maps = getattr(mini, f"context_{form}")(tmp_path / form)
        folder = OPENERS["context"](tmp_path / form, FIELD)
        assert (folder.form, folder.keys) == (form, mini.CONTEXT_KEYS)
        for index, key in enumerate(folder.keys):
            labels = maps[key] if form == "png" else expected("context", maps[key])
            np.testing.assert_array_equal(folder.labels(index), labels)


def test_context_numbers_come_from_the_official_list(tmp_path):
    """With another numbering in labels.txt, the names decide."""
    table = class_table("context")
    numbers = list(table.values)
    turned = dict(zip(numbers, table.names[1:] + table.names[:1], strict=True))
    maps = mini.context_mat(tmp_path, turned)
    folder = OPENERS["context"](tmp_path, FIELD)
    first = maps[folder.keys[0]]
    assert (first == 2).any()  # aeroplane's number, now that of the second class
    assert set(folder.labels(0)[first == 2]) == {2}
    assert set(folder.labels(0)[first == 458]) == {1}


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("voc", "VOCdevkit/VOC2012/JPEGImages/2007_000042.jpg"),
        ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png"),
        ("voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"),
        ("context", "VOCdevkit/VOC2010/trainval/2008_000003.mat"),
        ("context", "VOCdevkit/VOC2010/59_labels.txt"),
        ("context", "VOCdevkit/VOC2010/labels.txt"),
        ("context", "VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg"),
        ("coco_object", "val2017/000000000002.jpg"),
        ("coco_object", "annotations/instances_val2017.json"),
        ("coco_stuff", "val2017/000000000140.jpg"),
        ("ade20k", "ADEChallengeData2016/images/validation/ADE_val_00000002.jpg"),
        ("cityscapes", "leftImg8bit/val/munster/munster_000000_000001_leftImg8bit.png"),
    ],
)
def test_a_missing_file_is_named(name, lost, tmp_path):
    make(name, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(UserError, match=lost.rsplit("/", 1)[-1]) as caught:
        OPENERS[name](tmp_path, FIELD)
    assert str(caught.value).startswith(f"benchmark {name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("voc", "SegmentationClass"),
        ("context", "SegmentationClassContext or trainval_merged.json or trainval"),
        ("coco_object", "val2017 or images/val2017"), ("coco_stuff", "stuffthingmaps/val2017"),
        ("ade20k", "annotations/validation"), ("cityscapes", "gtFine/val"),
    ],
)  # fmt: skip
def test_a_folder_of_something_else(name, said, tmp_path):
    with pytest.raises(UserError, match=said):
        OPENERS[name](tmp_path, FIELD)
    with pytest.raises(UserError, match=f"none is no folder; correct --{FIELD}"):
        OPENERS[name](tmp_path / "none", FIELD)
    with pytest.raises(UserError, match=f"give --{FIELD}"):
        OPENERS[name]("", FIELD)


def test_lists_of_images(tmp_path):
    for place in ("images/validation", "annotations/validation"):
        (tmp_path / place).mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no files \*\.png"):
        OPENERS["ade20k"](tmp_path, FIELD)
    mini.voc(tmp_path)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    listed = base / "ImageSets/Segmentation/val.txt"
    mini.write_text(listed, "2007_000042", "2007_000033")
    assert OPENERS["voc"](base, FIELD).keys == ("2007_000042", "2007_000033")
    mini.write_text(listed, *(f"x{i}" for i in range(10)))
    with pytest.raises(UserError, match="20 files are missing.*and 15 more"):
        OPENERS["voc"](tmp_path, FIELD)
    listed.write_text("\n \n")
    with pytest.raises(UserError, match="lists no images"):
        OPENERS["voc"](tmp_path, FIELD)


def test_damaged_labels(tmp_path):
    mini.voc(tmp_path)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    folder = OPENERS["voc"](tmp_path, FIELD)
    path = base / "SegmentationClass" / "2007_000033.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="2007_000033.*copy the files again"):
        folder.labels(0)
    Image.new("RGB", (9, 6)).save(path)
    with pytest.raises(UserError, match="RGB pixels"):
        folder.labels(0)
    make("coco_object", tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    whole = path.read_text()
    for damage, message in ((whole[:100], "not the official annotation"),
                            (whole.replace("toothbrush", "x"), "other categories")):  # fmt: skip
        path.write_text(damage)
        with pytest.raises(UserError, match=message):
            OPENERS["coco_object"](tmp_path, FIELD)


@pytest.mark.parametrize("name", ["voc", "ade20k", "coco_stuff", "cityscapes"])
def test_labels_of_another_kind_are_told_at_once(name, tmp_path):
    """Sizes and kinds of all files when the folder is opened, values as they are read."""
    make(name, tmp_path)
    first, *_ = OPENERS[name](tmp_path, FIELD).images
    key = first.stem.removesuffix("_leftImg8bit")
    (mask,) = [p for p in tmp_path.rglob(f"{key}*.png") if p != first and "instance" not in p.name]
    good = np.asarray(Image.open(mask))
    Image.fromarray(good[1:]).save(mask)
    with pytest.raises(UserError, match="1 of . label files cannot be used: .* its image 9x6"):
        OPENERS[name](tmp_path, FIELD)
    Image.fromarray(good).convert("RGB").save(mask)
    with pytest.raises(UserError, match="holds RGB pixels"):
        OPENERS[name](tmp_path, FIELD)
    Image.fromarray(np.full_like(good, 230)).save(mask)
    folder = OPENERS[name](tmp_path, FIELD)
    with pytest.raises(UserError, match=f"labels of {key} .* have the value 230"):
        folder.labels(0)
