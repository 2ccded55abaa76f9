"""Where initial weights may lie: files, folders, several files, a model of ours, the hub."""

import json

import huggingface_hub
import numpy as np
import pytest
from golden_models import build, file_tensors, read
from safetensors.numpy import save_file

from ovseg_jax.errors import UserError
from ovseg_jax.weights.initialize import initial_image, initial_text
from ovseg_jax.weights.locate import INDEX


@pytest.fixture
def shapes(tiny_config):
    return build(tiny_config, "bert")[1]


@pytest.fixture
def bert():
    return file_tensors(read("bert"))


def shards(folder, tensors, count=2):
    """`tensors` spread over numbered files with an index, as large models are saved."""
    places = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_several_files_with_an_index(tmp_path, shapes, bert):
    save_file(bert, tmp_path / "whole.safetensors")
    want = initial_text(str(tmp_path / "whole.safetensors"), shapes)
    shards(tmp_path, bert)
    got = initial_text(str(tmp_path), shapes)
    assert set(got) == set(want)
    assert all(np.array_equal(got[path], want[path]) for path in want)

    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors"):
        initial_text(str(tmp_path), shapes)
    index = {"weight_map": {"lost.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="lost.weight"):
        initial_text(str(tmp_path), shapes)
    for damaged in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / INDEX).write_text(damaged)
        with pytest.raises(UserError, match="no index of weights"):
            initial_text(str(tmp_path), shapes)


@pytest.mark.parametrize(("load", "kind"), [(initial_image, "dino"), (initial_text, "bert")])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.pth"])
def test_pytorch_files_name_the_conversion(tmp_path, shapes, load, kind, name):
    (tmp_path / name).write_bytes(b"PK")
    for spec in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=f"ovseg_jax.convert {kind} --checkpoint=.*{name}"):
            load(str(spec), shapes)


def test_a_model_of_ours_gives_its_towers(tmp_path, shapes):
    rng = np.random.default_rng(0)
    whole = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    save_file(whole, tmp_path / "model.safetensors")
    for load, part in ((initial_image, "image_encoder/"), (initial_text, "text_encoder/")):
        got = load(str(tmp_path), shapes)
        assert set(got) == {path for path in shapes if path.startswith(part)}
        assert all(np.array_equal(value, whole[path]) for path, value in got.items())
    del whole["text_encoder/word"]
    whole["text_encoder/layers/mlp/fc1/bias"] = np.zeros((2, 7), np.float32)
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        initial_text(str(tmp_path), shapes)
    for fault in ("text_encoder/word is missing", "fc1/bias has shape"):
        assert fault in str(error.value)


@pytest.mark.parametrize("spec", ["owner/tiny-bert", "hub:tiny-bert"])
def test_a_hub_id_is_downloaded(tmp_path, shapes, bert, spec, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        save_file(
            {f"bert.{key}": value for key, value in bert.items()}, tmp_path / "model.safetensors"
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    got = initial_text(spec, shapes)
    np.testing.assert_array_equal(
        got["text_encoder/word"], bert["embeddings.word_embeddings.weight"]
    )
    ((name, patterns),) = asked
    assert name == spec.removeprefix("hub:")
    assert not [pattern for pattern in patterns if "bin" in pattern or pattern == "*"]


def test_without_a_network_one_message_says_what_to_do(shapes, monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("no route to the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        initial_text("owner/tiny-bert", shapes)
    message = str(error.value)
    for part in (
        "no such path",
        "no route to the hub",
        "hf download owner/tiny-bert",
        "model.text_init",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("spec", ["weights/dino/model.safetensors", "missing.npz", "a/b.pth", ""])
def test_a_mistyped_path_is_never_looked_for_on_the_hub(shapes, spec, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    with pytest.raises(UserError, match="config.model.image_init"):
        initial_image(spec, shapes)


def test_weights_of_another_kind_are_named(tmp_path, shapes):
    save_file(file_tensors(read("vit")), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds no BERT"):
        initial_text(str(tmp_path), shapes)
