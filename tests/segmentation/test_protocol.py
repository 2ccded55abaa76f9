"""Protocols by name: complete, sourced, and compared with published results of their own only."""

import json

import pytest
from data.benchmarks import miniatures as mini

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import class_words, make_benchmark
from ovseg_jax.segmentation.official_folders import FOLDERS
from ovseg_jax.segmentation.protocol import (
    NAMES,
    Protocol,
    is_named,
    named_protocol,
    names_hash,
    protocol_notes,
    saved_protocol,
)
from ovseg_jax.segmentation.report import (
    comparison_rows,
    protocol_lines,
    published_rows,
    remarks,
    result_rows,
)
from ovseg_jax.segmentation.vocabulary import Vocabulary


@pytest.mark.parametrize("name", NAMES)
def test_protocols(name):
    protocol = named_protocol(name)
    assert protocol.name == name
    assert Protocol.from_config(json.loads(json.dumps(protocol.as_dict()))) == protocol
    notes = protocol_notes(name)
    assert notes["title"] and notes["source"]
    for benchmark in FOLDERS:
        own = protocol.for_benchmark(benchmark)
        assert own.per_benchmark == {} and own.thresholds == {}
        assert is_named(own, benchmark, own_scale=True)
        assert not is_named(own.replace(short_side=own.short_side + 1), benchmark)
        assert not is_named(own.replace(name="mine"), benchmark)


def test_settings_that_the_sources_state():
    paper, released, sclip = (named_protocol(name) for name in ("paper", "released", "sclip"))
    names = ("voc", "context", "coco_object")
    assert [paper.for_benchmark(name).threshold for name in names] == [0.9, 0.35, 0.9]
    assert [released.for_benchmark(name).threshold for name in names] == [0.95, 0.35, 0.9]
    assert [sclip.for_benchmark(name).scale for name in (*names, "ade20k")] == [65, 50, 50, 40]
    assert sclip.for_benchmark("cityscapes").short_side == 560
    assert sclip.for_benchmark("voc").min_area == 0.1 and len(sclip.templates) == 80
    # Sec. 3: "A photo of {class}"; GroupViT's, which the released code took over, has an article.
    assert paper.templates == ("A photo of {}",)
    assert released.templates == ("a photo of a {}.",)
    assert named_protocol("tcl").pamr_steps == 10
    with pytest.raises(UserError, match="did you mean 'sclip'"):
        named_protocol("slip")
    for name in NAMES:
        for benchmark in FOLDERS:
            for row in published_rows(name, benchmark):
                assert row["source"] and 0 < row["miou"][benchmark] < 100


def test_words(tmp_path):
    mini.voc(tmp_path)
    voc = make_benchmark("voc", {"dir": str(tmp_path)})
    released, file = class_words(voc, "released")
    assert released.words[10] == "table" and file["file"] == "tables/voc.json"
    official, same = class_words(voc, "official")
    assert official.words[10] == "diningtable" and same == file and len(file["sha256"]) == 12
    sclip, other = class_words(voc, "sclip")
    assert sclip.classes[3] == "ship" and sclip.word_to_class.count(14) == 7
    assert -1 in sclip.word_to_class and other["sha256"] != file["sha256"]
    everyday, _ = class_words(voc, "everyday")
    assert everyday.words[everyday.word_to_class.index(14) + 1] == "man"
    voc20 = make_benchmark("voc20", {"dir": str(tmp_path)})
    alone, _ = class_words(voc20, "sclip")
    assert alone.classes == sclip.classes and -1 not in alone.word_to_class
    assert class_words(voc20, "everyday")[0] == everyday
    # The unseen classes alone have the words that they have among all.
    few = make_benchmark("voc_zss", {"dir": str(tmp_path)})
    own, file = class_words(few, "sclip")
    assert own.classes == ("pottedplant", "sheep", "sofa", "train", "television monitor")
    assert own.word_to_class == (0, 1, 2, 3, 4, 4, 4, 4, 4) and file == other
    assert class_words(few, "official")[0].words[-1] == "tvmonitor"
    assert class_words(few, "released") == (Vocabulary.of(few.class_names), same)
    with pytest.raises(UserError, match="no words for benchmark context"):
        mini.context_png(tmp_path / "VOCdevkit" / "VOC2010")
        class_words(make_benchmark("context", {"dir": str(tmp_path)}), "everyday")


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
    assert "voc: labels were painted from instances" in remarks({"voc": other})[0]
    assert any("settings differ" in line for line in remarks({"voc": changed}))


