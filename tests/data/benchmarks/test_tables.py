"""The class tables: how many, which, and how values become labels."""

import numpy as np
import pytest

from ovseg_jax.data.benchmarks import OPENERS, class_table
from ovseg_jax.data.benchmarks.class_tables import WrongLabels

COUNTS = {
    "voc": (20, True),
    "context": (59, True),
    "coco_object": (80, True),
    "coco_stuff": (171, False),
    "ade20k": (150, False),
    "cityscapes": (19, False),
}


@pytest.mark.parametrize("name", OPENERS)
def test_counts_and_uniqueness(name):
    table = class_table(name)
    assert (len(table.names), table.background) == COUNTS[name]
    assert len(set(table.names)) == len(set(table.values)) == len(table.names)
    assert len(table.words) == len(table.colors) == len(table.names)
    assert all(word == word.strip() and word for word in table.words)
    assert all(len(color) == 3 and 0 <= min(color) <= max(color) <= 255 for color in table.colors)
    assert table.title and table.source and table.rule
    palette, first = table.palette(), 3 * table.background
    assert len(palette) == 768 and palette[-3:] == [255] * 3
    assert palette[: first + 3] == [0] * first + list(table.colors[0])


# Facts of the official files, looked up one by one.
@pytest.mark.parametrize(
    ("name", "index", "official", "word", "value", "color"),
    [
        ("voc", 0, "aeroplane", "aeroplane", 1, (128, 0, 0)),
        ("voc", 10, "diningtable", "table", 11, (192, 128, 0)),
        ("voc", 19, "tvmonitor", "monitor", 20, (0, 64, 128)),
        ("context", 0, "aeroplane", "airplane", 2, (128, 0, 0)),
        ("context", 36, "person", "person", 284, (128, 0, 192)),
        ("coco_object", 11, "stop sign", "stop sign", 13, None),
        ("coco_object", 79, "toothbrush", "toothbrush", 90, None),
        ("coco_stuff", 80, "banner", "banner", 91, None),
        ("coco_stuff", 170, "wood", "wood", 181, None),
        ("ade20k", 149, "flag", "flag", 150, (92, 0, 255)),
        ("cityscapes", 0, "road", "road", 7, (128, 64, 128)),
        ("cityscapes", 18, "bicycle", "bicycle", 33, (119, 11, 32)),
    ],
)
def test_known_classes(name, index, official, word, value, color):
    table = class_table(name)
    found = (table.names[index], table.words[index], table.values[index])
    assert found == (official, word, value)
    assert color is None or table.colors[index] == color


def test_relabel_with_and_without_background():
    official = np.array([[0, 1, 20, 150]])
    assert class_table("ade20k").relabel(official).tolist() == [[255, 0, 19, 149]]
    voc = class_table("voc")
    assert voc.relabel(official[:, :3]).tolist() == [[0, 1, 20]]
    assert voc.relabel(np.array([[0, 255]])).tolist() == [[0, 0]]  # its module puts 255 back
    assert voc.relabel(official, tuple(range(131, 151)), 150).tolist() == [[0, 0, 0, 20]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("voc", 21), ("voc", 254), ("ade20k", 151), ("ade20k", 255), ("coco_stuff", 182),
     ("coco_stuff", 11), ("cityscapes", 34), ("cityscapes", 255), ("context", 460),
     ("coco_object", 200)],
)  # fmt: skip
def test_values_that_no_official_file_has(name, value):
    """ADE20K with 255 was shifted by one; COCO with 11 and Cityscapes with 255 are renumbered."""
    with pytest.raises(WrongLabels, match=f"value {value}, and there are 0 to"):
        class_table(name).relabel(np.array([[0, 1, value]]))
    class_table(name).relabel(np.array([[0, class_table(name).largest]]))
