"""BERT weights under their published names fill our parameters, totally."""

import numpy as np
import pytest
from golden_models import build, published, same, save

from ovseg_jax.errors import UserError
from ovseg_jax.weights.initialize import initial_tower


@pytest.fixture
def shapes(tiny_config):
    return build(tiny_config, "bert")[1]


def test_old_names_of_norms_are_read(tmp_path, shapes):
    """Files converted from TensorFlow say gamma and beta."""
    tensors = published("bert")
    want = initial_tower("text", save(tmp_path, tensors), shapes)
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    assert sum("gamma" in key for key in tensors) == 5
    assert same(initial_tower("text", save(tmp_path, tensors, "bert."), shapes), want)


def test_heads_of_language_models_are_dropped_by_name(tmp_path, shapes):
    """Prefix and heads as the masked language model has them; anything else is refused."""
    tensors = published("bert")
    want = initial_tower("text", save(tmp_path, tensors), shapes)
    assert set(want) == {path for path in shapes if path.startswith("text_encoder/")}
    tensors = {f"bert.{key}": value for key, value in tensors.items()}
    for name in ("cls.predictions.bias", "cls.seq_relationship.weight"):
        tensors[name] = np.zeros(3, np.float32)
    assert same(initial_tower("text", save(tmp_path, tensors), shapes), want)
    tensors["head_of_another_kind.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="head_of_another_kind.weight has no place"):
        initial_tower("text", save(tmp_path, tensors), shapes)


def test_every_tensor_at_fault_is_named_in_one_error(tmp_path, shapes):
    tensors = published("bert")
    del tensors["embeddings.LayerNorm.bias"]
    tensors["adapter.weight"] = np.zeros(3, np.float32)
    query = "encoder.layer.1.attention.self.query.weight"
    word = "embeddings.word_embeddings.weight"
    tensors |= {query: tensors[query][:, :-1], word: tensors[word][:-1]}
    path = save(tmp_path, tensors)
    with pytest.raises(UserError) as error:
        initial_tower("text", path, shapes)
    for fault in (
        path,
        "embeddings.LayerNorm.bias is missing",
        "adapter.weight has no place",
        "text_encoder/word has shape (40, 24)",
        "text_encoder/layers/attention/query/kernel has shape (24, 24)",
    ):
        assert fault in str(error.value), fault


def test_a_text_encoder_of_another_depth_is_refused(tmp_path, tiny_config):
    _, shapes = build(tiny_config, "bert", depth=1)
    with pytest.raises(UserError, match="encoder.layer.1.*has no place"):
        initial_tower("text", save(tmp_path, published("bert")), shapes)
