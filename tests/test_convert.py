"""Conversion on the command line: released weights there and back to the bit, towers, errors.

The checkpoint is the released code's own: `tests/released/dev2_weights*.npz`.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ovseg_jax import convert, flags
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.protocol import named_protocol
from ovseg_jax.weights import groupvit
from ovseg_jax.weights.groupvit import groupvit_config
from ovseg_jax.weights.model_dir import load_model
from ovseg_jax.weights.pth import WRITERS, read_checkpoint, write_torch
from ovseg_jax.weights.released import released_config

torch = pytest.importorskip("torch", reason="the extra convert is not installed")

ROOT = Path(__file__).parents[1]
RELEASED = ROOT / "tests" / "released"
META = json.loads((RELEASED / "dev2_meta.json").read_text())["config"]
HEADS = [
    f"--heads={META['img']['num_heads'][0]},{META['img']['num_heads'][1]}",
    f"--text_heads={META['bert']['num_attention_heads']}",
]
# Constants that BERT's own checkpoints hold; the released code carries them along.
IDS = {"text_encoder.transformer.embeddings.position_ids": np.arange(5)[None]}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "."]


@pytest.fixture(scope="module")
def tensors():
    """Online and averaged weights of the released model, and what it stores beside them."""
    names = ("dev2_weights", "dev2_weights_momentum")
    return {k: x for n in names for k, x in np.load(RELEASED / f"{n}.npz").items()} | IDS


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    """The checkpoint in every form that is read."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_torch(folder / "bare.pth", tensors)
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    write_torch(folder / "wrapped.pth", wrapped)
    enter(folder / "wrapped.pth", "model")
    np.savez(folder / "arrays.npz", **tensors)
    save_file(wrapped, folder / "tensors.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(files, tmp_path_factory):
    """A model directory, converted once."""
    folder = tmp_path_factory.mktemp("model") / "m"
    run("released", f"--checkpoint={files / 'bare.pth'}", f"--out={folder}", *HEADS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def enter(path, entry):
    """Puts a saved state dict into an entry, as training programs do."""
    torch.save({entry: torch.load(path, weights_only=True)}, path)


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def assert_same(found, tensors):
    assert found.keys() == tensors.keys()
    for key, wanted in tensors.items():
        assert (found[key].shape, found[key].dtype) == (wanted.shape, wanted.dtype), key
        assert found[key].tobytes() == wanted.tobytes(), key


NAMES = ["bare.pth", "wrapped.pth", "arrays.npz", "tensors.safetensors"]


@pytest.mark.parametrize(("name", "form"), list(zip(NAMES, ["pth", *WRITERS], strict=True)))
def test_released_there_and_back_is_exact_to_the_bit(name, form, files, tensors, tmp_path, capsys):
    model, back = tmp_path / "model", tmp_path / f"back.{form}"
    assert run("released", f"--checkpoint={files / name}", f"--out={model}", *HEADS) == 0
    said = capsys.readouterr().out
    assert f"{len(tensors)} tensors read" in said and "logit_scale_mask" in said
    assert "no tokenizer" in said and "with a moving average" in said
    assert run("released", f"--model={model}", f"--to={form}", f"--out={back}") == 0
    assert_same(read_checkpoint(back).tensors, tensors)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_the_model_directory_says(files, tensors, tokenizer, tmp_path):
    arguments = ["--background_threshold=0.4", "--text_length=9", f"--tokenizer={tokenizer}"]
    checkpoint = files / "wrapped.pth"
    run("released", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'm'}", *HEADS, *arguments)
    saved = load_model(tmp_path / "m")
    settings = {"heads": META["img"]["num_heads"][0], "second_heads": META["img"]["num_heads"][1]}
    settings["text_heads"] = META["bert"]["num_attention_heads"]
    assert saved.info["model"] == json.loads(json.dumps(released_config(tensors, **settings)))
    assert saved.info["protocol"]["threshold"] == 0.4
    assert saved.info["protocol"]["thresholds"] == {}  # it holds for every benchmark
    assert saved.info["protocol"]["grouping"] == "one_group"
    assert saved.info["text_length"] == 9
    provenance = saved.info["provenance"]
    assert provenance["converted_from"] == "wrapped.pth" and provenance["entry"] == "model"
    assert len(provenance["sha256"]) == 64
    assert set(IDS) < set(provenance["kept_unused"]) and provenance["dropped"] == []
    assert saved.tokenizer.encode(["a cat."], 6).tolist() == [[2, 5, 8, 10, 3, 0]]
    assert saved.extras["teacher/norm/scale"].shape == (saved.info["model"]["image"]["width"],)


@pytest.mark.parametrize("names", ["original", "transformers"])
def test_groupvit_there_and_back_is_exact_to_the_bit(names, tmp_path, capsys):
    arrays = dict(np.load(ROOT / "tests" / "groupvit" / "tiny.npz"))
    tensors = {k.removeprefix("weights/"): x for k, x in arrays.items() if "weights/" in k}
    if names == "original":
        config = groupvit_config(tensors, heads=4, text_heads=4)
        read = groupvit.from_groupvit(tensors, config)
        tensors = groupvit.to_groupvit(*read, config, names)
        tensors["multi_label_logit_scale"] = np.float32(2.5) * np.ones((), np.float32)
    else:
        tensors["text_model.embeddings.position_ids"] = np.arange(7)[None]
    write_torch(tmp_path / "a.pth", {f"module.{k}": x for k, x in tensors.items()})
    enter(tmp_path / "a.pth", "model")
    arguments = [f"--checkpoint={tmp_path / 'a.pth'}", "--heads=4", "--text_heads=4"]
    assert run("groupvit", *arguments, f"--out={tmp_path / 'm'}") == 0
    assert "1 of them are not used" in capsys.readouterr().out
    saved = load_model(tmp_path / "m")
    assert saved.info["model"]["text"]["heads"] == 4 and saved.info["model"]["decoder"] is None
    assert saved.info["protocol"]["thresholds"] == named_protocol("groupvit").thresholds
    assert run("groupvit", f"--model={tmp_path / 'm'}", f"--out={tmp_path / 'b.pth'}") == 0
    assert_same(read_checkpoint(tmp_path / "b.pth").tensors, tensors)
    with pytest.raises(UserError, match="only a model of the released form"):
        run("released", f"--model={tmp_path / 'm'}", f"--out={tmp_path / 'c.pth'}")


# ---- towers


def tower(prefix, *names):
    rng = np.random.default_rng(0)
    return {f"{prefix}{name}": rng.normal(size=(4, 3)).astype(np.float32) for name in names}


def test_dino(tmp_path, capsys):
    weights = tower("backbone.", "patch_embed.proj.weight", "norm.bias") | {
        "backbone.cls_token": np.ones((1, 1, 4), ml_dtypes.bfloat16) * 1.5
    }
    write_torch(tmp_path / "dino.pth", {f"module.{k}": v for k, v in weights.items()})
    enter(tmp_path / "dino.pth", "teacher")
    out = tmp_path / "weights"
    assert run("dino", f"--checkpoint={tmp_path / 'dino.pth'}", f"--out={out}") == 0
    assert str(out / "model.safetensors") in capsys.readouterr().out
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float32))
        assert found[name].dtype == np.float32


