"""GroupViT against a tiny random model of the Hugging Face library (see make_arrays.py).

Everything within 1e-5 of the norm, padding included; names there and back to the bit.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from released.arrays import relative

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.segmentation import readout
from ovseg_jax.weights.groupvit import from_groupvit, groupvit_config, style_of, to_groupvit


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(Path(__file__).with_name("tiny.npz")))


@pytest.fixture(scope="module")
def tensors(arrays):
    return {k.removeprefix("weights/"): x for k, x in arrays.items() if k.startswith("weights/")}


@pytest.fixture(scope="module")
def config(tensors):
    return groupvit_config(tensors, heads=4, text_heads=4)


@pytest.fixture(scope="module")
def apply(tensors, config):
    params, statistics = from_groupvit(tensors, config)
    variables = jax.tree.map(jnp.asarray, {"params": params, "batch_stats": statistics})
    model = build_model(ConfigDict(config))

    def run(method, *args):
        call = jax.jit(lambda variables, *args: model.apply(variables, *args, method=method))
        return call(variables, *args)

    return run


@pytest.fixture(scope="module")
def visual(arrays, apply):
    return apply("visual_tokens", jnp.asarray(arrays["pixels"].transpose(0, 2, 3, 1)))


@pytest.fixture(scope="module")
def text(arrays, apply):
    return apply("text_tokens", jnp.asarray(arrays["ids"]))


def test_sizes_come_from_the_tensors(config):
    image, words = config["image"], config["text"]
    assert (image["patch"], image["grid"], image["width"]) == (8, (4, 4), 24)
    assert (image["first_layers"], image["group_tokens"], image["num_groups"]) == (2, 6, 6)
    assert image["later_stages"] == ((3, 3, 1),) and image["second_layers"] == 1
    assert (words["vocab_size"], words["depth"], words["mlp_width"]) == (99, 2, 48)
    assert words["end_id"] == 98
    assert (config["joint_width"], config["projector_width"]) == (10, 20)


def test_groups_and_the_composed_map(arrays, visual):
    assert relative(visual.groups, arrays["groups"]) < 1e-5
    first, second = (arrays[f"map_{i}"].transpose(0, 2, 1) for i in (0, 1))
    assert relative(visual.affinity, first @ second) < 1e-5
    np.testing.assert_allclose(visual.affinity.sum(-1), 1, rtol=1e-5)
    hard = np.asarray(visual.assigned)
    np.testing.assert_allclose(np.sort(hard, -1)[..., -1], 1, rtol=1e-6)
    assert visual.patches is None and visual.query is None


def test_an_image_of_another_shape(arrays, apply):
    pixels = jnp.asarray(arrays["wide_pixels"].transpose(0, 2, 3, 1))
    visual = apply("visual_tokens", pixels)
    assert relative(visual.groups, arrays["wide_groups"]) < 1e-5
    grid = readout.grid_shape(*pixels.shape[1:3], visual.affinity.shape[1])
    cells = np.asarray(visual.affinity).reshape(1, *grid, -1)
    rows, columns = (readout.bilinear_weights(n, m) for n, m in zip((32, 48), grid, strict=True))
    pixel_map = readout.spread(cells, rows, columns)
    assert relative(pixel_map[0].transpose(2, 0, 1), arrays["wide_map"][0]) < 1e-5


def test_text_with_padding(arrays, text):
    np.testing.assert_array_equal(text.mask, arrays["mask"])
    real = arrays["mask"]
    assert relative(np.asarray(text.tokens)[real], arrays["text_tokens"][real]) < 1e-5


def test_what_follows_the_end_token_does_not_count(arrays, apply, text):
    ids = np.where(arrays["mask"], arrays["ids"], 5)
    changed = apply("text_tokens", jnp.asarray(ids))
    np.testing.assert_allclose(changed.pooled, text.pooled, rtol=1e-5, atol=1e-6)
    # Without an end token the last feature is the sentence's.
    without = apply("text_tokens", jnp.full((1, 4), 5, jnp.int32))
    np.testing.assert_allclose(without.pooled, without.tokens[:, -1], rtol=1e-5)


def test_both_embeddings(arrays, apply, visual, text):
    image = apply("project_image", jnp.mean(visual.groups, axis=1))
    words = apply("project_text", text.pooled)
    assert relative(image, arrays["image_embeds"]) < 1e-5
    assert relative(words, arrays["text_embeds"]) < 1e-5
    logits = apply("logit_scale") * image @ words.T
    assert relative(logits, arrays["logits_per_image"]) < 1e-5


def test_segmentation_logits(arrays, apply, visual):
    # There: the cosine of a group with a text, times the scale twice, spread over its soft map.
    groups = apply("project_image", visual.groups)
    scores = readout.class_scores(visual.affinity, groups, arrays["text_embeds"], (4, 4))
    rows = columns = readout.bilinear_weights(32, 4)
    logits = readout.spread(scores, rows, columns) * apply("logit_scale") ** 2
    assert relative(logits.transpose(0, 3, 1, 2), arrays["segmentation_logits"]) < 1e-5


def test_the_authors_names_hold_the_same_model(tensors, config):
    params, statistics = from_groupvit(tensors, config)
    original = to_groupvit(params, statistics, config, "original")
    assert style_of(original) == "original" and not set(original) & (set(tensors) - {"logit_scale"})
    width = config["text"]["width"]
    fused = original["text_encoder.transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(
        fused[width : 2 * width], tensors["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    )
    assert original["img_projector.linear_out.weight"].shape == (10, 20, 1)
    told = {"heads": 4, "text_heads": 4}
    assert groupvit_config(original, **told) == config
    original["multi_label_logit_scale"] = np.zeros((), np.float32)  # stored where it is not shared
    again, again_statistics = from_groupvit(original, config)
    ours, theirs = ((params, statistics), (again, again_statistics))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_every_offender_is_listed(tensors, config):
    wrong = dict(tensors)
    del wrong["vision_model.layernorm.bias"]
    wrong["extra"] = np.zeros(3, np.float32)
    wrong["text_projection.3.bias"] = np.zeros(4, np.float32)
    with pytest.raises(UserError) as error:
        from_groupvit(wrong, config, "FILE")
    for word in ("FILE", "vision_model.layernorm.bias", "extra", "text_projection.3.bias"):
        assert word in str(error.value)
    with pytest.raises(UserError, match="no GroupViT checkpoint"):
        groupvit_config({"some.weight": np.zeros(2)})
    with pytest.raises(UserError, match="no GroupViT.*token_embedding"):
        del wrong["text_model.embeddings.token_embedding.weight"]
        groupvit_config(wrong)
    with pytest.raises(UserError, match="no grid of 3 x 5"):
        groupvit_config(tensors, grid=(3, 5))
    with pytest.raises(UserError, match="text_form is 'bert'"):
        to_groupvit({}, {}, {**config, "text_form": "bert"})
