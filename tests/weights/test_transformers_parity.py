"""Tiny random models of transformers give the same hidden states here as in PyTorch.

Compared: all tokens of padded texts, all patches of images of four sizes (the stored grid, a
larger, a smaller one, and one with as many cells that is not square), relative to the norm of the
whole array. `make_transformers_golden.py` says what made the arrays.
"""

import numpy as np
import pytest
from golden_models import (
    IMAGE_FIELDS,
    build,
    file_tensors,
    hidden_states,
    read,
    relative_error,
    variables,
)
from safetensors.numpy import save_file

from ovseg_jax.weights.initialize import initial_image, initial_text


def load(tmp_path, name, tensors, shapes):
    path = tmp_path / f"{name}.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return (initial_text if name == "bert" else initial_image)(str(path), shapes)


def worst_error(tmp_path, config, name, **changes):
    arrays = read(name)
    model, shapes = build(config, name, **changes)
    params = variables(shapes, load(tmp_path, name, file_tensors(arrays), shapes))
    return max(relative_error(*pair) for pair in hidden_states(model, params, arrays))


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
            parts = []
            for part in ("query", "key", "value"):
                hub = f"blocks.{index}.attention.attention.{part}.{kind}"
                flat = f"blocks.{index}.attention.{part[0]}_proj.{kind}"
                parts.append(renamed.pop(hub, renamed.pop(flat, None)))
            if parts[1] is None:
                # DINOv3 multiplies the fused bias by a mask; what the bias holds there is noise.
                parts[1] = np.full_like(parts[0], np.nan)
                mask = np.repeat(np.float32([1, 0, 1]), len(parts[0]))
                renamed[f"blocks.{index}.attn.qkv.bias_mask"] = mask
            renamed[f"blocks.{index}.attn.qkv.{kind}"] = np.concatenate(parts)
    return renamed


@pytest.mark.parametrize("name", IMAGE_FIELDS)
def test_names_of_the_releases_are_read_like_names_of_files(tmp_path, tiny_config, name):
    files = file_tensors(read(name))
    _, shapes = build(tiny_config, name)
    want = load(tmp_path, name, files, shapes)
    registers = "storage_tokens" if name == "dinov3" else "register_tokens"
    released = as_released(files, registers)
    if name == "dinov3":
        released["rope_embed.periods"] = np.ones(2, np.float32)
    assert not [key for key in released if "layer" in key or "attention" in key]
    got = load(tmp_path, name, released, shapes)
    assert set(got) == set(want)
    assert all(np.array_equal(got[path], want[path]) for path in want)
