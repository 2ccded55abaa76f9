"""Colors, palette files, overlays and panels."""

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import pictures
from ovseg_jax.segmentation.pictures import FIRST, colors, paint, palette_image


def test_colors_are_distinct_and_stable():
    table = colors(255)
    assert len(set(table)) == 255 and all(len(color) == 3 for color in table)
    assert table[:7] == FIRST and colors(46) == table[:46] and colors(0) == ()
    few = np.array([(0, 0, 0), *colors(46)], float)
    gaps = np.linalg.norm(few[:, None] - few[None], axis=-1) + 1e3 * np.eye(47)
    assert gaps.min() > 30
    with pytest.raises(UserError, match="256"):
        colors(256)


def test_palette_png_keeps_the_labels(tmp_path):
    painted = paint(np.array([[0, 1], [2, 255]], np.uint8), 2)
    np.testing.assert_array_equal(painted[0], [(0, 0, 0), colors(2)[0]])
    np.testing.assert_array_equal(painted[1], [colors(2)[1], (255, 255, 255)])
    assert tuple(paint(np.zeros((1, 1), int), 3, background=False)[0, 0]) == colors(3)[0]
    labels = np.random.default_rng(0).integers(0, 6, (7, 9), np.uint8)
    palette_image(labels, 5).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), paint(labels, 5))


def a_scene(h=40, w=60):
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    labels = np.zeros((h, w), np.uint8)
    labels[5:20, 10:40] = 2
    return image, labels


def has_color(picture, color):
    return bool((np.asarray(picture) == np.array(color)).all(-1).any())


def test_overlay_tints_only_the_regions_and_names_their_classes():
    image, labels = a_scene()
    names, factor = ["cat", "fire hydrant", "dog"], round(2 * pictures.PANEL / 60)
    picture = pictures.overlay(image, labels, names)
    assert picture.width == 60 * factor and picture.height > 40 * factor
    drawn = np.asarray(picture)
    np.testing.assert_array_equal(drawn[2 * factor, 50 * factor], image[2, 50])
    tinted = 0.45 * image[10, 20] + 0.55 * np.array(colors(3)[1])
    np.testing.assert_allclose(drawn[10 * factor, 20 * factor], tinted, atol=1)
    assert has_color(picture, colors(3)[1]) and not has_color(picture, colors(3)[0])
    # Large images stay as large as they are.
    assert pictures.overlay(*a_scene(900, 1200), names).width == 1200


def test_scene_panel():
    image, labels = a_scene()
    truth = np.where(labels == 2, 3, labels).astype(np.uint8)
    truth[:2] = 255
    groups = (np.arange(60) // 10)[None].repeat(40, 0)
    names = [f"a rather long class name {i}" for i in range(5)]
    options = {"title": "a caption " * 40, "group_count": 8}
    panel = pictures.scene_panel(image, groups, labels, truth, names, **options)
    assert panel.width == 5 * (pictures.PANEL + pictures.MARGIN) + pictures.MARGIN
    assert has_color(panel, colors(5)[1]) and has_color(panel, colors(5)[2])
    sheet = pictures.contact_sheet([panel, panel, panel], columns=2)
    assert sheet.width == 2 * panel.width and sheet.height > 2 * panel.height
    # The overlay, on the right, has the names on it.
    other = pictures.scene_panel(image, groups, labels, truth, list("abcde"), **options)
    tile = (slice(60, 200), slice(-332, None))
    assert (np.asarray(panel)[tile] != np.asarray(other)[tile]).any()


def test_letters_that_no_font_has_are_told(caplog):
    known, font = pictures._drawable("caf\u00e9")
    assert known.startswith("caf") and font.getlength(known) > 0
    shown, _ = pictures._drawable("cat \U0010fffd")
    assert shown == "cat ?" and "no font on this machine" in caplog.text
