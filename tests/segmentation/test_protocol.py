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
from ovseg_jax.segmentation.report import published_rows
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
    ],
)
def test_protocols_that_make_no_sense(fields, said):
    with pytest.raises(UserError, match=said):
        Protocol.from_config(fields)


def test_numbers_of_json_fit():
    assert Protocol.from_config({"scale": 20}) == Protocol(scale=20.0)
    assert names_hash(("a", "b")) != names_hash(("b", "a"))
