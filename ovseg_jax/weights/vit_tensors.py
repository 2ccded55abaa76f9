"""Tensors of a published ViT brought to the form that rules can map one to one.

What differs beyond names: fused query-key-value maps, a position for the class token, absent key
biases, layer scale where our layers have none, another grid.
"""

from math import isqrt

import numpy as np

from ovseg_jax.weights.resample import resize_positions
from ovseg_jax.weights.tensors import Tensors
from ovseg_jax.weights.vit_names import Style

# Other names of the release style for what DINOv2 calls register_tokens: DINOv3's and timm's.
_REGISTERS = ("storage_tokens", "reg_token")


def split_fused(tensors: Tensors) -> Tensors:
    """Fused query-key-value maps as three, under "attn.query" and so on; the rest as it is.

    DINOv3 keeps the bias of its keys at zero with a mask, `bias_mask`; it is applied here.
    """
    result: Tensors = {}
    for name, value in tensors.items():
        if ".attn.qkv." not in name:
            result[name] = value
            continue
        if name.endswith("bias_mask"):
            continue
        mask = tensors.get(f"{name}_mask")
        if mask is not None:
            value = np.where(np.asarray(mask, np.float32) == 0, 0, value).astype(value.dtype)
        for part, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            result[name.replace(".qkv.", f".{part}.")] = piece
    return result


def one_name_for_registers(tensors: Tensors) -> Tensors:
    """Register tokens of the release style under one name."""
    other = {name: "register_tokens" for name in _REGISTERS}
    return {other.get(name, name): value for name, value in tensors.items()}


def zero_key_biases(tensors: Tensors, style: Style) -> Tensors:
    """Adds the zero bias of keys where only the query has one (DINOv3).

    Our keys always have a bias. Beginning at zero it changes nothing.
    """
    query, key = (f".{name}.bias" for name in style.attention[:2])
    added = {
        name.removesuffix(query) + key: np.zeros_like(value)
        for name, value in tensors.items()
        if name.endswith(query)
    }
    return {**added, **tensors}


def separate_positions(tensors: Tensors, style: Style, patches: int) -> Tensors:
    """Splits position embeddings [1, 1 + L, D] off their class token.

    The class token's own position is added to the class token, where our trunk expects it, and
    the patches keep [L, D].

    Args:
      patches: L of the model; where the embeddings fit neither L nor 1 + L, their own grid is
        taken for a square one.
    """
    class_token, _, position = style.bare
    if position not in tensors:
        return tensors
    table = tensors[position].reshape(-1, tensors[position].shape[-1])
    extra = len(table) - patches
    if extra not in (0, 1):
        extra = min(1, len(table) - isqrt(len(table)) ** 2)
    result = {**tensors, position: table[extra:]}
    if extra and class_token in tensors:
        token = tensors[class_token]
        result[class_token] = token + table[:1].reshape((1,) * (token.ndim - 1) + (-1,))
    return result


def fold_layer_scale(tensors: Tensors, style: Style, layers: range) -> Tensors:
    """Multiplies the layer scale of some layers into the maps that end their branches.

    For layers of ours without a layer scale; the function stays the same.
    """
    tensors = dict(tensors)
    for index in layers:
        for scale, end in zip(style.scales, (style.attention[3], style.mlp[1]), strict=True):
            factor = tensors.pop(style.layer.format(index) + scale, None)
            stem = style.layer.format(index) + end
            if factor is None:
                continue
            for name in (f"{stem}.weight", f"{stem}.bias"):
                if name in tensors:
                    value = tensors[name]
                    tensors[name] = value * factor.reshape((-1,) + (1,) * (value.ndim - 1))
    return tensors


def resample(tensors: Tensors, style: Style, grid: tuple[int, int]) -> Tensors:
    """Positions (of the patches alone) for another grid."""
    position = style.bare[2]
    tensors = dict(tensors)
    side = isqrt(len(tensors[position])) if position in tensors else 0
    if side and side * side == len(tensors[position]) and (side, side) != grid:
        tensors[position] = resize_positions(tensors[position], (side, side), grid)
    return tensors
