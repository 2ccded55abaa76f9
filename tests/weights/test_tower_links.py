"""Published ViTs and BERTs fill our towers, totally, and what they differ in beyond names."""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import (
    IMAGE_FIELDS,
    build,
    hidden_states,
    published,
    read,
    relative_error,
    same,
    save,
    variables,
)

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.models.vit import resize_grid
from ovseg_jax.train.config import load_config
from ovseg_jax.weights.initialize import initial_tower
from ovseg_jax.weights.tower_links import STYLES, from_vit

CONFIGS = Path(__file__).parents[2] / "configs"
# Parameters of the visual encoder that no ViT fills.
FRESH = ("image_encoder/group_token", "image_encoder/binding/")


def read_image(folder, tensors, shapes, grid=None, prefix=""):
    return initial_tower("image", save(folder, tensors, prefix), shapes, grid)


def halves(config):
    """A model of the paper's form: no trunk, one layer before the binding, one after it."""
    fields = {"width": 24, "heads": 3, "first_layers": 1, "second_layers": 1, "group_layer": 0}
    fields |= {"class_token": False, "trunk_norm": False, "trunk_width": 0, "trunk_heads": 0}
    return build(config, "vit", **fields)


INNER = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")


def as_released(tensors, name, registers="register_tokens"):
    """The weights of a hub file under the names of DINO's, DINOv2's and DINOv3's own releases."""
    style = STYLES[name.removesuffix("_registers")]
    names = dict(zip(style.bare, ("cls_token", registers, "pos_embed"), strict=True))
    names["embeddings.mask_token"] = "mask_token"
    maps = {style.patch: "patch_embed.proj", style.norm: "norm"}
    theirs = (*style.norms, style.attention[3], *style.mlp)
    for index in range(2):
        layer, block = style.layer.format(index), f"blocks.{index}."
        for old, new in zip(theirs, INNER, strict=True):
            maps[layer + old] = block + new
        names |= {layer + scale: f"{block}ls{i}.gamma" for i, scale in enumerate(style.scales, 1)}
    names |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in maps.items() for kind in ("weight", "bias")}
    renamed = {names[key]: value for key, value in tensors.items() if key in names}
    for index, kind in itertools.product(range(2), ("weight", "bias")):
        layer, block = style.layer.format(index), f"blocks.{index}.attn.qkv."
        thirds = [tensors.get(f"{layer}{stem}.{kind}") for stem in style.attention[:3]]
        if thirds[1] is None:
            # DINOv3 multiplies the fused bias by a mask; what the bias holds there is noise.
            thirds[1] = np.full_like(thirds[0], np.nan)
            renamed[f"{block}bias_mask"] = np.repeat(np.float32([1, 0, 1]), len(thirds[0]))
        renamed[block + kind] = np.concatenate(thirds)
    return renamed


@pytest.mark.parametrize("name", IMAGE_FIELDS)
def test_names_of_the_releases_are_read_like_names_of_files(tmp_path, tiny_config, name):
    _, shapes = build(tiny_config, name)
    want = read_image(tmp_path, published(name), shapes)
    registers = "storage_tokens" if name == "dinov3" else "register_tokens"
    released = as_released(published(name), name, registers)
    if name == "dinov3":
        released["rope_embed.periods"] = np.ones(2, np.float32)
    assert not [key for key in released if "layer" in key or "attention" in key]
    assert same(read_image(tmp_path, released, shapes), want)


# ---- both halves of the paper's encoder


@pytest.mark.parametrize("naming", ["release", "hub"])
def test_a_plain_vit_fills_both_halves(tmp_path, tiny_config, naming):
    """One layer before the binding, one after it."""
    _, shapes = halves(tiny_config)
    tensors = published("vit")
    given = as_released(tensors, "vit") if naming == "release" else tensors
    got = read_image(tmp_path, given, shapes)
    encoder = {path for path in shapes if path.startswith("image_encoder/")}
    assert set(got) == {path for path in encoder if not path.startswith(FRESH)}
    for layer, stack in enumerate(("first", "second")):
        for name in ("query", "key", "value"):
            kernel = got[f"image_encoder/{stack}/layers/attention/{name}/kernel"]
            source = tensors[f"encoder.layer.{layer}.attention.attention.{name}.weight"]
            np.testing.assert_array_equal(kernel, source.T[None])


@pytest.mark.parametrize(("recipe", "width"), [("vitb", 768), ("vits", 384)])
def test_dino_at_full_size_is_cut_after_its_sixth_layer(recipe, width):
    """Sec. 4.1: layers 0-5 before the binding, 6-11 after it. Every layer holds its index."""
    shapes = variable_shapes(build_model(load_config(CONFIGS / f"{recipe}.py").model))
    sizes = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    sizes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    maps = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for index in range(12):
        for name, (out, inside) in maps.items():
            sizes[f"blocks.{index}.{name}.weight"] = (out * width, inside * width)
            sizes[f"blocks.{index}.{name}.bias"] = (out * width,)
    for norm in ("norm", *(f"blocks.{index}.norm{i}" for index in range(12) for i in (1, 2))):
        sizes |= {f"{norm}.{kind}": (width,) for kind in ("weight", "bias")}
    tensors = {
        name: np.broadcast_to(np.float32(name.split(".")[1] if "blocks" in name else -1), size)
        for name, size in sizes.items()
    }
    got = from_vit(tensors, shapes, "dino")
    for stack, start in (("first", 0), ("second", 6)):
        paths = [path for path in got if path.startswith(f"image_encoder/{stack}/")]
        assert len(paths) == 16
        for path in paths:
            assert [layer.min() for layer in got[path]] == list(range(start, start + 6))
            assert [layer.max() for layer in got[path]] == list(range(start, start + 6))


