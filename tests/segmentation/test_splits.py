"""Seen and unseen classes: by the written rule, beside the paper's counts, and those of ZSS."""

import pytest

from ovseg_jax.data.benchmarks import class_table
from ovseg_jax.segmentation.official_folders import (
    PAPER_COUNTS,
    is_seen,
    unseen_classes,
    zss_unseen,
)


@pytest.mark.parametrize(
    ("name", "seen", "unseen"),
    [("voc", 20, 0), ("coco_object", 64, 16), ("context", 31, 28), ("ade20k", 32, 118)],
)
def test_counts_by_the_rule_are_those_that_are_written(name, seen, unseen):
    """And the reason that is given for each difference from the paper's Table 7."""
    names = class_table(name).names
    found = unseen_classes(name, names)
    assert (len(names) - len(found), len(found)) == (seen, unseen)
    paper = PAPER_COUNTS[name]
    if name == "coco_object":
        assert paper == (seen + 1, unseen)  # with background
    elif name in ("context", "ade20k"):
        person = is_seen("person")
        assert person and paper == (seen - person, unseen + person)
    else:
        assert paper == (seen, unseen)


def test_names_decide():
    for name in ("cat", "Cat", "bus ", "diningtable", "dining table", "tvmonitor", "motorbike"):
        assert is_seen(name), name
    for name in ("wine glass", "traffic light", "swivel chair", "zebra crossing", "wall", "catt"):
        assert not is_seen(name), name
    assert unseen_classes("cityscapes", ("road", "sky")) == ()


def test_unseen_classes_of_zero_shot_segmentation():
    """Sec. 4.2: five of VOC, four of Context."""

    def names(base):
        table = class_table(base)
        return {table.names[i] for i in zss_unseen(base, table.names)}

    assert names("voc") == {"pottedplant", "sheep", "sofa", "train", "tvmonitor"}
    assert names("context") == {"cow", "motorbike", "sofa", "cat"}
    assert names("ade20k") == set()
