"""Where initial weights may be, what of them is refused, and what a run says about its start."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from golden_models import build, published, same, save

from ovseg_jax import convert
from ovseg_jax.errors import UserError
from ovseg_jax.progress import Progress
from ovseg_jax.train.config import load_config
from ovseg_jax.train.run import make_run
from ovseg_jax.weights.initialize import initial_tower, published_start
from ovseg_jax.weights.pth import write_torch

ROLES = {"image": "dino", "text": "bert"}


@pytest.fixture
def shapes(tiny_config):
    return build(tiny_config, "bert")[1]


@pytest.fixture
def bert():
    return published("bert")


# ---- files and folders


def test_folders_and_npz(tmp_path, shapes, bert):
    want = initial_tower("text", save(tmp_path, bert), shapes)
    np.savez(tmp_path / "bert.npz", **bert)
    for spec in (tmp_path, tmp_path / "bert.npz"):
        assert same(initial_tower("text", str(spec), shapes), want)


@pytest.mark.parametrize("role", ROLES)
def test_files_that_cannot_be_read_are_user_errors(tmp_path, shapes, bert, role):
    content = Path(save(tmp_path, bert)).read_bytes()
    cases = {
        "cut.safetensors": content[: len(content) // 2],
        "noise.safetensors": b"\xff" * 200,
        "empty.safetensors": b"",
        "empty.npz": b"",
        "noise.npz": b"PK\x03\x04" + b"\x00" * 50,
        "noise.onnx": b"\xff" * 64,
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "pickled.npz", a=np.empty(1, object))
    with (tmp_path / "one_array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    (tmp_path / "empty").mkdir()
    for name in (*cases, "pickled.npz", "one_array.npz", "empty", "nowhere.npz"):
        with pytest.raises(UserError, match=name):
            initial_tower(role, str(tmp_path / name), shapes)
    with pytest.raises(UserError, match="no_such_package"):
        initial_tower(role, "package:no_such_package/model.safetensors", shapes)


def test_weights_of_another_kind_are_named(tmp_path, shapes, bert):
    with pytest.raises(UserError, match="config.model.image_init.*holds no ViT"):
        initial_tower("image", save(tmp_path, bert), shapes)
    with pytest.raises(UserError, match="config.model.text_init.*holds no BERT"):
        initial_tower("text", save(tmp_path, published("vit")), shapes)


def test_a_model_of_ours_gives_its_towers(tmp_path, shapes):
    rng = np.random.default_rng(0)
    whole = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    save(tmp_path, whole)
    for role in ROLES:
        want = {path: value for path, value in whole.items() if path.startswith(f"{role}_encoder/")}
        assert same(initial_tower(role, str(tmp_path), shapes), want)
    del whole["text_encoder/word"]
    whole["text_encoder/layers/mlp/fc1/bias"] = np.zeros((2, 7), np.float32)
    save(tmp_path, whole)
    with pytest.raises(UserError) as error:
        initial_tower("text", str(tmp_path), shapes)
    for fault in ("text_encoder/word is missing", "fc1/bias has shape"):
        assert fault in str(error.value)


@pytest.mark.parametrize(("role", "name"), [("image", "vit"), ("text", "bert")])
def test_pytorch_files_are_converted_first(tmp_path, tiny_config, role, name):
    """The error says how, and the result starts a tower as its safetensors do."""
    pytest.importorskip("torch", reason="the extra convert is not installed")
    _, shapes = build(tiny_config, name)
    file, out = tmp_path / "given" / "pytorch_model.bin", tmp_path / "converted"
    file.parent.mkdir()
    write_torch(file, published(name))
    for spec in (file, file.parent):
        with pytest.raises(UserError, match=f"convert {ROLES[role]} --checkpoint=.*{file.name}"):
            initial_tower(role, str(spec), shapes)
    assert convert.main([ROLES[role], f"--checkpoint={file}", f"--out={out}"]) == 0
    direct = initial_tower(role, save(tmp_path, published(name)), shapes)
    assert same(initial_tower(role, str(out), shapes), direct)


# ---- the hub


@pytest.mark.parametrize("spec", ["owner/tiny-bert", "hub:tiny-bert"])
def test_a_hub_id_is_downloaded(tmp_path, shapes, bert, spec, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        save(tmp_path, bert, "bert.")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    got = initial_tower("text", spec, shapes)
    words = bert["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(got["text_encoder/word"], words)
    ((name, patterns),) = asked
    assert name == spec.removeprefix("hub:")
    assert not [pattern for pattern in patterns if "bin" in pattern or pattern == "*"]


def test_without_a_network_one_message_says_what_to_do(shapes, monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("no route to the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        initial_tower("text", "owner/tiny-bert", shapes)
    message = str(error.value)
    for words in ("text_init", "no such path", "no route", "hf download owner/tiny-bert"):
        assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("spec", ["weights/dino/model.safetensors", "missing.npz", "a/b.pth", ""])
def test_a_mistyped_path_is_never_looked_for_on_the_hub(shapes, spec, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    with pytest.raises(UserError, match="config.model.image_init"):
        initial_tower("image", spec, shapes)


# ---- what a run says


@pytest.fixture
def specs(tmp_path):
    """A DINOv3 and a BERT with their Hugging Face configs."""
    common = {"num_attention_heads": 3, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}
    configs = {
        "dinov3": {"model_type": "dinov3_vit", "rope_parameters": {"rope_theta": 100.0}},
        "bert": {"model_type": "bert", "pad_token_id": 1},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        save(tmp_path / name, published(name))
        (tmp_path / name / "config.json").write_text(json.dumps(common | config))
    towers = {"image_init": str(tmp_path / "dinov3"), "text_init": str(tmp_path / "bert")}
    return {**towers, "resample_init": False, "neck_init": ""}


def test_the_table_counts_everything_once(tiny_config, specs):
    build(tiny_config, "dinov3")
    tiny_config.model.pad_id = 1
    _, shapes = build(tiny_config, "bert")
    tiny_config.model.update(specs)
    start = published_start(tiny_config.model, shapes)
    head, *rows = start.rows
    assert head == ("parameters", "tensors", "numbers", "start from")
    assert sum(int(row[1]) for row in rows) == len(shapes)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert sum(int(row[2].replace(",", "")) for row in rows) == total
    table = {row[0]: row[3] for row in rows}
    assert len(table) == len(rows)
    assert table["text_encoder"] == specs["text_init"]
    assert table["image_encoder/trunk_layers"] == specs["image_init"]
    assert table["image_encoder/register_tokens"] == specs["image_init"]
    assert table["image_encoder/binding"] == table["image_projector"] == "random"
    assert start.remarks == []
    trunk = ("patch_embed", "class_token", "register_tokens", "trunk_layers", "trunk_end")
    filled = ("text_encoder/", *(f"image_encoder/{name}" for name in trunk))
    assert set(start.values) == {path for path in shapes if path.startswith(filled)}


def test_what_weights_cannot_tell_is_compared_with_their_config(tiny_config, specs):
    build(tiny_config, "dinov3", trunk_heads=2, eps=1e-5, rope_theta=50.0)
    _, shapes = build(tiny_config, "bert", eps=1e-12)
    tiny_config.model.update(specs)
    start = published_start(tiny_config.model, shapes)
    said = "\n".join(start.remarks)
    for words in (
        "num_attention_heads = 3, config.model.image.trunk_heads is 2",
        "layer_norm_eps = 0.001, config.model.image.eps is 1e-05",
        "rope_theta = 100.0, config.model.image.rope_theta is 50.0",
        "layer_norm_eps = 0.001, config.model.text.eps is 1e-12",
        "pad_token_id = 1, config.model.pad_id is 0",
    ):
        assert words in said, words
    assert len(start.remarks) == 5


def test_a_run_prints_the_table_and_starts_from_the_weights(tmp_path, capsys, bert):
    config = load_config("tests/tiny.py")
    text = {"vocab_size": 30522, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40}
    config.model.text.update(**text, max_positions=40)
    rng = np.random.default_rng(0)
    for name, rows in (("word", 30522), ("position", 40)):
        table = rng.normal(size=(rows, 24)).astype(np.float32)
        bert[f"embeddings.{name}_embeddings.weight"] = table
    save(tmp_path, bert)
    config.model.text_init = str(tmp_path)
    run = make_run(config, Progress())
    params = run.initial_params()
    np.testing.assert_array_equal(params["text_encoder"]["position"], table)
    lines = capsys.readouterr().err.splitlines()
    for tower, source in (("text_encoder", str(tmp_path)), ("image_encoder", "random")):
        assert [line.split()[-1] for line in lines if line.startswith(tower)] == [source]
