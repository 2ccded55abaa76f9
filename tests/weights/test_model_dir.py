"""The model directory: what is saved comes back, what was damaged or edited is refused."""

import json
import stat

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, init_statistics, init_variables
from ovseg_jax.weights.model_dir import load_model, save_model

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "."]
EXTRAS = {
    "teacher/position": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array(7),
    "half": np.array([1.5, 2], np.float16),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def normed(shared_tiny_config):
    """A model config with batch norms, its random parameters and statistics."""
    config = shared_tiny_config.model.copy_and_resolve_references().unlock()
    config.update(projector_layers=2, projector_norm="batch")
    model = build_model(config)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype == np.int32:
            return np.asarray(rng.integers(1, 100), np.int32)
        return rng.normal(size=leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    params = jax.tree.map(draw, nn.unbox(shapes["params"]))
    stats = jax.tree.map(draw, jax.eval_shape(lambda: init_statistics(model)))
    return config, params, stats


def save(directory, normed, tokenizer, **changes):
    config, params, stats = normed
    options = {
        "model": json.loads(config.to_json_best_effort()),
        "protocol": {"name": "test"},
        "text_length": 8,
        "benchmarks": {},
        "provenance": {"steps": 3},
        "batch_stats": stats,
        "extras": EXTRAS,
    }
    save_model(directory, params, tokenizer, **{**options, **changes})
    return directory


@pytest.fixture
def directory(tmp_path, normed, tokenizer):
    return save(tmp_path / "model", normed, tokenizer)


def test_everything_comes_back_to_the_bit(directory, normed, tokenizer):
    _, params, stats = normed
    saved = load_model(directory)
    pairs = ((saved.params, params), (saved.batch_stats, stats), (saved.extras, EXTRAS))
    for found, wanted in pairs:
        found, wanted = flatten_dict(found, sep="/"), flatten_dict(wanted, sep="/")
        assert found.keys() == wanted.keys()
        for path in wanted:
            np.testing.assert_array_equal(found[path], wanted[path])
            assert found[path].dtype == wanted[path].dtype
    assert saved.info["provenance"] == {"steps": 3} and saved.info["text_length"] == 8
    text = ["a photo of a cat."]
    np.testing.assert_array_equal(saved.tokenizer.encode(text, 8), tokenizer.encode(text, 8))

    # Files are readable for others, and hold no pickle.
    assert len({stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}) == 1
    assert {path.suffix for path in directory.iterdir()} == {".safetensors", ".json", ".md"}


def test_written_again_it_is_replaced_whole(directory, normed, tokenizer):
    (directory / "stray.txt").write_text("old")
    save(directory, normed, tokenizer, provenance={"steps": 4}, extras=None)
    saved = load_model(directory)
    assert saved.info["provenance"] == {"steps": 4} and saved.extras == {}
    assert not (directory / "stray.txt").exists()
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


def rewrite(directory, change, sealed=False):
    """Changes config.json in place, without its own digest where it is not `sealed`."""
    info = json.loads((directory / "config.json").read_text())
    if not sealed:
        info.pop("this_file_sha256", None)
    change(info)
    (directory / "config.json").write_text(json.dumps(info))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated or changed": lambda d: truncated(d / "model.safetensors"),
    "model.safetensors is not the file": lambda d: flipped(d / "model.safetensors"),
    "tokenizer.json is not the file": lambda d: flipped(d / "tokenizer.json"),
    "tokenizer.json is missing": lambda d: (d / "tokenizer.json").unlink(),
    "model.safetensors is missing": lambda d: (d / "model.safetensors").unlink(),
    "config.json is missing": lambda d: (d / "config.json").unlink(),
    "remove its field 'this_file_sha256'": lambda d: rewrite(
        d, lambda info: info["model"]["image"].update(heads=2), sealed=True
    ),
    "damaged or no model config": lambda d: truncated(d / "config.json"),
    "'other' version 1": lambda d: rewrite(d, lambda info: info.update(format="other")),
    "KeyError": lambda d: (d / "config.json").write_text("{}"),
    "TypeError": lambda d: (d / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_refused_with_the_reason(reason, directory):
    DAMAGES[reason](directory)
    with pytest.raises(UserError, match=reason) as error:
        load_model(directory)
    assert str(directory) in str(error.value)


def test_a_config_changed_on_purpose(directory):
    rewrite(directory, lambda info: info["protocol"].update(threshold=0.5))
    assert load_model(directory).info["protocol"]["threshold"] == 0.5
    # Sizes must still fit the weights.
    rewrite(directory, lambda info: info["model"].update(joint_width=9))
    with pytest.raises(UserError, match=r"image_projector/out/kernel is \(16, 8\), should be"):
        load_model(directory)
    rewrite(directory, lambda info: info["model"]["image"].pop("width"))
    with pytest.raises(UserError, match="cannot be built by this version: .*width"):
        load_model(directory)


def test_missing_statistics_are_named(tmp_path, normed, tokenizer):
    directory = save(tmp_path / "m", normed, tokenizer, batch_stats=None)
    with pytest.raises(UserError, match="batch_stats/image_projector/norm/mean is missing"):
        load_model(directory)


def test_without_a_tokenizer(tmp_path, normed, tokenizer):
    directory = save(tmp_path / "m", normed, None)
    saved = load_model(directory)
    with pytest.raises(UserError, match="has no tokenizer.*--tokenizer=DIR"):
        saved.tokenizer.encode(["a cat"], 8)
    # One that is added later is taken.
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    ids = load_model(directory).tokenizer.encode(["a cat"], 8)
    np.testing.assert_array_equal(ids, tokenizer.encode(["a cat"], 8))


def test_a_place_that_cannot_be_written(tmp_path, normed, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "file" / "m", normed, tokenizer)


def test_fields_of_older_versions(directory):
    """A field that is gone may have the value that is left; another value is refused."""
    old = {"position_offset": 0, "token_types": 2, "unroll": 1, "activation": "quick_gelu"}
    rewrite(directory, lambda info: info["model"]["text"].update(old))
    load_model(directory)
    rewrite(directory, lambda info: info["model"]["text"].update(position_offset=2))
    with pytest.raises(UserError, match="cannot be built by this version: .*position_offset"):
        load_model(directory)