@pytest.mark.parametrize("binding", ["slot", "grouping_block"])
def test_dinov2_fills_both_halves_with_its_layer_scale_folded_in(tmp_path, tiny_config, binding):
    """Also where the second half sees the groups alone; class token and registers are left out."""
    if binding == "grouping_block":
        tiny_config.model.image.update(binding=binding, second_stage="groups")
    tensors = published("dinov2_registers")
    _, shapes = halves(tiny_config)
    got = read_image(tmp_path, tensors, shapes)
    filled = ("patch_embed/", "position", "first/", "second/", "norm/")
    filled = tuple(f"image_encoder/{name}" for name in filled)
    assert set(got) == {path for path in shapes if path.startswith(filled)}
    positions = tensors["embeddings.position_embeddings"][0, 1:]
    np.testing.assert_array_equal(got["image_encoder/position"], positions)
    np.testing.assert_array_equal(got["image_encoder/norm/scale"], tensors["layernorm.weight"])


def test_folded_layer_scale_is_the_same_function(tmp_path, tiny_config):
    model, shapes = build(tiny_config, "dinov2", layer_scale=None)
    assert not [path for path in shapes if "attention_scale" in path]
    params = variables(shapes, read_image(tmp_path, published("dinov2"), shapes))
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
    _, shapes = build(tiny_config, "vit", grid=(4, 4))  # what fits is not touched
    assert same(initial_tower("image", path, shapes, (4, 4)), initial_tower("image", path, shapes))


GATES = ("encoder.layer.0.mlp.weights_in.weight", "encoder.layer.0.mlp.gate_proj.weight")


@pytest.mark.parametrize("gate", [*GATES, "layer.0.mlp.gate_proj.weight"])
def test_gated_feed_forward_layers_are_refused(tmp_path, tiny_config, gate):
    name = "dinov2" if gate in GATES else "dinov3"
    tensors = {**published(name), gate: np.zeros((48, 24), np.float32)}
    _, shapes = build(tiny_config, name)
    with pytest.raises(UserError, match="SwiGLU"):
        read_image(tmp_path, tensors, shapes)


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
        read_image(tmp_path, published(name), shapes)
    assert all(fault in str(error.value) for fault in faults), str(error.value)


def test_half_precision_and_prefixes_are_read(tmp_path, tiny_config):
    tensors = {name: value.astype(np.float16) for name, value in published("dinov3").items()}
    _, shapes = build(tiny_config, "dinov3")
    got = read_image(tmp_path, tensors, shapes, prefix="student.backbone.")
    assert all(value.dtype == np.float32 for value in got.values())
    stored = tensors["embeddings.register_tokens"][0]
    np.testing.assert_array_equal(got["image_encoder/register_tokens"], stored)
    key = got["image_encoder/trunk_layers/layers/attention/key/bias"]
    np.testing.assert_array_equal(key, np.zeros((2, 24)))


# ---- BERT


def read_bert(folder, tensors, shapes, prefix=""):
    return initial_tower("text", save(folder, tensors, prefix), shapes)


def test_old_names_prefixes_and_heads(tmp_path, tiny_config):
    """Files from TensorFlow say gamma and beta; a language model's heads are dropped by name."""
    _, shapes = build(tiny_config, "bert")
    tensors = published("bert")
    want = read_bert(tmp_path, tensors, shapes)
    assert set(want) == {path for path in shapes if path.startswith("text_encoder/")}
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    assert sum("gamma" in key for key in tensors) == 5
    assert same(read_bert(tmp_path, tensors, shapes, "bert."), want)
    tensors = {f"bert.{key}": value for key, value in published("bert").items()}
    for name in ("cls.predictions.bias", "cls.seq_relationship.weight"):
        tensors[name] = np.zeros(3, np.float32)
    assert same(read_bert(tmp_path, tensors, shapes), want)
    tensors["head_of_another_kind.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="head_of_another_kind.weight has no place"):
        read_bert(tmp_path, tensors, shapes)


def test_every_tensor_of_a_bert_at_fault_is_named_in_one_error(tmp_path, tiny_config):
    _, shapes = build(tiny_config, "bert")
    tensors = published("bert")
    del tensors["embeddings.LayerNorm.bias"]
    tensors["adapter.weight"] = np.zeros(3, np.float32)
    query = "encoder.layer.1.attention.self.query.weight"
    word = "embeddings.word_embeddings.weight"
    tensors |= {query: tensors[query][:, :-1], word: tensors[word][:-1]}
    with pytest.raises(UserError) as error:
        read_bert(tmp_path, tensors, shapes)
    for fault in (
        str(tmp_path),
        "embeddings.LayerNorm.bias is missing",
        "adapter.weight has no place",
        "text_encoder/word has shape (40, 24)",
        "text_encoder/layers/attention/query/kernel has shape (24, 24)",
    ):
        assert fault in str(error.value), fault
    _, shapes = build(tiny_config, "bert", depth=1)
    with pytest.raises(UserError, match="encoder.layer.1.*has no place"):
        read_bert(tmp_path, published("bert"), shapes)
