"""Official folders as benchmarks, evaluated; seen and unseen classes by the written rule."""

import numpy as np
import pytest
from data.benchmarks import miniatures as mini
from PIL import Image

from ovseg_jax.data.benchmarks import OPENERS, class_table
from ovseg_jax.data.benchmarks.builders import build
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import BENCHMARKS, FOLDER_FIELDS, Benchmark, make_benchmark
from ovseg_jax.segmentation.official_folders import PAPER_COUNTS, ZSS, is_seen, unseen_classes


def test_every_set_is_registered_with_its_fields():
    assert set(OPENERS) < set(FOLDER_FIELDS) == set(BENCHMARKS) - {"scenes"}
    for name, fields in FOLDER_FIELDS.items():
        with pytest.raises(UserError, match="give --data_dir"):
            make_benchmark(name, fields)


@pytest.mark.parametrize("name", ["voc", "ade20k"])
def test_images_labels_and_classes(name, tmp_path):
    """Of the official folder, and of the one that is prepared from it."""
    getattr(mini, name)(tmp_path / "official")
    folder, table = OPENERS[name](tmp_path / "official", ""), class_table(name)
    written = build(name, tmp_path / "official", tmp_path / "tfds")
    for place, form in ((tmp_path / "official", folder.form), (written, f"tfds, {folder.form}")):
        benchmark = make_benchmark(name, {"dir": str(place), "count": 0})
        assert isinstance(benchmark, Benchmark) and benchmark.name == name
        assert (len(benchmark), benchmark.class_names) == (2, table.words)
        assert benchmark.has_background == table.background
        for index in range(2):
            image, labels = benchmark[index]
            with Image.open(folder.images[index]) as whole:
                np.testing.assert_array_equal(image, np.asarray(whole))
            np.testing.assert_array_equal(labels, folder.labels(index))
        with pytest.raises(IndexError):
            benchmark[2]
        assert benchmark.describe()["whole"] and benchmark.describe()["form"] == form
        assert not make_benchmark(name, {"dir": str(place), "count": 1}).describe()["whole"]


def test_labels_of_another_kind_before_any_compute(tmp_path):
    """Shifted by one already, as other programs write ADE20K: 255 in place of 0."""
    maps = mini.ade20k(tmp_path)
    folder = tmp_path / "ADEChallengeData2016" / "annotations" / "validation"
    for key, values in maps.items():
        mini.write_mask(folder / f"{key}.png", np.where(values == 0, 255, values - 1))
    with pytest.raises(UserError, match="have the value 255, and there are 0 to 150"):
        make_benchmark("ade20k", {"dir": str(tmp_path)})


def test_mistakes_are_told(tmp_path):
    mini.voc(tmp_path)
    with pytest.raises(UserError, match="count"):
        make_benchmark("voc", {"dir": str(tmp_path), "count": -1})
    with pytest.raises(UserError, match="benchmark voc"):
        make_benchmark("voc", {"directory": str(tmp_path)})
    folder = tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages"
    mini.write_image(folder / "2007_000033.jpg", size=(9, 6))
    with pytest.raises(UserError, match="2007_000033.png has 9x6 pixels, its image 6x9"):
        make_benchmark("voc", {"dir": str(tmp_path)})
    whole = (folder / "2007_000042.jpg").read_bytes()
    (folder / "2007_000033.jpg").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="image 0 .* cannot be read"):
        make_benchmark("voc", {"dir": str(tmp_path)})[0]


# ---- seen and unseen classes


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
    # Sec. 4.2 leaves out five of VOC, four of Context; under their official names.
    assert {base: len(names) for base, names in ZSS.items()} == {"voc": 5, "context": 4}
    for base, names in ZSS.items():
        assert set(names) < set(class_table(base).names)
