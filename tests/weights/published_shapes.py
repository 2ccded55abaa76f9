"""Shapes of published towers under their names, random weights for them, and files of these."""

import numpy as np
from safetensors.numpy import save_file


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


def dino_release_shapes(width=32, depth=3, patches=16, patch=8, ratio=2):
    """The names of DINO's own release, with fused query, key and value."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **norm("norm", width),
    }
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= linear(f"{block}.attn.qkv", width, 3 * width)
        shapes |= linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", width, ratio * width)
        shapes |= linear(f"{block}.mlp.fc2", ratio * width, width)
        shapes |= {**norm(f"{block}.norm1", width), **norm(f"{block}.norm2", width)}
    return shapes


def draw(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(tmp_path, tensors, prefix=""):
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return str(path)
