"""DINOv2 ViT trunks (Oquab et al., 2023) under Hugging Face's tensor names."""

import re

import numpy as np

from ovseg_jax.weights.convert_tree import Rule, transpose
from ovseg_jax.weights.tensors import Tensors

# The mask token serves DINOv2's own training; a decoder is what a host model put on top.
DROPPED = (r"embeddings\.mask_token", r"decoder\..*")

_LAYER = {
    "attention_norm/scale": "norm1.weight",
    "attention_norm/bias": "norm1.bias",
    "attention_scale/scale": "layer_scale1.lambda1",
    "mlp_norm/scale": "norm2.weight",
    "mlp_norm/bias": "norm2.bias",
    "mlp_scale/scale": "layer_scale2.lambda1",
}
_LINEAR = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def is_dinov2(tensors: Tensors) -> bool:
    """Whether the names are those of a DINOv2 backbone (any prefix removed)."""
    return "encoder.layer.0.layer_scale1.lambda1" in tensors


def separate_positions(tensors: Tensors) -> Tensors:
    """Splits the position embeddings [1, 1 + L, D] off their class token.

    The class token's own position is added to the class token, where our trunk expects it, and
    the patches keep [1, L, D]. An ONNX export holds the two parts as constants of the Concat and
    the Reshape that once assembled them.
    """
    tensors = dict(tensors)
    positions = tensors.pop("embeddings.position_embeddings", None)
    if positions is None:
        folded = {re.sub(r"_\d+$", "", name): name for name in tensors}
        head, tail = folded.get("embeddings.Concat"), folded.get("embeddings.Reshape")
        if head is None or tail is None:
            return tensors  # the conversion will say that they are missing
        first, rest = tensors.pop(head), tensors.pop(tail)
        positions = np.concatenate(
            [first.reshape(1, 1, -1), rest.reshape(1, -1, first.shape[-1])], axis=1
        )
    if "embeddings.cls_token" in tensors:
        tensors["embeddings.cls_token"] = tensors["embeddings.cls_token"] + positions[:, :1]
    tensors["embeddings.position_embeddings"] = positions[:, 1:]
    return tensors


def dinov2_rules(layers: int) -> list[Rule]:
    """Rules for a visual trunk with class token, layer scale and a final norm.

    Args:
      layers: depth of the trunk.
    """
    stack = "image_encoder/trunk_layers/layers"

    def names(suffix: str) -> tuple[str, ...]:
        return tuple(f"encoder.layer.{index}.{suffix}" for index in range(layers))

    rules = [
        Rule(
            "image_encoder/patch_embed/kernel",
            ("embeddings.patch_embeddings.projection.weight",),
            # [D, 3, P, P] to the flattened (row, column, channel) order of our patches
            lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
        ),
        Rule("image_encoder/patch_embed/bias", ("embeddings.patch_embeddings.projection.bias",)),
        Rule("image_encoder/class_token", ("embeddings.cls_token",), lambda w: w[0]),
        Rule("image_encoder/position", ("embeddings.position_embeddings",), lambda w: w[0]),
        Rule("image_encoder/trunk_end/scale", ("layernorm.weight",)),
        Rule("image_encoder/trunk_end/bias", ("layernorm.bias",)),
    ]
    rules += [Rule(f"{stack}/{ours}", names(theirs), stack=True) for ours, theirs in _LAYER.items()]
    for ours, theirs in _LINEAR.items():
        rules.append(Rule(f"{stack}/{ours}/kernel", names(f"{theirs}.weight"), transpose, True))
        rules.append(Rule(f"{stack}/{ours}/bias", names(f"{theirs}.bias"), stack=True))
    return rules
