"""The two weight packages of the quickstart, read for real and compared with their own programs."""

from pathlib import Path

import jax
import numpy as np
import pytest
from make_dinov2_golden import STEP, golden_image
from make_minilm_golden import LENGTH, SENTENCES

from ovseg_jax.data.tokens import find_tokenizer
from ovseg_jax.flags import load_config
from ovseg_jax.models.build import build_model
from ovseg_jax.optim.groups import nest
from ovseg_jax.weights.initialize import initial_image, initial_text, variable_shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quickstart():
    """The quickstart's model with its published weights, and zeros for what stays random."""
    config = load_config(ROOT / "configs" / "quickstart.py")
    config.model.matmul_dtype = "float32"
    model = build_model(config.model)
    shapes = variable_shapes(model)
    flat = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    flat |= initial_image(config.model.image_init, shapes)
    flat |= initial_text(config.model.text_init, shapes)
    return config, model, {"params": nest(flat)}


def test_trunk_equals_the_onnx_graph(quickstart):
    _, model, variables = quickstart
    expected = np.load(Path(__file__).with_name("dinov2_golden.npz"))["tokens"]
    trunk = jax.jit(lambda v, image: model.apply(v, image, method="trunk"))
    tokens = np.asarray(trunk(variables, golden_image()))[:, ::STEP]
    error = np.linalg.norm(tokens - expected) / np.linalg.norm(expected)
    assert error < 1e-5


def test_text_encoder_equals_pytorch(quickstart):
    """Real weights on real sentences: every token's last hidden state, padding's too."""
    config, model, variables = quickstart
    golden = np.load(Path(__file__).with_name("minilm_golden.npz"))
    ids = find_tokenizer(config.data.tokenizer).encode(SENTENCES, LENGTH)
    np.testing.assert_array_equal(ids, golden["ids"])
    encode = jax.jit(lambda v, ids: model.apply(v, ids, method="text_tokens").tokens)
    tokens = np.asarray(encode(variables, ids))
    error = np.linalg.norm(tokens - golden["hidden"]) / np.linalg.norm(golden["hidden"])
    assert error < 1e-5  # seen: 2e-6


def test_text_encoder_knows_which_sentences_mean_the_same(quickstart):
    config, model, variables = quickstart
    tokenizer = find_tokenizer(config.data.tokenizer)
    sentences = ["a photo of a dog", "a picture of a puppy", "the stock market fell today"]
    ids = tokenizer.encode(sentences, 16)
    encode = jax.jit(lambda v, ids: model.apply(v, ids, method="text_tokens"))
    text = encode(variables, ids)
    pooled = np.array(text.pooled)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    similar = pooled @ pooled.T
    # Seen: 0.82 for the paraphrase, 0.03 and 0.04 for the unrelated sentence.
    assert similar[0, 1] > 0.5
    assert similar[0, 2] < 0.2 and similar[1, 2] < 0.2


def test_padding_does_not_change_a_sentence(quickstart):
    config, model, variables = quickstart
    tokenizer = find_tokenizer(config.data.tokenizer)
    encode = jax.jit(lambda v, ids: model.apply(v, ids, method="text_tokens").pooled)
    short, long = (
        np.asarray(encode(variables, tokenizer.encode(["two cats"], length))) for length in (8, 24)
    )
    np.testing.assert_allclose(short, long, atol=1e-5)
