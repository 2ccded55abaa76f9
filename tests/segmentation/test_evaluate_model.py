"""A model directory on benchmarks: by name, with settings that apply or are refused."""

import hashlib
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from data.benchmarks import miniatures as mini
from PIL import ExifTags, Image

import ovseg_jax
from ovseg_jax.errors import UserError
from ovseg_jax.main import main
from ovseg_jax.segmentation.benchmarks import make_benchmark
from ovseg_jax.segmentation.evaluate import count_pixels
from ovseg_jax.segmentation.evaluate_model import evaluate_model

# The tiny model's sizes, for protocols whose own are for real ones.
SMALL = tuple(
    (f"eval.protocol.{field}", "16") for field in ("short_side", "window", "stride", "long_limit")
)


def own_folder(root, sizes=((40, 56), (20, 20), (33, 64))):
    """Three images of own classes, background among them."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number, (h, w) in enumerate(sizes):
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
        image.save(root / "images" / f"photo{number}.png")
        labels = rng.integers(0, 3, (h, w)).astype(np.uint8)
        labels[:3] = 255
        Image.fromarray(labels).save(root / "masks" / f"photo{number}.png")
    (root / "classes.txt").write_text("background\ncat\ndog|bird\n")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder with all that --data_dir may hold."""
    root = tmp_path_factory.mktemp("data")
    mini.voc(root)
    mini.ade20k(root)
    mini.context_png(root / "VOCdevkit" / "VOC2010")
    own_folder(root)
    return root


@pytest.mark.parametrize("words", [9, 30])
def test_an_own_folder_is_labeled_as_predict_labels_it(directory, folders, tmp_path, words):
    options = {"overrides": (("eval.protocol.competing_words", "30"),) * (words == 30)}
    options["data_dir"] = str(folders)
    result = evaluate_model(str(directory), ("folder",), tmp_path, **options)["folder"]
    model = ovseg_jax.load(directory, **{"competing_words": 30} if words == 30 else {})
    confusion = np.zeros((3, 3), int)
    for path in sorted((folders / "images").iterdir()):
        found = model.segment(path, ["cat", "dog|bird"])
        truth = np.asarray(Image.open(folders / "masks" / path.name))
        confusion += count_pixels(found.labels, truth, 3)
    np.testing.assert_array_equal(result["confusion"], confusion)
    competing = sum(line.count("|") + 1 for line in result["protocol"]["words"])
    assert competing == words == 3 + len(found.competitors)


def test_several_benchmarks_of_one_folder(directory, folders, tmp_path):
    names = ("voc", "voc20", "voc_zss", "context", "context59", "ade20k", "folder", "voc")
    found = evaluate_model(str(directory), names, tmp_path, data_dir=str(folders), overrides=SMALL)
    assert tuple(found) == names[:-1]
    labels = {name: len(result["iou"]) for name, result in found.items()}
    assert labels == {
        "voc": 21, "voc20": 20, "voc_zss": 5, "context": 60, "context59": 59, "ade20k": 150,
        "folder": 3,
    }  # fmt: skip
    for name, result in found.items():
        assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(result))
        assert result["protocol"]["classes"] == labels[name] - result["protocol"]["background"]
    voc, alone = found["voc"], found["voc20"]
    assert voc["data"]["images_expected"] == 1449 and voc["images"] == 2
    assert (voc["entities"]["seen"], voc["entities"]["in_paper"]) == (20, (20, 0))
    assert voc["zss"]["classes"] == ["plant", "sheep", "sofa", "train", "monitor"]
    counts, without = np.array(voc["confusion"]), np.array(alone["confusion"])
    # Ignored pixels and background do not count without background; the others all do.
    np.testing.assert_array_equal(counts[1:].sum(1), without.sum(1))
    only = np.array(found["voc_zss"]["confusion"])
    np.testing.assert_array_equal(only.sum(1), counts[[16, 17, 18, 19, 20]].sum(1))
    assert found["folder"]["protocol"]["words"][:2] == ["cat", "dog|bird"]
    file = found["folder"]["protocol"]["class_names_file"]
    content = (folders / "classes.txt").read_bytes()
    assert file == {"file": "classes.txt", "sha256": hashlib.sha256(content).hexdigest()[:12]}
    assert found["voc_zss"]["protocol"]["class_names_file"] == voc["protocol"]["class_names_file"]
    assert found["ade20k"]["entities"]["in_paper"] == (31, 119)
    usage = voc["group_usage"]
    assert usage["groups"] == 4 and 1 <= usage["used"] <= 4 and 0 <= usage["entropy"] <= 1


