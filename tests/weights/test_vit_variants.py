"""What published ViTs differ in beyond names: sizes, layer scale, registers, gated layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import build, file_tensors, hidden_states, read, relative_error, variables
from safetensors.numpy import save_file

from ovseg_jax.errors import UserError
from ovseg_jax.models.positions import resize_grid
from ovseg_jax.weights.initialize import initial_image


def save(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return str(path)


def halves(config, **changes):
    """A model of the paper's form: no trunk, one layer before the binding, one after it."""
    fields = {"width": 24, "heads": 3, "first_layers": 1, "second_layers": 1, "group_layer": 0}
    fields |= {"class_token": False, "trunk_norm": False, "trunk_width": 0, "trunk_heads": 0}
    return build(config, "vit", **{**fields, **changes})


@pytest.mark.parametrize("binding", ["slot", "grouping_block"])
def test_dinov2_is_laid_over_both_halves_with_its_layer_scale_folded_in(
    tmp_path, tiny_config, binding
):
    """Also where the second half sees the groups alone; class token and registers have no place."""
    if binding == "grouping_block":
        tiny_config.model.image.update(binding=binding, second_stage="groups")
    tensors = file_tensors(read("dinov2_registers"))
    _, shapes = halves(tiny_config)
    got = initial_image(save(tmp_path, tensors), shapes)
    filled = ("patch_embed/", "position", "first/", "second/", "norm/")
    assert set(got) == {
        path for path in shapes if path.startswith(tuple(f"image_encoder/{x}" for x in filled))
    }
    positions = tensors["embeddings.position_embeddings"][0, 1:]
    np.testing.assert_array_equal(got["image_encoder/position"], positions)
    np.testing.assert_array_equal(got["image_encoder/norm/scale"], tensors["layernorm.weight"])
    for index, place in enumerate(("first", "second")):
        layer = f"encoder.layer.{index}"
        for ours, theirs, scale in (
            ("attention/out", "attention.output.dense", "layer_scale1"),
            ("mlp/fc2", "mlp.fc2", "layer_scale2"),
        ):
            factor = tensors[f"{layer}.{scale}.lambda1"]
            kernel = got[f"image_encoder/{place}/layers/{ours}/kernel"][0]
            bias = got[f"image_encoder/{place}/layers/{ours}/bias"][0]
            np.testing.assert_allclose(kernel, tensors[f"{layer}.{theirs}.weight"].T * factor)
            np.testing.assert_allclose(bias, tensors[f"{layer}.{theirs}.bias"] * factor)


def test_folded_layer_scale_is_the_same_function(tmp_path, tiny_config):
    arrays = read("dinov2")
    model, shapes = build(tiny_config, "dinov2", layer_scale=None)
    assert not [path for path in shapes if "attention_scale" in path]
    params = variables(shapes, initial_image(save(tmp_path, file_tensors(arrays)), shapes))
    assert max(relative_error(*pair) for pair in hidden_states(model, params, arrays)) < 1e-5


def test_other_sizes_are_refused_or_resampled(tmp_path, tiny_config):
    tensors = file_tensors(read("vit"))
    path = save(tmp_path, tensors)
    _, shapes = build(tiny_config, "vit", patch=14, grid=(6, 5))
    with pytest.raises(UserError, match="8 pixels, 16 positions") as error:
        initial_image(path, shapes)
    for fault in ("patch_embed/kernel", "image_encoder/position"):
        assert fault in str(error.value)
    with pytest.raises(UserError, match="patch_embed/kernel"):
        initial_image(path, shapes, (6, 5))  # positions are resampled, patches are not
    _, shapes = build(tiny_config, "vit", patch=8, grid=(6, 5))
    with pytest.raises(UserError, match="model.resample_init = True"):
        initial_image(path, shapes)
    got = initial_image(path, shapes, (6, 5))
    table = jnp.asarray(tensors["embeddings.position_embeddings"][0, 1:])
    wanted = resize_grid(table, (4, 4), (6, 5))
    np.testing.assert_allclose(got["image_encoder/position"], wanted, rtol=1e-5, atol=1e-5)
    class_token = (
        tensors["embeddings.cls_token"][0] + tensors["embeddings.position_embeddings"][0, :1]
    )
    np.testing.assert_array_equal(got["image_encoder/class_token"], class_token)


def test_weights_that_fit_are_not_touched_by_resampling(tmp_path, tiny_config):
    path = save(tmp_path, file_tensors(read("dinov2")))
    _, shapes = build(tiny_config, "dinov2")
    plain, resampled = initial_image(path, shapes), initial_image(path, shapes, (4, 4))
    assert all(np.array_equal(plain[name], resampled[name]) for name in plain)


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("dinov2", "encoder.layer.0.mlp.weights_in.weight"),
        ("dinov2", "encoder.layer.0.mlp.gate_proj.weight"),
        ("dinov3", "layer.0.mlp.gate_proj.weight"),
    ],
)
def test_gated_feed_forward_layers_are_refused(tmp_path, tiny_config, name, gate):
    tensors = {**file_tensors(read(name)), gate: np.zeros((48, 24), np.float32)}
    _, shapes = build(tiny_config, name)
    with pytest.raises(UserError, match="SwiGLU"):
        initial_image(save(tmp_path, tensors), shapes)


@pytest.mark.parametrize(
    ("name", "changes", "faults"),
    [
        ("dinov2_registers", {"register_tokens": 0}, ["embeddings.register_tokens has no place"]),
        ("dinov2_registers", {"register_tokens": 4}, ["register_tokens has shape (4, 24)"]),
        ("dinov2", {"register_tokens": 1}, ["embeddings.register_tokens is missing"]),
        ("dinov2", {"position": "rope"}, ["embeddings.position_embeddings has no place"]),
        ("dinov3", {"position": "learned"}, ["embeddings.position_embeddings is missing"]),
        ("vit", {"layer_scale": 1.0}, [f"{n}.layer_scale2.lambda1 is missing" for n in "01"]),
        ("vit", {"trunk_width": 48}, ["position has shape (16, 48)", "trunk_end/bias has shape"]),
    ],
)
def test_a_trunk_of_another_form_is_refused(tmp_path, tiny_config, name, changes, faults):
    _, shapes = build(tiny_config, name, **changes)
    with pytest.raises(UserError) as error:
        initial_image(save(tmp_path, file_tensors(read(name))), shapes)
    assert all(fault in str(error.value) for fault in faults), str(error.value)


def test_half_precision_and_prefixes_are_read(tmp_path, tiny_config):
    tensors = file_tensors(read("dinov3"))
    _, shapes = build(tiny_config, "dinov3")
    half = {f"student.backbone.{name}": value.astype(np.float16) for name, value in tensors.items()}
    got = initial_image(save(tmp_path, half), shapes)
    assert all(value.dtype == np.float32 for value in got.values())
    stored = tensors["embeddings.register_tokens"][0].astype(np.float16)
    np.testing.assert_array_equal(got["image_encoder/register_tokens"], stored)
    key = got["image_encoder/trunk_layers/layers/attention/key/bias"]
    np.testing.assert_array_equal(key, np.zeros((2, 24)))
