"""What predict may be given, and what it writes."""

import functools
import io
import json
import shlex
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as codec

import ovseg_jax
from ovseg_jax import flags, predict
from ovseg_jax.errors import UserError
from ovseg_jax.predict import pictures, result_names, run_lengths

RNG = np.random.default_rng(0)


def write(path, size=(24, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_gif(path, frames=5):
    images = [Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)) for i in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)


def find_pictures(*given, lines=""):
    return predict.find_pictures(given, io.StringIO(lines))[0]


def test_files_folders_globs_and_lists(tmp_path):
    for name in ("b.png", "a.jpg", "deep/c.png"):
        write(tmp_path / name)
    for name in ("deep/d.txt", "notes.txt"):
        (tmp_path / name).write_text("no picture")

    def names(found):
        return [path.removeprefix(f"{tmp_path}/") for path in found]

    assert names(find_pictures(str(tmp_path))) == ["a.jpg", "b.png"]
    assert names(find_pictures(f"{tmp_path}/*.p*g")) == ["b.png"]
    deep = find_pictures(f"{tmp_path}/**/*.png")
    assert names(deep) == ["b.png", "deep/c.png"]
    assert find_pictures("-", lines=f"{tmp_path}/b.png\n\n{tmp_path}/deep\n") == deep
    # A file whose name looks like a pattern is itself.
    write(tmp_path / "odd[1].png")
    assert names(find_pictures(f"{tmp_path}/odd[1].png")) == ["odd[1].png"]
    assert [picture.name for picture in pictures(deep)] == ["b", "c"]


