"""DINO, DINOv2 and plain ViT weights under their published names fill our parameters, totally."""

from pathlib import Path

import numpy as np
import pytest
from published_shapes import (
    bert_shapes,
    dino_release_shapes,
    dinov2_shapes,
    draw,
    hub_vit_shapes,
    write,
)

from ovseg_jax.errors import UserError
from ovseg_jax.flags import load_config
from ovseg_jax.models.build import build_model
from ovseg_jax.weights.initialize import initial_image, initial_text, variable_shapes
from ovseg_jax.weights.vit import from_vit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plain(tiny_model):
    return variable_shapes(tiny_model)


@pytest.fixture
def with_trunk(tiny_config):
    """A model with a DINOv2 trunk of one layer, width 16."""
    tiny_config.model.image.update(
        group_layer=1,
        trunk_width=16,
        trunk_heads=2,
        class_token=True,
        trunk_norm=True,
        layer_scale=1.0,
    )
    return variable_shapes(build_model(tiny_config.model))


def apply_patch_kernel(weight, pixels):
    """A convolution with stride P on one patch [P, P, 3], written out."""
    return np.einsum("dcyx,yxc->d", weight, pixels)


def test_dinov2_fills_the_trunk(tmp_path, with_trunk):
    tensors = draw(dinov2_shapes())
    got = initial_image(write(tmp_path, tensors, "backbone."), with_trunk)
    own = ("image_encoder/trunk", "image_encoder/patch", "image_encoder/pos", "image_encoder/class")
    assert set(got) == {path for path in with_trunk if path.startswith(own)}
    assert all(got[path].shape == with_trunk[path] for path in got)
    patch = np.random.default_rng(1).normal(size=(8, 8, 3))
    np.testing.assert_allclose(
        patch.reshape(-1) @ got["image_encoder/patch_embed/kernel"],
        apply_patch_kernel(tensors["embeddings.patch_embeddings.projection.weight"], patch),
        rtol=1e-5,
        atol=1e-5,
    )
    positions = tensors["embeddings.position_embeddings"]
    np.testing.assert_array_equal(got["image_encoder/position"], positions[0, 1:])
    np.testing.assert_allclose(
        got["image_encoder/class_token"], tensors["embeddings.cls_token"][0] + positions[0, :1]
    )
    stack = "image_encoder/trunk_layers/layers"
    layer = "encoder.layer.0"
    for path, name in (
        ("attention_scale/scale", "layer_scale1.lambda1"),
        ("mlp_scale/scale", "layer_scale2.lambda1"),
        ("mlp_norm/bias", "norm2.bias"),
    ):
        np.testing.assert_array_equal(got[f"{stack}/{path}"][0], tensors[f"{layer}.{name}"])


@pytest.mark.parametrize("naming", ["release", "hub"])
def test_a_plain_vit_fills_both_halves(tmp_path, plain, naming):
    """Two layers before the binding, one after it."""
    norms = ("layernorm_before", "layernorm_after")
    tensors = draw(
        dino_release_shapes() if naming == "release" else hub_vit_shapes(norms, 32, 3, 16)
    )
    got = initial_image(write(tmp_path, tensors), plain)
    fresh = ("image_encoder/group_token", "image_encoder/binding/")
    assert set(got) == {
        path for path in plain if path.startswith("image_encoder/") and not path.startswith(fresh)
    }
    for place, index, layer in (("first", 0, 0), ("first", 1, 1), ("second", 0, 2)):
        for part, name in enumerate(("query", "key", "value")):
            kernel = got[f"image_encoder/{place}/layers/attention/{name}/kernel"][index]
            if naming == "release":
                fused = tensors[f"blocks.{layer}.attn.qkv.weight"]
                source = fused[32 * part : 32 * (part + 1)]
            else:
                source = tensors[f"encoder.layer.{layer}.attention.attention.{name}.weight"]
            np.testing.assert_array_equal(kernel, source.T)


@pytest.mark.parametrize(("recipe", "width"), [("vitb", 768), ("vits", 384)])
def test_dino_at_full_size_is_cut_after_its_sixth_layer(recipe, width):
    """Sec. 4.1: layers 0-5 before the binding, 6-11 after it. Every layer holds its index."""
    shapes = variable_shapes(build_model(load_config(ROOT / "configs" / f"{recipe}.py").model))
    names = dino_release_shapes(width, 12, 196, patch=16, ratio=4)
    tensors = {
        name: np.broadcast_to(np.float32(name.split(".")[1] if "blocks" in name else -1), shape)
        for name, shape in names.items()
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


def test_a_vit_of_another_depth_is_refused(tmp_path, plain):
    for depth, fault in ((2, "is missing"), (4, "has no place")):
        path = write(tmp_path, draw(dino_release_shapes(depth=depth)))
        with pytest.raises(UserError, match=f"blocks.{min(depth, 3)}.*{fault}"):
            initial_image(path, plain)


def test_weights_of_another_kind_are_refused(tmp_path, plain):
    path = write(tmp_path, draw(bert_shapes()))
    with pytest.raises(UserError, match="config.model.image_init") as error:
        initial_image(path, plain)
    assert path in str(error.value)


@pytest.mark.parametrize("read", [initial_image, initial_text])
def test_files_that_cannot_be_read_are_user_errors(tmp_path, plain, read):
    whole = write(tmp_path, draw(bert_shapes()))
    content = Path(whole).read_bytes()
    cases = {
        "cut.safetensors": content[: len(content) // 2],
        "noise.safetensors": b"\xff" * 200,
        "empty.safetensors": b"",
        "empty.npz": b"",
        "noise.npz": b"PK\x03\x04" + b"\x00" * 50,
        "noise.onnx": b"\xff" * 64,
        "model.bin": content,
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            read(str(tmp_path / name), plain)
        assert name in str(error.value)
    with (tmp_path / "one_array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "nowhere.npz", tmp_path / "empty", tmp_path / "one_array.npz"):
        with pytest.raises(UserError) as error:
            read(str(missing), plain)
        assert missing.name in str(error.value)
    with pytest.raises(UserError, match="no_such_package"):
        read("package:no_such_package/model.safetensors", plain)
