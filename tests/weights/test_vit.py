"""Published ViTs fill the visual encoder, totally, and what they differ in beyond names."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import (
    IMAGE_FIELDS,
    build,
    halves,
    hidden_states,
    published,
    read,
    relative_error,
    same,
    save,
    variables,
)

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.vit import resize_grid
from ovseg_jax.train.config import load_config
from ovseg_jax.weights.initialize import initial_tower, variable_shapes
from ovseg_jax.weights.tower_links import from_vit

CONFIGS = Path(__file__).parents[2] / "configs"


def release(width, depth, patches, patch, ratio):
    """Shapes under the names of DINO's own release, with fused query, key and value."""

    def linear(name, inside, outside):
        return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}

    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **{f"norm.{kind}": (width,) for kind in ("weight", "bias")},
    }
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= linear(f"{block}.attn.qkv", width, 3 * width)
        shapes |= linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", width, ratio * width)
        shapes |= linear(f"{block}.mlp.fc2", ratio * width, width)
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
    return shapes


def as_released(tensors, registers):
    """The weights of a hub file under the names of DINO's, DINOv2's and DINOv3's own releases."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": registers,
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "attention.output.dense": "attn.proj",
        "attention.o_proj": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "layernorm.": "norm.",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "encoder.layer.": "blocks.",
        "layer.": "blocks.",
    }
    renamed = {}
    for name, value in tensors.items():
        for theirs, released in names.items():
            name = name.replace(theirs, released)
        renamed[name] = value
    for index in range(2):
        for kind in ("weight", "bias"):
            thirds = []
            for name in ("query", "key", "value"):
                hub = f"blocks.{index}.attention.attention.{name}.{kind}"
                flat = f"blocks.{index}.attention.{name[0]}_proj.{kind}"
                thirds.append(renamed.pop(hub, renamed.pop(flat, None)))
            if thirds[1] is None:
                # DINOv3 multiplies the fused bias by a mask; what the bias holds there is noise.
                thirds[1] = np.full_like(thirds[0], np.nan)
                mask = np.repeat(np.float32([1, 0, 1]), len(thirds[0]))
                renamed[f"blocks.{index}.attn.qkv.bias_mask"] = mask
            renamed[f"blocks.{index}.attn.qkv.{kind}"] = np.concatenate(thirds)
    return renamed


@pytest.mark.parametrize("name", IMAGE_FIELDS)
def test_names_of_the_releases_are_read_like_names_of_files(tmp_path, tiny_config, name):
    _, shapes = build(tiny_config, name)
    want = initial_tower("image", save(tmp_path, published(name)), shapes)
    registers = "storage_tokens" if name == "dinov3" else "register_tokens"
    released = as_released(published(name), registers)
    if name == "dinov3":
        released["rope_embed.periods"] = np.ones(2, np.float32)
    assert not [key for key in released if "layer" in key or "attention" in key]
    assert same(initial_tower("image", save(tmp_path, released), shapes), want)


# ---- both halves of the paper's encoder


@pytest.mark.parametrize("naming", ["release", "hub"])
def test_a_plain_vit_fills_both_halves(tmp_path, tiny_config, naming):
    """One layer before the binding, one after it."""
    _, shapes = halves(tiny_config)
    tensors = published("vit")
    path = save(tmp_path, as_released(tensors, "") if naming == "release" else tensors)
    got = initial_tower("image", path, shapes)
    fresh = ("image_encoder/group_token", "image_encoder/binding/")
    encoder = {path for path in shapes if path.startswith("image_encoder/")}
    assert set(got) == {path for path in encoder if not path.startswith(fresh)}
    for layer, stack in enumerate(("first", "second")):
        for name in ("query", "key", "value"):
            kernel = got[f"image_encoder/{stack}/layers/attention/{name}/kernel"]
            source = tensors[f"encoder.layer.{layer}.attention.attention.{name}.weight"]
            np.testing.assert_array_equal(kernel, source.T[None])


@pytest.mark.parametrize(("recipe", "width"), [("vitb", 768), ("vits", 384)])
def test_dino_at_full_size_is_cut_after_its_sixth_layer(recipe, width):
    """Sec. 4.1: layers 0-5 before the binding, 6-11 after it. Every layer holds its index."""
    shapes = variable_shapes(build_model(load_config(CONFIGS / f"{recipe}.py").model))
    tensors = {
        name: np.broadcast_to(np.float32(name.split(".")[1] if "blocks" in name else -1), shape)
        for name, shape in release(width, 12, 196, patch=16, ratio=4).items()
    }
    got = from_vit(tensors, shapes, "dino")
    for stack, start in (("first", 0), ("second", 6)):
        paths = [path for path in got if path.startswith(f"image_encoder/{stack}/")]
        assert len(paths) == 16
        for path in paths:
            assert [layer.min() for layer in got[path]] == list(range(start, start + 6))
            assert [layer.max() for layer in got[path]] == list(range(start, start + 6))
    fresh = ("image_encoder/group_token", "image_encoder/binding/")
    encoder = {path for path in shapes if path.startswith("image_encoder/")}
    assert set(got) == {path for path in encoder if not path.startswith(fresh)}


@pytest.mark.parametrize("binding", ["slot", "grouping_block"])
def test_dinov2_fills_both_halves_with_its_layer_scale_folded_in(tmp_path, tiny_config, binding):
    """Also where the second half sees the groups alone; class token and registers are left out."""
    if binding == "grouping_block":
        tiny_config.model.image.update(binding=binding, second_stage="groups")
    tensors = published("dinov2_registers")
    _, shapes = halves(tiny_config)
    got = initial_tower("image", save(tmp_path, tensors), shapes)
    filled = ("patch_embed/", "position", "first/", "second/", "norm/")
    assert set(got) == {
        path for path in shapes if path.startswith(tuple(f"image_encoder/{x}" for x in filled))
    }
    positions = tensors["embeddings.position_embeddings"][0, 1:]
    np.testing.assert_array_equal(got["image_encoder/position"], positions)
    np.testing.assert_array_equal(got["image_encoder/norm/scale"], tensors["layernorm.weight"])
    for index, stack in enumerate(("first", "second")):
        layer = f"encoder.layer.{index}"
        for ours, theirs, scale in (
            ("attention/out", "attention.output.dense", "layer_scale1"),
            ("mlp/fc2", "mlp.fc2", "layer_scale2"),
        ):
            factor = tensors[f"{layer}.{scale}.lambda1"]
            kernel = got[f"image_encoder/{stack}/layers/{ours}/kernel"][0]
            bias = got[f"image_encoder/{stack}/layers/{ours}/bias"][0]
            np.testing.assert_allclose(kernel, tensors[f"{layer}.{theirs}.weight"].T * factor)
            np.testing.assert_allclose(bias, tensors[f"{layer}.{theirs}.bias"] * factor)


def test_folded_layer_scale_is_the_same_function(tmp_path, tiny_config):
    model, shapes = build(tiny_config, "dinov2", layer_scale=None)
    assert not [path for path in shapes if "attention_scale" in path]
    params = variables(shapes, initial_tower("image", save(tmp_path, published("dinov2")), shapes))
    pairs = hidden_states(model, params, read("dinov2"))
    assert max(relative_error(*pair) for pair in pairs) < 1e-5


# ---- other sizes and forms


def test_other_sizes_are_refused_or_resampled(tmp_path, tiny_config):
    tensors = published("vit")
    path = save(tmp_path, tensors)
    _, shapes = build(tiny_config, "vit", patch=14, grid=(6, 5))
    with pytest.raises(UserError, match="8 pixels, 16 positions") as error:
        initial_tower("image", path, shapes)
    for fault in ("patch_embed/kernel", "image_encoder/position"):
        assert fault in str(error.value)
    with pytest.raises(UserError, match="patch_embed/kernel"):
        initial_tower("image", path, shapes, (6, 5))  # positions are resampled, patches are not
    _, shapes = build(tiny_config, "vit", patch=8, grid=(6, 5))
    with pytest.raises(UserError, match="model.resample_init = True"):
        initial_tower("image", path, shapes)
    got = initial_tower("image", path, shapes, (6, 5))
    positions = tensors["embeddings.position_embeddings"][0]
    wanted = resize_grid(jnp.asarray(positions[1:]), (4, 4), (6, 5))
    np.testing.assert_allclose(got["image_encoder/position"], wanted, rtol=1e-5, atol=1e-5)
    class_token = tensors["embeddings.cls_token"][0] + positions[:1]
    np.testing.assert_array_equal(got["image_encoder/class_token"], class_token)


def test_weights_that_fit_are_not_touched_by_resampling(tmp_path, tiny_config):
    path = save(tmp_path, published("dinov2"))
    _, shapes = build(tiny_config, "dinov2")
    assert same(initial_tower("image", path, shapes, (4, 4)), initial_tower("image", path, shapes))


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("dinov2", "encoder.layer.0.mlp.weights_in.weight"),
        ("dinov2", "encoder.layer.0.mlp.gate_proj.weight"),
        ("dinov3", "layer.0.mlp.gate_proj.weight"),
    ],
)
def test_gated_feed_forward_layers_are_refused(tmp_path, tiny_config, name, gate):
    tensors = {**published(name), gate: np.zeros((48, 24), np.float32)}
    _, shapes = build(tiny_config, name)
    with pytest.raises(UserError, match="SwiGLU"):
        initial_tower("image", save(tmp_path, tensors), shapes)


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
        ("vit", {"group_layer": 1}, ["encoder.layer.1.output.dense.bias has no place"]),
        ("vit", {"group_layer": 3}, ["encoder.layer.2.output.dense.bias is missing"]),
    ],
)
def test_a_trunk_of_another_form_is_refused(tmp_path, tiny_config, name, changes, faults):
    _, shapes = build(tiny_config, name, **{"first_layers": 3, **changes})
    with pytest.raises(UserError) as error:
        initial_tower("image", save(tmp_path, published(name)), shapes)
    assert all(fault in str(error.value) for fault in faults), str(error.value)


def test_half_precision_and_prefixes_are_read(tmp_path, tiny_config):
    tensors = {name: value.astype(np.float16) for name, value in published("dinov3").items()}
    _, shapes = build(tiny_config, "dinov3")
    got = initial_tower("image", save(tmp_path, tensors, "student.backbone."), shapes)
    assert all(value.dtype == np.float32 for value in got.values())
    stored = tensors["embeddings.register_tokens"][0]
    np.testing.assert_array_equal(got["image_encoder/register_tokens"], stored)
    key = got["image_encoder/trunk_layers/layers/attention/key/bias"]
    np.testing.assert_array_equal(key, np.zeros((2, 24)))