def test_what_is_said():
    result = a_result(images=100)
    said = "\n".join(remarks({"voc": result}))
    assert "100 images, but the whole set has 1449" in said
    assert "over 5.2 of 8 groups, entropy 0.62 of 1" in said
    assert "20 + 0 in the paper" in said and "1.2 on sheep" in said
    assert result_rows({"voc": result})[1][:2] == ("voc", "50.0")
    lines = "\n".join(protocol_lines({"voc": result}))
    words = ("threshold 0.95", "window 448", "tables/voc.json (0123)", "a photo of a {}.", "4567")
    for word in (*words, "20 classes and background"):
        assert word in lines


def test_a_run_says_once_what_its_benchmarks_share():
    one, other = a_result(), a_result()
    other["protocol"] = {**other["protocol"], "threshold": None, "background": False}
    lines = protocol_lines({"voc": one, "voc20": other})
    assert "window 448" in lines[0] and "threshold" not in lines[0].replace("cap_threshold", "")
    assert sum("window 448" in line for line in lines) == 1
    assert sum(protocol_notes("released")["title"] in line for line in lines) == 1
    assert lines[-2].startswith("voc: threshold 0.95, 20 classes and background")
    assert lines[-1].startswith("voc20: threshold none, 20 classes, names from tables/voc.json")


def test_fields_of_earlier_versions():
    retired = {"assignment": "soft", "assignment_temperature": 1.0}
    retired |= {"pamr_dilations": [1, 2, 4, 8, 12, 24], "flip": False, "scales": [1.0]}
    fields = {**Protocol().as_dict(), **retired}
    assert saved_protocol({"protocol": fields, "provenance": {}}) == Protocol()
    for other in ({"pamr_dilations": [1, 2]}, {"flip": True}):
        with pytest.raises(UserError, match=f"unknown {next(iter(other))}"):
            saved_protocol({"protocol": {**fields, **other}, "provenance": {}})


ONE_GROUP = {"grouping": "one_group", "image_classes": 3, "cap_threshold": True}


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"strid": 3}, "unknown strid"),
        ({"order": "x"}, "upsample_first"),
        ({"averaged": "x"}, "cosines"),
        ({"window": 0}, "window must be at least 1 pixel"),
        ({"templates": ["a photo"]}, "template"),
        ({"pamr_steps": -1}, "pamr_steps must be at least 0"),
        ({"min_area": 1.0}, "below 1"),
        ({"image_classes": 3}, "image_classes needs"),
        ({**ONE_GROUP, "order": "argmax_first"}, "upsample_first"),
        ({**ONE_GROUP, "pamr_steps": 2}, "soft_patches"),
        ({"pamr_steps": 2, "order": "argmax_first"}, "upsample_first"),
        ({"averaged": "cosines", "border_scale": 1.0}, "border_scale"),
        ({"per_benchmark": {"voc": {"name": "x"}}}, "per_benchmark.voc"),
        ({"per_benchmark": {"voc": {"window": 0}}}, "window"),
    ],
)
def test_protocols_that_make_no_sense(fields, said):
    with pytest.raises(UserError, match=said):
        Protocol.from_config(fields)


def test_numbers_of_json_fit():
    assert Protocol.from_config({"scale": 20}) == Protocol(scale=20.0)
    assert names_hash(("a", "b")) != names_hash(("b", "a"))
