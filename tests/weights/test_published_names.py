"""BERT, DINOv2 and plain ViT weights under their published names fill our parameters, totally."""

from pathlib import Path

import numpy as np
import pytest
from golden_models import build, file_tensors, read
from safetensors.numpy import save_file

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.weights.initialize import initial_image, initial_text, model_shapes


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name, inside, outside):
    return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}


def bert_shapes(width=24, hidden=48, depth=2, vocabulary=48, positions=12):
    """Hugging Face's names for a BERT of the tiny model's size."""
    shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, width),
        "embeddings.position_embeddings.weight": (positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **norm("embeddings.LayerNorm", width),
        "embeddings.position_ids": (1, positions),
        **linear("pooler.dense", width, width),
    }
    for index in range(depth):
        layer = f"encoder.layer.{index}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{part}", width, width)
        shapes |= linear(f"{layer}.intermediate.dense", width, hidden)
        shapes |= linear(f"{layer}.output.dense", hidden, width)
        for part in ("attention.output", "output"):
            shapes |= norm(f"{layer}.{part}.LayerNorm", width)
    return shapes


def hub_vit_shapes(norms, width, depth, patches, scales=()):
    """Hugging Face's names for a ViT: plain, or DINOv2's with layer scale."""
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1 + patches, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 8, 8),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **norm("layernorm", width),
    }
    for index in range(depth):
        layer = f"encoder.layer.{index}"
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{part}", width, width)
        fc1, fc2 = ("mlp.fc1", "mlp.fc2") if scales else ("intermediate.dense", "output.dense")
        shapes |= linear(f"{layer}.{fc1}", width, 2 * width)
        shapes |= linear(f"{layer}.{fc2}", 2 * width, width)
        for name in norms:
            shapes |= norm(f"{layer}.{name}", width)
        shapes |= {f"{layer}.{name}": (width,) for name in scales}
    return shapes


def dinov2_shapes(width=16, depth=1, patches=16):
    scales = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    shapes = hub_vit_shapes(("norm1", "norm2"), width, depth, patches, scales=scales)
    return {**shapes, "embeddings.mask_token": (1, width)}


def dino_release_shapes(width=32, depth=3, patches=16):
    """The names of DINO's own release, with fused query, key and value."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "patch_embed.proj.bias": (width,),
        **norm("norm", width),
    }
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= linear(f"{block}.attn.qkv", width, 3 * width)
        shapes |= linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", width, 2 * width)
        shapes |= linear(f"{block}.mlp.fc2", 2 * width, width)
        shapes |= {**norm(f"{block}.norm1", width), **norm(f"{block}.norm2", width)}
    return shapes


def draw(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(tmp_path, tensors, prefix=""):
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def plain(tiny_model):
    return model_shapes(tiny_model)


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
    return model_shapes(build_model(tiny_config.model))


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


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_heads_of_language_models_are_dropped_by_name(tmp_path, tiny_config, name):
    """Prefix and heads as the masked language models have them; anything else is refused."""
    heads = {
        "bert": ["cls.predictions.bias", "cls.seq_relationship.weight", "bert.pooler.dense.weight"],
        "roberta": ["lm_head.bias", "lm_head.layer_norm.weight", "lm_head.decoder.weight"],
        "distilbert": ["vocab_projector.bias", "vocab_transform.weight", "vocab_layer_norm.bias"],
    }
    tensors = file_tensors(read(name))
    tensors = {key: value for key, value in tensors.items() if not key.startswith("pooler.")}
    _, shapes = build(tiny_config, name)
    want = initial_text(write(tmp_path, tensors), shapes)
    tensors = {f"{name}.{key}": value for key, value in tensors.items()}
    tensors |= {key: np.zeros(3, np.float32) for key in heads[name]}
    got = initial_text(write(tmp_path, tensors), shapes)
    assert set(got) == {path for path in shapes if path.startswith("text_encoder/")}
    assert all(np.array_equal(got[path], want[path]) for path in want)
    tensors["head_of_another_kind.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="head_of_another_kind.weight has no place"):
        initial_text(write(tmp_path, tensors), shapes)


@pytest.mark.parametrize("types", [0, 2])
def test_other_token_types_are_refused(tmp_path, tiny_config, types):
    _, shapes = build(tiny_config, "roberta", token_types=types)
    with pytest.raises(UserError, match="token_type"):
        initial_text(write(tmp_path, file_tensors(read("roberta"))), shapes)


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


def test_a_vit_of_another_depth_is_refused(tmp_path, plain):
    for depth, fault in ((2, "is missing"), (4, "has no place")):
        path = write(tmp_path, draw(dino_release_shapes(depth=depth)))
        with pytest.raises(UserError, match=f"blocks.{min(depth, 3)}.*{fault}"):
            initial_image(path, plain)


def test_weights_of_another_kind_are_refused(tmp_path, plain):
    path = write(tmp_path, draw(bert_shapes()))
    with pytest.raises(UserError, match="config.model_init.image") as error:
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