@pytest.mark.parametrize("name", ["released", "tcl", "sclip"])
def test_named_protocols(directory, folders, tmp_path, name):
    options = {"data_dir": str(folders), "protocol_name": name, "overrides": SMALL}
    result = evaluate_model(str(directory), ("voc",), tmp_path, **options)["voc"]
    assert result["protocol"]["name"] == name and not result["protocol"]["as_named"]
    assert result["protocol"]["notes"]["source"]
    # However high a threshold is that is lowered to the highest probability: something is found.
    capped = result["protocol"]["cap_threshold"]
    assert not capped or np.array(result["confusion"]).sum(0)[1:].sum() > 0


def test_threshold_of_a_training_split(directory, folders, tmp_path):
    base = folders / "VOCdevkit" / "VOC2012"
    mini.write_image(base / "JPEGImages" / "2008_000001.jpg", 5)
    values = mini.values_of([0, 1, 2, 255], 5)
    mini.write_mask(base / "SegmentationClass" / "2008_000001.png", values, palette=True)
    mini.write_text(base / "ImageSets" / "Segmentation" / "train.txt", "2008_000001")
    options = {"data_dir": str(folders), "overrides": SMALL, "sweep": 3}
    found = evaluate_model(str(directory), ("voc", "ade20k"), tmp_path, **options)
    sweep = found["voc"]["threshold_sweep"]
    assert (sweep["images"], sweep["data"]["split"]) == (1, "train")
    assert found["voc"]["data"]["split"] == "validation"
    assert sweep["data"]["images_expected"] is None
    # The protocol's own is among them, and stays where none is better.
    assert sweep["thresholds"] == sorted(sweep["thresholds"])
    scores = dict(zip(sweep["thresholds"], sweep["miou"], strict=True))
    best = 0.12 if scores[0.12] == max(scores.values()) else max(scores, key=scores.get)
    assert found["voc"]["protocol"]["threshold"] == best
    assert "threshold_sweep" not in found["ade20k"]
    with pytest.raises(UserError, match="folder has no training split"):
        evaluate_model(str(directory), ("folder",), tmp_path, **options)
    with pytest.raises(UserError, match="none of the benchmarks .ade20k, voc20. has a background"):
        evaluate_model(str(directory), ("ade20k", "voc20"), tmp_path, **options)
    # Never on images that are reported.
    mini.write_text(base / "ImageSets" / "Segmentation" / "train.txt", "2008_000001", "2007_000042")
    with pytest.raises(UserError, match="1 images are in the lists of both .* such as 2007_000042"):
        evaluate_model(str(directory), ("voc",), tmp_path, **options)
    options["overrides"] = (*SMALL, ("eval.scenes.split", "tune"), ("eval.scenes.count", "2"))
    with pytest.raises(UserError, match="its tune split is to be reported"):
        evaluate_model(str(directory), ("scenes",), tmp_path, **options)


