"""Published towers give the same hidden states here as in their own programs.

Tiny random models of transformers (`golden_models.py` makes the arrays): all
tokens of padded texts, all patches of images of four sizes (the stored grid, a larger, a smaller
one, and one with as many cells that is not square). And the two weight packages of the quickstart,
read for real. Errors are relative to the norm of the whole array.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from golden_models import (
    IMAGE_FIELDS,
    LENGTH,
    SENTENCES,
    STEP,
    build,
    golden_image,
    hidden_states,
    published,
    read,
    relative_error,
    save,
    variables,
)

from ovseg_jax.data.tokenizer import find_tokenizer
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.train.config import load_config
from ovseg_jax.weights.initialize import initial_tower

HERE = Path(__file__).parent


def worst_error(tmp_path, config, name, **changes):
    model, shapes = build(config, name, **changes)
    role = "text" if name == "bert" else "image"
    params = variables(shapes, initial_tower(role, save(tmp_path, published(name)), shapes))
    return max(relative_error(*pair) for pair in hidden_states(model, params, read(name)))


@pytest.mark.parametrize("name", ["bert", *IMAGE_FIELDS])
def test_hidden_states(tmp_path, tiny_config, name):
    # Seen: at most 7e-7.
    assert worst_error(tmp_path, tiny_config, name) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {"eps": 1e-12}),
        ("bert", {"heads": 2}),
        ("vit", {"eps": 1e-6}),
        ("vit", {"position_resize": "bicubic_antialias"}),
        ("dinov2_registers", {"position_resize": "bicubic"}),
        ("dinov3", {"rope_theta": 50.0}),
    ],
)
def test_a_wrong_option_shows(tmp_path, tiny_config, name, changes):
    """What weights cannot tell: the comparison notices each of these."""
    assert worst_error(tmp_path, tiny_config, name, **changes) > 1e-4


# ---- the packages


@pytest.fixture(scope="module")
def quickstart():
    """The quickstart's tokenizer and model with its published weights; what is random is 0."""
    config = load_config(HERE.parents[1] / "configs" / "quickstart.py")
    config.model.matmul_dtype = "float32"
    model = build_model(config.model)
    shapes = variable_shapes(model)
    values = initial_tower("image", config.model.image_init, shapes)
    values |= initial_tower("text", config.model.text_init, shapes)
    return find_tokenizer(config.data.tokenizer), model, variables(shapes, values)


def test_trunk_equals_the_onnx_graph(quickstart):
    _, model, params = quickstart
    expected = np.load(HERE / "dinov2_golden.npz")["tokens"]
    trunk = jax.jit(lambda v, image: model.apply(v, image, method="trunk"))
    tokens = np.asarray(trunk(params, golden_image()))[:, ::STEP]
    assert relative_error(tokens, expected) < 1e-5


def test_text_encoder_equals_pytorch(quickstart):
    """Real weights on real sentences: every token's last hidden state, padding's too."""
    tokenizer, model, params = quickstart
    golden = np.load(HERE / "minilm_golden.npz")
    ids = tokenizer.encode(SENTENCES, LENGTH)
    np.testing.assert_array_equal(ids, golden["ids"])
    encode = jax.jit(lambda v, ids: model.apply(v, ids, method="text_tokens").tokens)
    assert relative_error(np.asarray(encode(params, ids)), golden["hidden"]) < 1e-5  # seen: 2e-6