def test_bert_takes_its_tokenizer_along(tmp_path):
    source, out = tmp_path / "bert-base", tmp_path / "out"
    source.mkdir()
    weights = tower("bert.", "embeddings.word_embeddings.weight")
    write_torch(source / "pytorch_model.bin", weights)
    for name in ("vocab.txt", "config.json", "unrelated.txt"):
        (source / name).write_text(name)
    assert run("bert", f"--checkpoint={source}", f"--out={out}") == 0
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "vocab.txt", "config.json")
    }
    one = tmp_path / "one.safetensors"
    assert run("bert", f"--checkpoint={source / 'pytorch_model.bin'}", f"--out={one}") == 0
    assert one.read_bytes() == (out / "model.safetensors").read_bytes()
    np.testing.assert_array_equal(load_file(one)[next(iter(weights))], next(iter(weights.values())))


# ---- errors


@pytest.mark.parametrize("room", [200, 20_000])
@pytest.mark.parametrize("form", ["directory", "tower", *WRITERS])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    form, room, files, model, tmp_path, full_disk
):
    checkpoint = f"--checkpoint={files / 'bare.pth'}"
    out = tmp_path / "out"
    arguments = ["released", checkpoint, f"--out={out}", *HEADS]
    if form in WRITERS:
        arguments = ["released", f"--model={model}", f"--to={form}", f"--out={out}"]
    elif form == "tower":
        arguments = ["dino", checkpoint, f"--out={out}.safetensors"]
    with full_disk(room), pytest.raises(UserError, match="cannot be written: ") as error:
        run(*arguments)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_what_is_at_the_place_for_a_model_is_kept(files, tmp_path):
    arguments = ["released", f"--checkpoint={files / 'bare.pth'}", *HEADS]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file cannot be written: Not a directory"):
        run(*arguments, f"--out={tmp_path / 'file'}")
    with pytest.raises(UserError, match="a folder with other files, file for example"):
        run(*arguments, f"--out={tmp_path}")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]
    with pytest.raises(UserError, match="cannot be written"):
        run("dino", arguments[1], f"--out={tmp_path / 'file'}")
    (tmp_path / "m").mkdir()  # an empty folder may be filled
    run(*arguments, f"--out={tmp_path / 'm'}")
    load_model(tmp_path / "m")