REFUSED = {
    "unknown config key 'model.image.width'": ("model.image.width", "8"),
    "unknown config key 'eval.ade20k.count'": ("eval.ade20k.count", "1"),
    "eval.voc.count": ("eval.voc.cuont", "8"),
    "thresholds.voc": ("eval.protocol.threshold", "0.5"),
    "per_benchmark.voc.scale": ("eval.protocol.scale", "3.0"),
    "must be from 0 to 1": ("eval.protocol.thresholds.voc", "1.5"),
    "at least 1": ("eval.batch_size", "-1"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_settings_that_do_not_apply_are_refused(directory, folders, tmp_path, said):
    protocol = "sclip" if said.startswith("per_benchmark") else "released"
    options = {"data_dir": str(folders), "protocol_name": protocol, "overrides": (REFUSED[said],)}
    with pytest.raises(UserError, match=said):
        evaluate_model(str(directory), ("voc",), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(directory, folders, tmp_path, monkeypatch, capsys):
    """Told before the work; and where it shows only afterwards, the result is printed first."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        evaluate_model(str(directory), ("folder",), tmp_path / "file", data_dir=str(folders))

    def full_disk(path, content):
        raise UserError("no room")

    monkeypatch.setattr("ovseg_jax.segmentation.evaluate.replace_file", full_disk)
    call = ["--mode=eval", f"--model={directory}", f"--workdir={tmp_path}", "--benchmark=folder"]
    with pytest.raises(UserError, match="no room"):
        main([*call, f"--data_dir={folders}"])
    assert "folder " in capsys.readouterr().out


def test_unknown_names_and_missing_folders_before_any_compute(directory, tmp_path):
    for names, options, said in (
        (("vox",), {}, "did you mean 'voc'"),
        (("voc",), {"protocol_name": "x"}, "unknown protocol"),
        (("scenes", "voc"), {"data_dir": str(tmp_path)}, "lacks JPEGImages"),
        (("scenes", "voc"), {}, "needs its official folder"),
        ((), {}, "no benchmark named"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate_model(str(directory), names, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    # Names first: no weights are read for a benchmark that does not exist.
    with pytest.raises(UserError, match="did you mean 'retrieval'"):
        evaluate_model("no model", ("retrival",), tmp_path / "out")


def classes(text):
    return lambda root: (root / "classes.txt").write_text(text)


BROKEN = {
    "do not count up from 0": classes("1: cat\n2: dog\n3: bird\n"),
    "add 'background'": classes("cat\n"),
    "listed twice": classes("cat\ndog\ncat\n"),
    "room for 254": classes("\n".join(map(str, range(500)))),
    "classes.txt cannot be read": lambda root: (root / "classes.txt").unlink(),
    "holds no .png": lambda root: [path.unlink() for path in (root / "masks").iterdir()],
    "1 masks have no image": lambda root: (root / "images" / "photo1.png").unlink(),
    "have one name": lambda root: (root / "images" / "photo1.jpg").write_bytes(b"x"),
    "have one name: remove": lambda root: shutil.copy(
        root / "masks" / "photo1.png", root / "masks" / "photo1.PNG"
    ),
    "none of 3 masks has the value 0": lambda root: [
        Image.new("L", size, 1).save(root / "masks" / f"photo{number}.png")
        for number, size in enumerate(((56, 40), (20, 20), (64, 33)))
    ],
    "no folder masks": lambda root: (root / "masks").rename(root / "mask"),
}


@pytest.mark.parametrize("said", BROKEN)
def test_own_folder_that_is_incomplete(tmp_path, said):
    root = own_folder(tmp_path / "own")
    assert len(make_benchmark("folder", {"dir": str(root)})) == 3
    BROKEN[said](root)
    with pytest.raises(UserError, match=said):
        make_benchmark("folder", {"dir": str(root)})


def gray_of_2_bits(labels):
    """A PNG with four labels in a byte; Pillow reads them, but writes none."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    four = labels.reshape(len(labels), -1, 4)
    rows = (four << np.array([6, 4, 2, 0], np.uint8)).sum(-1).astype(np.uint8)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", labels.shape[1], len(labels), 2, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def test_own_masks_that_are_no_masks(tmp_path):
    root = own_folder(tmp_path / "own")
    mask = root / "masks" / "photo0.png"

    def read():
        return make_benchmark("folder", {"dir": str(root), "count": 1})[0]

    good = read()[1]
    palette = Image.fromarray(good)
    palette.putpalette([7] * 768)
    palette.save(mask)
    np.testing.assert_array_equal(read()[1], good)
    Image.fromarray(good == 1).save(mask)  # one bit a pixel
    np.testing.assert_array_equal(read()[1], good == 1)
    mask.write_bytes(gray_of_2_bits(good % 2))
    np.testing.assert_array_equal(read()[1], good % 2)
    for image, said in (
        (Image.fromarray(np.zeros((40, 56, 3), np.uint8)), "RGB pixels: save labels as gray"),
        (Image.fromarray(np.zeros((40, 55), np.uint8)), "56x40 pixels but its mask 55x40"),
        (Image.fromarray(np.full((40, 56), 3, np.uint8)), "the label 3, but classes.txt has 3"),
        (Image.fromarray(np.zeros((40, 56), np.uint8)), "the masks have no class, only 0:"),
        (Image.fromarray(255 * (good == 1).astype(np.uint8)), "only 0 and 255: .* 255 is ignored"),
    ):
        image.save(mask)
        with pytest.raises(UserError, match=said):
            read()
    mask.write_bytes(b"no mask")
    with pytest.raises(UserError, match="1 of 1 masks cannot be used: .*photo0.png"):
        read()

    # Photographs are turned upright; a mask that was not is told, with the reason.
    root = own_folder(tmp_path / "turned")
    path = root / "images" / "photo0.png"
    photo = Image.open(path)
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(path, exif=exif)
    with pytest.raises(UserError, match="40x56 pixels, turned upright by its EXIF tag, but"):
        make_benchmark("folder", {"dir": str(root)})
    mask = root / "masks" / "photo0.png"
    Image.open(mask).transpose(Image.Transpose.ROTATE_270).save(mask)
    image, labels = make_benchmark("folder", {"dir": str(root)})[0]
    assert image.shape[:2] == labels.shape == (56, 40)


def test_what_of_a_folder_was_not_used(tmp_path):
    root = own_folder(tmp_path / "own")
    (root / "images" / "photo9.jpg").write_bytes(b"never read")
    for name in ("images/photo1.json", "masks/.kept", "masks/photo1.txt", "images/._photo1.png"):
        (root / name).write_text("no image")
    (root / "masks" / "photo0.png").rename(root / "masks" / "photo0.PNG")
    benchmark = make_benchmark("folder", {"dir": str(root)})
    described = benchmark.describe()
    assert described["images_without_mask"] == 1 and described["whole"] and len(benchmark) == 3
    assert described["passed_over"] == ["photo1.json", ".kept", "photo1.txt"]
    assert not make_benchmark("folder", {"dir": str(root), "count": 2}).describe()["whole"]