def test_bad_arguments(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for given, said in (
        ([], "is empty"),
        (["-"], "is empty"),
        ([f"{tmp_path}/none.png"], "does not exist"),
        (["https://example.org/a.png"], "is an address: download the file"),
        ([f"{tmp_path}/*.bmp"], "no file matches"),
        ([f"{tmp_path}/empty"], "holds no image .* or video$"),
        ([f"{tmp_path}/outer"], "folders inside it are searched only by a pattern .*/outer/"),
    ):
        with pytest.raises(UserError, match=said):
            find_pictures(*given)


def test_names_that_tell_files_apart():
    def names(*sources):
        return list(result_names(sources).values())

    assert names("x/a.jpg", "x/b.png", "a.png.tif") == ["a", "b", "a.png"]
    assert names("x/a.jpg", "y/a.jpg", "y/b.jpg") == ["x_a", "y_a", "b"]
    assert names("a.jpg", "a.png", "x/a.png") == ["a_jpg", "a_png", "x_a"]
    assert names("/q/x/a.jpg", "/r/x/a.jpg") == ["q_x_a_jpg", "r_x_a_jpg"]
    assert names("x/a.jpg", "y/a.jpg", "x_a.png") == ["x_a_jpg", "y_a", "x_a"]
    with pytest.raises(UserError, match="x/a.jpg would have the names of others"):
        names("x/a.jpg", "x_a.jpg", "y/a.jpg", "x_a_jpg")


def test_frames_of_animations(tmp_path):
    write_gif(tmp_path / "v.gif")
    found = list(pictures([str(tmp_path / "v.gif")], every=2))
    assert [picture.name for picture in found] == ["v_000000", "v_000002", "v_000004"]
    for picture, gray in zip(found, (0, 80, 160), strict=True):
        assert np.abs(picture.image.astype(int) - gray).max() <= 4
    (tmp_path / "bad.gif").write_bytes(b"no animation")
    (broken,) = pictures([str(tmp_path / "bad.gif")])
    assert "cannot be read as an image" in str(broken.image)
    frames = [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(3)]
    for suffix in ("png", "webp", "tif"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        read = [p.image.mean() for p in pictures([str(tmp_path / f"a.{suffix}")])]
        np.testing.assert_allclose(read, (0, 40, 80), atol=3)
    # The range that the file tells holds for all pages.
    bright = [Image.fromarray(np.full((8, 8), x, np.float32)) for x in (1.0, 4.0)]
    bright[0].save(tmp_path / "f.tif", save_all=True, append_images=bright[1:], tiffinfo={341: 4.0})
    assert [p.image.max() for p in pictures([str(tmp_path / "f.tif")])] == [64, 255]
    frames[1].save(tmp_path / "one.gif")
    assert [p.name for p in pictures([str(tmp_path / "one.gif")])] == ["one"]


def test_run_lengths_are_those_of_coco():
    for seed in range(5):
        labels = np.random.default_rng(seed).integers(0, 2 + seed, (7, 11))
        lengths = run_lengths(labels)
        assert set(lengths) == set(np.unique(labels)) - {0}
        for label, found in lengths.items():
            encoded = codec.frPyObjects(found, *found["size"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools' arrays
                np.testing.assert_array_equal(codec.decode(encoded), labels == label)
    assert run_lengths(np.ones((2, 2), int))[1]["counts"] == [0, 4]


# ---- the command, with a model that is loaded once


LOAD = functools.cache(ovseg_jax.load)


@pytest.fixture
def call(directory, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ovseg_jax, "load", LOAD)

    def run(*arguments):
        out = tmp_path / "out"
        monkeypatch.setattr(predict, "enable_compilation_cache", lambda: None)
        argv = ["predict", f"--model={directory}", f"--out={out}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            flags.run(predict.main)
        captured = capsys.readouterr()
        return stop.value.code, out, captured.out, captured.err

    return run


def test_every_format_and_a_failure_among_others(call, tmp_path):
    photos = tmp_path / "photos"
    write(photos / "a.png", (24, 40))
    write(photos / "z.png", (70, 33))
    (photos / "bad.png").write_text("no image")
    write_gif(photos / "v.gif", frames=2)
    code, out, said, error = call(
        f"--images={photos}",
        "--classes=cat|kitten,dog",
        "--formats=png,overlay,json,npz,rle",
        "--background=0.0",
        "--words=2",
    )
    assert code == 1 and "bad.png cannot be read as an image" in error
    assert "1 of 5 images failed" in error and len(said.splitlines()) == 4
    stems = ("a", "z", "v_000000", "v_000001")
    suffixes = ("mask.png", "overlay.png", "json", "npz", "rle.json")
    assert {path.name for path in out.iterdir()} == {f"{a}.{b}" for a in stems for b in suffixes}
    with np.load(out / "z.npz") as arrays, Image.open(out / "z.mask.png") as mask:
        labels = arrays["labels"]
        np.testing.assert_array_equal(labels, np.asarray(mask))
        assert labels.shape == arrays["groups"].shape == (70, 33)
        assert arrays["classes"].tolist() == ["cat", "dog"]
    entries = json.loads((out / "z.rle.json").read_text())
    assert {entry["category"] for entry in entries} <= {"cat", "dog"} and entries
    area = sum(sum(entry["segmentation"]["counts"][1::2]) for entry in entries)
    assert area == (labels > 0).sum()


@pytest.mark.parametrize("background", ["none", "wall,sky,grass,car,tree,floor,person"])
def test_kinds_of_background(call, tmp_path, background):
    write(tmp_path / "a.png", (40, 70))
    options = ("--formats=npz", "--pamr=1")
    more = (f"--background={background}", *options)
    code, out, _, error = call(f"--images={tmp_path}/a.png", "--classes=cat,dog", *more)
    assert code == 0, error
    with np.load(out / "a.npz") as arrays:
        assert (arrays["labels"] == 0).any() == (background != "none")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--classes=cat", "--vocabulary=voc"), "exactly one"),
        (("--classes=cat", "--background=1.5"), "from 0 to 1"),
        (("--classes=cat", "--background=cat"), "twice"),
        (("--classes=cat", "--background=,"), "threshold, 'none', or words"),
        (
            ("--classes=cat", "--formats=rle.json,png"),
            "--formats: there is no format rle.json; the formats are png, overlay, json, npz, rle",
        ),
        (("--classes=cat", "--batch_size=-1"), "at least 0"),
        (("--classes=cat", "--every=0"), "at least 1"),
        (("--classes=cat", "--background=50%"), "'50%' is no word"),
        (("--classes=cat", "--background=0_1"), "'0_1' is no word"),
        (("--classes=cat", "--background=none,"), "'none' is no word"),
        (("--classes=cat", "--background=off"), "'off' is no word"),
        (("--classes=cat", "--background=1/2"), "'1/2' is no word"),
        (("--classes=caf\udce9",), "no text in UTF-8"),
        (("--vocabulary=ade20",), "cityscapes; did you mean 'ade20k'?\n"),
        (("--classes=cat", "--model=photo"), "brings photos; did you mean 'photos'?"),
        (("--classes=" + ",".join(map(str, range(256))),), "256 classes do not fit"),
        (("--classes=cat", "--formats="), "--formats: no format is named; the formats are png"),
    ],
)
def test_mistakes(call, tmp_path, arguments, said):
    write(tmp_path / "a.png")
    code, out, _, error = call(f"--images={tmp_path}/a.png", *arguments)
    assert code == 2 and said in error and error.startswith("error: ")


def test_what_was_found_is_said_and_how(call, tmp_path):
    write(tmp_path / "x" / "a.png", (30, 40))
    write(tmp_path / "y" / "a.png", (30, 40))
    more = ("--classes=cat,dog", "--formats=json,overlay")
    both = f"--images={tmp_path}/x,{tmp_path}/y"
    code, out, said, error = call(both, *more, "--background=1.0")
    assert code == 0 and said.count("all background (best: ") == 2
    assert "nothing was found in 2 of 2 images" in error
    assert {path.name for path in out.glob("*.json")} == {"x_a.json", "y_a.json"}
    entry = json.loads((out / "x_a.json").read_text())
    assert entry["protocol"]["threshold"] == 1.0 and entry["background"] == 1.0
    assert len(entry["competitors"]) == 7 and "sky" in entry["competitors"]
    code, _, _, error = call(both, *more, "--background=none")
    assert code == 2 and "x_a.json is there already" in error and "--overwrite" in error
    code, out, said, error = call(both, *more, "--background=none", "--overwrite")
    assert code == 0 and " % -> " in said and said.strip().endswith("y_a.overlay.png")
    assert "nothing was found" not in error
    entry = json.loads((out / "x_a.json").read_text())
    assert entry["protocol"]["threshold"] is None and entry["competitors"] == []


def test_nothing_is_overwritten_in_one_run(call, tmp_path):
    write_gif(tmp_path / "v.gif", frames=2)
    write(tmp_path / "v_000001.png")
    code, _, said, error = call(f"--images={tmp_path}", "--classes=cat", "--formats=json")
    assert code == 1 and "v_000001.png would overwrite the result of" in error
    assert len(said.splitlines()) == 2


def test_videos_are_turned_upright(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(-90)  # to be turned clockwise
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:12] = 255
        for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
            container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    (picture,) = pictures([str(path)])
    frame = picture.image
    assert frame.shape == (64, 48, 3)
    assert frame[:, 40:].mean() > 200 and frame[:, :30].mean() < 50  # the top came to the right
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (broken,) = pictures([str(tmp_path / "bad.mp4")])
    assert "cannot be read as a video" in str(broken.image)
    monkeypatch.setitem(sys.modules, "av", None)
    (missing,) = pictures([str(path)])
    assert "ovseg_jax[video]" in str(missing.image)


# ---- nothing silent


def test_names_on_the_command_line_and_in_files(call, tmp_path):
    write(tmp_path / "a.png", (16, 16))
    words = tmp_path / "words.txt"
    words.write_bytes(b"\xef\xbb\xbf# animals\n\n0: cat\n1: dog\\, brown\n")
    for given in ("--classes=cat\ndog\\, brown\n", f"--vocabulary={words}"):
        more = ("--formats=json", "--overwrite")
        code, out, _, error = call(f"--images={tmp_path}/a.png", given, *more)
        entry = json.loads((out / "a.json").read_text())
        assert code == 0 and [row["name"] for row in entry["classes"]] == ["cat", "dog, brown"]


def test_the_files_of_the_user_are_kept(call, tmp_path):
    photos = tmp_path / "photos"
    write(photos / "a.jpg", (16, 16))
    (photos / "a.json").write_text("my annotation")
    where = (f"--images={photos}/a.jpg", f"--out={photos}", "--classes=cat")
    for more in ((), ("--overwrite",)):
        code, *_, error = call(*where, *more)
        assert code == 2 and "a.json is there and is no result of predict" in error
    assert {p.name for p in photos.iterdir()} == {"a.jpg", "a.json"}
    every = ("--formats=png,overlay,npz,rle", "--background=1.0")
    assert call(*where, *every)[0] == 0
    assert call(*where, *every)[0] == 2
    assert call(*where, *every, "--overwrite")[0] == 0
    assert (photos / "a.json").read_text() == "my annotation"


def test_one_bad_name_does_not_end_the_others(call, tmp_path):
    photos = tmp_path / "photos"
    pixels = write(photos / "z.png", (16, 16))
    for name in ("x" * 251 + ".png", "caf\udce9.png", "new\nline.jfif", "b.avif", "._z.png"):
        Image.fromarray(pixels).save(
            photos / "made.png", name.rpartition(".")[2].replace("jfif", "jpeg")
        )
        (photos / "made.png").rename(photos / name)
    (photos / ".DS_Store").write_bytes(b"x")
    (photos / "notes.txt").write_text("no image")
    code, out, said, error = call(f"--images={photos}", "--classes=cat", "--formats=json")
    assert code == 1 and "passed over, as no image: " in error and "notes.txt" in error
    assert "File name too long" in error and "1 of 5 images failed" in error
    assert "DS_Store" not in error and r"caf\udce9.png" in said and r"new\nline.jfif" in said
    assert len(list(out.iterdir())) == len(said.splitlines()) == 4


def test_a_place_that_cannot_be_written_is_told_before_the_work(call, tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        given = (f"--images={tmp_path}/a.png", f"--out={tmp_path}/{place}", "--model=none")
        code, *_, error = call(*given, "--classes=cat")
        assert code == 2 and f"{tmp_path}/file is a file; a folder is needed" in error


def test_a_picture_that_fails_leaves_nothing(call, full_disk, tmp_path):
    """Its mask fits on the disk, its overlay does not; or only the mask's name is short enough."""
    write(tmp_path / "a.png", (16, 16))
    write(tmp_path / f"{'x' * 245}.png", (16, 16))
    code, out, _, error = call(
        f"--images={tmp_path}", "--classes=cat", "--formats=png,overlay", "--background=none"
    )
    assert code == 1 and "x.overlay.png cannot be written: File name too long" in error
    assert {path.name for path in out.iterdir()} == {"a.mask.png", "a.overlay.png"}
    write(tmp_path / "a.png", (150, 200))
    again = (f"--images={tmp_path}/a.png", "--classes=cat", "--formats=npz,overlay")
    with full_disk(90_000):  # room for the check before the work
        code, _, _, error = call(*again, f"--out={tmp_path}/full")
    assert code == 1 and "a.overlay.png cannot be written: File too large" in error
    assert not list((tmp_path / "full").iterdir())


PRINTS = "from ovseg_jax import flags; flags.run(lambda argv: print('x' * 10**6))"
INTERRUPTED = "import sys; sys.argv = ['-m']; import ovseg_jax; raise KeyboardInterrupt"


def test_a_broken_pipe_and_ctrl_c_while_importing_are_no_tracebacks():
    command = f"{shlex.join([sys.executable, '-c', PRINTS])} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -2 and done.stderr == "interrupted\n"