@pytest.mark.parametrize("form", ["directory", "tower", *WRITERS])
def test_only_an_earlier_result_is_replaced_and_only_on_request(form, files, model, tmp_path):
    out = tmp_path / "out"
    arguments = ["released", f"--checkpoint={files / 'bare.pth'}", *HEADS]
    foreign = out / "model.safetensors"
    if form in WRITERS:
        arguments = ["released", f"--model={model}", f"--to={form}"]
        out = foreign = tmp_path / f"out.{form}"
    elif form == "tower":
        (tmp_path / "source").mkdir()
        shutil.copy(files / "bare.pth", tmp_path / "source" / "pytorch_model.bin")
        (tmp_path / "source" / "vocab.txt").write_text("a")
        arguments = ["dino", f"--checkpoint={tmp_path / 'source'}"]
    run(*arguments, f"--out={out}")
    with pytest.raises(UserError, match="there already: choose another --out, or add --overwrite"):
        run(*arguments, f"--out={out}")
    before = foreign.read_bytes()
    run(*arguments, f"--out={out}", "--overwrite")
    assert foreign.read_bytes() == before
    if form == "directory":
        (out / "config.json").write_text('{"format": "ovseg_jax model", "provenance": {}}')
    elif form == "tower":
        (out / "vocab.txt").write_text("mine")
        with pytest.raises(UserError, match="vocab.txt is there and is not"):
            run(*arguments, f"--out={out}", "--overwrite")
        assert (out / "vocab.txt").read_text() == "mine"
    if form != "directory":
        save_file({"mine": np.zeros(3)}, foreign)
    with pytest.raises(UserError, match="not made by convert"):
        run(*arguments, f"--out={out}", "--overwrite")
    if form != "directory":
        assert list(load_file(foreign)) == ["mine"]


def errors(files):
    where = f"--checkpoint={files}"
    checkpoint = f"{where}/bare.pth"
    return {
        "convert what": [],
        "did you mean 'released'": ["relased"],
        "released takes exactly one of --checkpoint and --model": ["released", "--out=x"],
        "exactly one of": ["released", checkpoint, "--model=y", "--out=x"],
        "missing --out": ["released", checkpoint],
        "there is no such file": ["released", "--checkpoint=/no.pth", "--out=x"],
        "no such directory": ["released", "--model=/no", "--out=x"],
        "--to is one of pth": ["released", "--model=/no", "--out=x", "--to=onnx"],
        "'8' is not a valid pair": ["released", checkpoint, "--out=x", "--heads=8"],
        "'0,8' is not a valid pair": ["released", checkpoint, "--out=x", "--heads=0,8"],
        "'a,b' is not a valid pair": ["released", checkpoint, "--out=x", "--heads=a,b"],
        "not a multiple of": ["released", checkpoint, "--out=x", "--heads=7,7"],
        "no entry 'ema'": ["released", checkpoint, "--out=x", "--entry=ema"],
        "has no entries": ["released", f"{where}/arrays.npz", "--out=x", "--entry=ema"],
        "has no tokenizer.json": [
            "released",
            checkpoint,
            "--out=x",
            f"--tokenizer={files}",
            *HEADS,
        ],
        "no checkpoint that convert dino knows": ["dino", f"{where}/evil.pth", "--out=x"],
        "posix.system, which would run code": ["bert", f"{where}/code.bin", "--out=x"],
    }


@pytest.mark.parametrize("reason", errors(Path("x")))
def test_bad_input_is_one_clear_error(reason, files, tmp_path, monkeypatch, capsys):
    write_torch(files / "evil.pth", {"w": np.zeros(3, np.float32)})
    with (files / "code.bin").open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {}):
            file.write(pickle.dumps(part, 2))
        file.write(b"cposix\nsystem\n(S'touch ran'\ntR.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", *errors(files)[reason]])
    with pytest.raises(SystemExit) as stop:
        flags.run(convert.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and reason in error
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_vocabulary(files, tmp_path, tokenizer):
    larger = tmp_path / "larger"
    larger.mkdir()
    words = VOCABULARY + [f"w{index}" for index in range(500)]
    (larger / "vocab.txt").write_text("\n".join(words) + "\n")
    arguments = [f"--checkpoint={files / 'bare.pth'}", f"--out={tmp_path / 'm'}", *HEADS]
    with pytest.raises(UserError, match=f"has {len(words)} tokens"):
        run("released", *arguments, f"--tokenizer={larger}")
