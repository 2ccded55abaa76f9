"""BERT weights under their published names fill our parameters, totally."""

import numpy as np
import pytest
from published_shapes import bert_shapes, draw, write

from ovseg_jax.errors import UserError
from ovseg_jax.weights.initialize import initial_text, variable_shapes


@pytest.fixture(scope="module")
def plain(tiny_model):
    return variable_shapes(tiny_model)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert_fills_the_text_encoder(tmp_path, plain, prefix):
    tensors = draw(bert_shapes())
    got = initial_text(write(tmp_path, tensors, prefix), plain)
    assert set(got) == {path for path in plain if path.startswith("text_encoder/")}
    assert all(got[path].shape == plain[path] for path in got)
    np.testing.assert_array_equal(
        got["text_encoder/word"], tensors["embeddings.word_embeddings.weight"]
    )
    for index in range(2):
        for ours, theirs in (
            ("attention/key", "attention.self.key"),
            ("attention/out", "attention.output.dense"),
            ("mlp/fc2", "output.dense"),
        ):
            kernel = got[f"text_encoder/layers/{ours}/kernel"][index]
            source = tensors[f"encoder.layer.{index}.{theirs}.weight"]
            np.testing.assert_array_equal(kernel, source.T)
        scale = got["text_encoder/layers/mlp_norm/scale"][index]
        np.testing.assert_array_equal(
            scale, tensors[f"encoder.layer.{index}.output.LayerNorm.weight"]
        )


def test_old_names_of_norms_are_read(tmp_path, plain):
    """Files converted from TensorFlow say gamma and beta."""
    tensors = draw(bert_shapes())
    want = initial_text(write(tmp_path, tensors), plain)
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    assert sum("gamma" in key for key in tensors) == 5
    got = initial_text(write(tmp_path, tensors, "bert."), plain)
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_heads_of_language_models_are_dropped_by_name(tmp_path, plain):
    """Prefix and heads as the masked language model has them; anything else is refused."""
    tensors = draw(bert_shapes())
    want = initial_text(write(tmp_path, tensors), plain)
    tensors = {f"bert.{key}": value for key, value in tensors.items()}
    for name in ("cls.predictions.bias", "cls.seq_relationship.weight"):
        tensors[name] = np.zeros(3, np.float32)
    got = initial_text(write(tmp_path, tensors), plain)
    assert all(np.array_equal(got[path], want[path]) for path in want)
    tensors["head_of_another_kind.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="head_of_another_kind.weight has no place"):
        initial_text(write(tmp_path, tensors), plain)


def test_every_tensor_at_fault_is_named_in_one_error(tmp_path, plain):
    tensors = draw(bert_shapes())
    del tensors["embeddings.LayerNorm.bias"]
    tensors["adapter.weight"] = np.zeros(3, np.float32)
    name = "encoder.layer.1.attention.self.query.weight"
    tensors[name] = tensors[name][:, :-1]
    word = "embeddings.word_embeddings.weight"
    tensors[word] = tensors[word][:-1]
    path = write(tmp_path, tensors)
    with pytest.raises(UserError) as error:
        initial_text(path, plain)
    message = str(error.value)
    for fault in (
        path,
        "embeddings.LayerNorm.bias is missing",
        "adapter.weight has no place",
        "text_encoder/word has shape (48, 24)",
        "text_encoder/layers/attention/query/kernel",
    ):
        assert fault in message, fault


def test_npz_and_directories_are_read_as_well(tmp_path, plain):
    tensors = draw(bert_shapes())
    want = initial_text(write(tmp_path, tensors), plain)
    np.savez(tmp_path / "bert.npz", **tensors)
    for spec in (tmp_path, tmp_path / "bert.npz"):
        got = initial_text(str(spec), plain)
        assert all(np.array_equal(got[path], want[path]) for path in want)
    pickled = np.empty(1, object)
    np.savez(tmp_path / "pickled.npz", a=pickled)
    with pytest.raises(UserError, match="pickled.npz"):
        initial_text(str(tmp_path / "pickled.npz"), plain)
