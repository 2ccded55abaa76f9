"""Results as text beside published ones; the best, median and worst images, also as a page."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from data.benchmarks import miniatures as mini
from PIL import Image
from segmentation.test_evaluate import PROTOCOL, SIZES, Blocks, ByColor

from ovseg_jax.segmentation import report
from ovseg_jax.segmentation.evaluate import count_pixels, evaluate, mean_iou
from ovseg_jax.segmentation.evaluate_model import evaluate_model
from ovseg_jax.segmentation.pictures import scene_panel
from ovseg_jax.segmentation.protocol import named_protocol, protocol_notes
from ovseg_jax.segmentation.report import (
    comparison_rows,
    extreme_images,
    extremes,
    protocol_lines,
    published_rows,
    remarks,
    result_rows,
    write_page,
    write_pictures,
)


@pytest.fixture(scope="module")
def evaluated():
    benchmark, segmenter = Blocks(SIZES), ByColor(4)
    benchmark.class_names = ("red</script>", "green", "blue")  # must not be read as a tag
    result = evaluate(segmenter, benchmark, PROTOCOL, batch_size=4)
    own = result["image_miou"], 2, 4
    return benchmark, result, extreme_images(segmenter, benchmark, PROTOCOL, *own)


def test_extremes():
    chosen = extremes([3.0, 1.0, None, 2.0, 5.0, 4.0], 1)
    assert chosen == [(4, "best"), (0, "median"), (1, "worst")]
    assert extremes([3.0, 1.0], 5) == [(0, "best"), (1, "best")]
    assert extremes([None], 2) == []


def test_extreme_images_are_those_of_the_evaluation(evaluated):
    benchmark, result, chosen = evaluated
    miou = result["image_miou"]
    assert [one.kind for one in chosen] == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
    assert chosen[0].miou == max(miou) and chosen[-1].miou == min(miou)
    for one in chosen:
        image, truth = benchmark[one.index]
        np.testing.assert_array_equal(one.image, image)
        np.testing.assert_array_equal(one.truth, truth)
        assert one.prediction.shape == one.groups.shape == truth.shape
        miou = mean_iou(count_pixels(one.prediction, truth, 4))
        assert one.miou == pytest.approx(100 * miou, abs=1e-3)


@pytest.mark.parametrize("has_background", [True, False])
def test_pictures_show_what_was_evaluated(has_background, tmp_path, monkeypatch):
    benchmark = Blocks(((24, 24), (24, 40)), has_background=has_background)
    protocol = PROTOCOL.replace(threshold=0.99, thresholds={"blocks": 0.4})
    drawn = []

    def panel(image, groups, prediction, truth, *args, **options):
        drawn.append((prediction, truth))
        return scene_panel(image, groups, prediction, truth, *args, **options)

    monkeypatch.setattr(report, "scene_panel", panel)
    write_pictures(ByColor(2), benchmark, protocol, tmp_path, count=2, group_count=4)
    confusion = sum(count_pixels(*maps, 3 + has_background) for maps in drawn)
    result = evaluate(ByColor(2), benchmark, protocol, batch_size=2)
    np.testing.assert_array_equal(confusion, result["confusion"])


def test_the_page(evaluated, tmp_path):
    benchmark, result, chosen = evaluated
    path = tmp_path / "new" / "page.html"
    write_page(path, result, benchmark, chosen, 4)
    page = path.read_text()
    assert not re.search(r"https?://(?!www)|src=[\"']?(?!\")", page.split("<script>")[0])
    assert page.count("</script>") == 1 and "@" not in page.split("<script>")[0]
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["names"] == ["background", *benchmark.class_names]
    assert len(data["colors"]) == 4 and data["colors"][0] == "#000000"
    assert data["iou"] == list(result["iou"].values())
    for entry, one in zip(data["images"], chosen, strict=True):
        labels = np.frombuffer(base64.b64decode(entry["prediction"]), np.uint8)
        np.testing.assert_array_equal(
            labels.reshape(entry["height"], entry["width"]), one.prediction
        )
        picture = base64.b64decode(entry["groups"].partition(",")[2])
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size == (entry["width"], entry["height"])


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_page_in_use(evaluated, tmp_path):
    benchmark, result, chosen = evaluated
    write_page(tmp_path / "page.html", result, benchmark, chosen, 4)
    script = Path(__file__).with_name("fake_dom.js")
    command = ["node", str(script), str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    miou = {one.index: round(one.miou, 2) for one in chosen}
    assert [miou[i] for i in seen["cards"]["down"]] == sorted(miou.values(), reverse=True)
    assert [miou[i] for i in seen["cards"]["up"]] == sorted(miou.values())
    assert seen["cards"]["index"] == sorted(miou)
    for label, name in enumerate(["background", *benchmark.class_names]):
        value = result["iou"][name]
        said = "–" if value is None else f"{value:.1f} %"
        assert f"{name} {said}" in seen["classes"]
        # A class alone: the images that have it, by how well it was found.
        ious = {}
        for one in chosen:
            truth, found = one.truth[one.truth != 255], one.prediction[one.truth != 255]
            if ((truth == label) | (found == label)).any():
                both = ((truth == label) & (found == label)).sum()
                ious[one.index] = 100 * both / ((truth == label) | (found == label)).sum()
        assert {index for index, _ in seen["only"].get(name, [])} == set(ious)
        for index, head in seen["only"].get(name, []):
            assert head.endswith(f"{name} about {ious[index]:.1f} %")
    assert seen["labels"] and seen["left"] == ""
    for label, hover in seen["hover"].items():
        if int(label) < 4:
            assert hover["said"].startswith(seen["names"][int(label)] + ", IoU ")
            assert hover["lit"] == [int(label)]
            color = seen["colors"][int(label)]
            assert hover["color"] == [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert hover["other"] is None or min(hover["other"]) >= 225


def test_pictures_of_a_benchmark(directory, tmp_path):
    mini.voc(tmp_path)
    small = [(f"eval.protocol.{field}", "16") for field in ("short_side", "window", "stride")]
    options = {"data_dir": str(tmp_path), "overrides": small, "pictures": 1}
    evaluate_model(str(directory), ("voc", "voc20"), tmp_path / "out", **options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    with Image.open(tmp_path / "out" / "voc.png") as sheet:
        assert sheet.height > 2 * 200 and sheet.width > 5 * 320
    assert names == {f"{a}.{b}" for a in ("voc", "voc20") for b in ("json", "html", "png")}


# ---- text


def a_result(name="released", **changes):
    protocol = {
        **named_protocol(name).for_benchmark("voc").as_dict(),
        "as_named": True,
        "background": True,
        "classes": 20,
        "class_names_hash": "4567",
        "class_names_file": {"file": "tables/voc.json", "sha256": "0123"},
        "notes": protocol_notes(name),
    }
    return {
        "benchmark": "voc",
        "miou": 50.0,
        "pixel_accuracy": 80.0,
        "images": 1449,
        "images_per_second": 2.0,
        "data": {"images_expected": 1449},
        "entities": {"seen": 20, "unseen": 0, "in_paper": (20, 0)},
        "group_usage": {"groups": 8, "used": 5.25, "entropy": 0.625, "windows": 40},
        "zss": {"classes": ["sheep"], "miou": 1.25},
        "protocol": protocol,
        **changes,
    }


def test_comparison_is_of_one_protocol_alone():
    rows = comparison_rows(a_result())
    methods = [row[0] for row in rows[1:]]
    assert rows[0][0] == "voc, protocol released" and "SCLIP" not in methods
    # By score: ours, 50.0, below the 53.8 of the paper's ViT-B.
    assert methods[-2:] == ["this model", "OVSegmentor"] and rows[-1][-1] == "53.8"
    assert [row["method"] for row in published_rows("sclip", "voc")] == ["SCLIP"]
    assert comparison_rows(a_result(images=1448)) == []
    changed = a_result()
    changed["protocol"]["as_named"] = False
    assert comparison_rows(changed) == []
    assert comparison_rows({**a_result(), "benchmark": "scenes"}) == []
    data = {"images_expected": 1449, "differs": "labels were painted from instances"}
    other = a_result(data=data)
    assert comparison_rows(other) == []
    assert "labels were painted from instances" in next(remarks(other))
    assert any("settings differ" in line for line in remarks(changed))


def test_what_is_said():
    result = a_result(images=100)
    said = "\n".join(remarks(result))
    assert "100 images, but the whole set has 1449" in said
    assert "over 5.2 of 8 groups, entropy 0.62 of 1" in said
    assert "20 + 0 in the paper" in said and "1.2 on sheep" in said
    assert result_rows({"voc": result})[1][:2] == ("voc", "50.0")
    lines = "\n".join(protocol_lines({"voc": result}))
    words = ("threshold 0.95", "window 448", "tables/voc.json (0123)", "a photo of a {}.", "4567")
    for word in (*words, "20 classes and background"):
        assert word in lines
    # What several benchmarks share is said once.
    one, other = a_result(), a_result()
    other["protocol"] = {**other["protocol"], "threshold": None, "background": False}
    lines = protocol_lines({"voc": one, "voc20": other})
    assert "window 448" in lines[0] and "threshold" not in lines[0].replace("cap_threshold", "")
    assert sum("window 448" in line for line in lines) == 1
    assert sum(protocol_notes("released")["title"] in line for line in lines) == 1
    assert lines[-2].startswith("voc: threshold 0.95, 20 classes and background")
    assert lines[-1].startswith("voc20: threshold none, 20 classes, names from tables/voc.json")
