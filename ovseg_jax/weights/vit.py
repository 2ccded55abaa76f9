"""Published ViTs (DINO, DeiT, MAE, DINOv2, DINOv3, ...) as our visual encoder.

Where the encoder's trunk ends in a norm of its own (`trunk_norm`), the whole ViT becomes the
trunk, in front of the groups. Otherwise it fills all layers: the first ones before the binding,
the others after it (paper, Sec. 4.1: layers 0-5 and 6-11 of DINO), and its final norm becomes the
encoder's. Group tokens, binding and neck are never among the parameters that it fills.
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.models.vit import cubic_weights
from ovseg_jax.weights.links import Link, Shapes, linear, matching, module, norm, read_links
from ovseg_jax.weights.tensors import Tensors

ROOT = "image_encoder"
STACKS = ("trunk_layers", "first", "second")
BARE = ("class_token", "register_tokens", "position")
_LAYER = (
    "attention_norm",
    "mlp_norm",
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/out",
    "mlp/fc1",
    "mlp/fc2",
)


@dataclass(frozen=True)
class Style:
    """Names in one published style; ".weight" or ".bias" is added to all but bare ones.

    Attributes:
      layer: what precedes the names of a layer, with {} for its index.
      norms: before attention and feed-forward.
      attention: query, key, value and output.
      mlp: first and second map.
      scales: layer scale of the two branches (bare).
      patch, norm: patch embedding and final norm.
      bare: class token, register tokens and position embeddings.
    """

    layer: str
    norms: tuple[str, str]
    attention: tuple[str, str, str, str]
    mlp: tuple[str, str]
    scales: tuple[str, str]
    patch: str
    norm: str
    bare: tuple[str, str, str]


_HUB_ATTENTION = tuple(
    f"attention.{n}"
    for n in ("attention.query", "attention.key", "attention.value", "output.dense")
)
_HUB_BARE = tuple(
    f"embeddings.{n}" for n in ("cls_token", "register_tokens", "position_embeddings")
)
_LAMBDAS = ("layer_scale1.lambda1", "layer_scale2.lambda1")
_NORMS = ("norm1", "norm2")
_CONVOLUTION = "embeddings.patch_embeddings.projection"

# "release" is DINO, DeiT, DINOv2, DINOv3 and timm; the others are Hugging Face's files, which keep
# these names although transformers 5 calls its modules otherwise.
# fmt: off
STYLES: dict[str, Style] = {
    "release": Style(
        "blocks.{}.", _NORMS, ("attn.query", "attn.key", "attn.value", "attn.proj"),
        ("mlp.fc1", "mlp.fc2"), ("ls1.gamma", "ls2.gamma"), "patch_embed.proj", "norm",
        ("cls_token", "register_tokens", "pos_embed"),
    ),
    "vit": Style(
        "encoder.layer.{}.", ("layernorm_before", "layernorm_after"), _HUB_ATTENTION,
        ("intermediate.dense", "output.dense"), _LAMBDAS, _CONVOLUTION, "layernorm", _HUB_BARE,
    ),
    "dinov2": Style(
        "encoder.layer.{}.", _NORMS, _HUB_ATTENTION, ("mlp.fc1", "mlp.fc2"), _LAMBDAS,
        _CONVOLUTION, "layernorm", _HUB_BARE,
    ),
    "dinov3": Style(
        "layer.{}.", _NORMS, tuple(f"attention.{name}_proj" for name in "qkvo"),
        ("mlp.up_proj", "mlp.down_proj"), _LAMBDAS, "embeddings.patch_embeddings", "norm",
        _HUB_BARE,
    ),
}
# fmt: on

# The name that ends a patch embedding says what precedes every name ("backbone.", "vit.", ...).
ANCHORS = tuple(dict.fromkeys(f"{style.patch}.weight" for style in STYLES.values()))

# What serves another purpose than features: the mask token and heads of their own training,
# decoders and classifiers put on top, constants that follow from the config.
DROPPED = (
    r"(embeddings\.)?mask_token",
    r"(head|fc_norm|pooler|classifier|decoder|local_cls_norm)\..*",
    r"rope_embed(dings)?\.(periods|inv_freq)",
)

# First maps of a gated feed-forward layer (DINOv2 giant, DINOv3 ViT-S+, ViT-H+ and 7B).
_GATED = ("mlp.w12", "mlp.w1", "mlp.weights_in", "mlp.gate_proj")


def from_vit(
    tensors: Tensors, shapes: Shapes, origin: str, resample_to: tuple[int, int] | None = None
) -> dict[str, np.ndarray] | None:
    """Parameters of the visual encoder from a published ViT.

    Args:
      tensors: without a prefix such as "backbone.".
      shapes: of all the model's parameters.
      origin: where the tensors come from, for messages.
      resample_to: the model's grid (rows, columns), to resize positions of another grid to it.

    Returns:
      path to array, for the parameters that a ViT fills; None where the tensors are no ViT's.

    Raises:
      UserError: lists every tensor that is missing, left over or misshapen.
    """
    tensors = _split_fused(tensors)
    style = find_style(tensors, origin)
    if style is None:
        return None
    as_trunk = f"{ROOT}/trunk_end/scale" in shapes
    stacks = _layers(shapes, STACKS[:1] if as_trunk else STACKS)
    tensors = _plain_tokens(_zero_key_biases(_name_onnx_positions(tensors, style), style), style)
    patches = shapes.get(f"{ROOT}/position", (0,))[0]
    tensors = _separate_positions(tensors, style, patches)
    for stack, indices in stacks.items():
        if f"{ROOT}/{stack}/layers/attention_scale/scale" not in shapes:
            tensors = _fold_layer_scale(tensors, style, indices)
    patch = isqrt(shapes[f"{ROOT}/patch_embed/kernel"][0] // 3)
    kernel, table = tensors.get(f"{style.patch}.weight"), tensors.get(style.bare[2])
    given = (0 if kernel is None else kernel.shape[-1], 0 if table is None else len(table))
    if resample_to is not None and table is not None:
        tensors = {**tensors, style.bare[2]: _resize_positions(table, resample_to)}
    dropped = matching(tensors, DROPPED)
    if not as_trunk:
        # Beside the groups there is no room for the class token and registers.
        dropped += style.bare[:2]
    names = [*stacks, "patch_embed", *BARE, "trunk_end" if as_trunk else "norm"]
    wanted = {
        path: shape
        for path, shape in shapes.items()
        if path.startswith(f"{ROOT}/") and path.split("/")[1] in names
    }
    try:
        return read_links(tensors, vit_links(style, stacks, wanted), wanted, dropped, origin)
    except UserError as error:
        if resample_to is None and given != (patch, patches):
            raise UserError(
                f"{error}\n(these weights: patches of {given[0]} pixels, {given[1]} positions; the "
                f"model: {patch} and {patches}. Give the model the weights' "
                "config.model.image.patch; and their grid, or set config.model.resample_init = "
                "True)"
            ) from None
        raise


def vit_links(style: Style, stacks: dict[str, range], wanted: Shapes) -> list[Link]:
    """A ViT's tensors as parameters of the visual encoder.

    Args:
      style: the tensors' names, with query, key and value apart.
      stacks: the ViT's layers in each stack of ours.
      wanted: shapes of the parameters to be filled.
    """
    last = "trunk_end" if f"{ROOT}/trunk_end/scale" in wanted else "norm"
    links = linear(f"{ROOT}/patch_embed", style.patch, form="patch")
    links += norm(f"{ROOT}/{last}", style.norm)
    for ours, theirs in zip(BARE, style.bare, strict=True):
        if f"{ROOT}/{ours}" in wanted:
            links.append(Link((f"{ROOT}/{ours}",), (theirs,), "table"))
    names = dict(zip(_LAYER, (*style.norms, *style.attention, *style.mlp), strict=True))
    for stack, indices in stacks.items():
        root, layers = f"{ROOT}/{stack}/layers", [style.layer.format(index) for index in indices]
        links += module(root, layers, names, stacked=True)
        for ours, theirs in zip(("attention", "mlp"), style.scales, strict=True):
            path = f"{root}/{ours}_scale/scale"
            if path in wanted:
                scales = tuple(layer + theirs for layer in layers)
                links.append(Link((path,), scales, "vector", stacked=True))
    return links


def find_style(tensors: Tensors, origin: str) -> Style | None:
    """The style of a ViT's names (without prefix, fused maps split), or None for no ViT.

    Raises:
      UserError: its feed-forward layers are of a kind that cannot be built here.
    """
    for style in STYLES.values():
        layer = style.layer.format(0)
        stems = (style.norms[0], style.attention[1])
        if not all(f"{layer}{stem}.weight" in tensors for stem in stems):
            continue
        if any(f"{layer}{gate}.weight" in tensors for gate in _GATED):
            raise UserError(
                f"{origin} is a ViT with gated feed-forward layers (SwiGLU), which the visual "
                "encoder does not have; take a small, base or large DINOv2 or DINOv3 (no 'plus')"
            )
        return style
    return None


def _layers(shapes: Shapes, stacks: tuple[str, ...]) -> dict[str, range]:
    """The layers of the ViT that fill each stack; a stack that the model has not is left out."""
    layers, start = {}, 0
    for stack in stacks:
        depth = shapes.get(f"{ROOT}/{stack}/layers/mlp/fc1/bias", (0,))[0]
        if depth:
            layers[stack] = range(start, start + depth)
        start += depth
    return layers


# ---- what differs beyond names


def _split_fused(tensors: Tensors) -> Tensors:
    """Fused query-key-value maps as three, "attn.query" and so on; register tokens under one name.

    DINOv3 keeps the bias of its keys at zero with a mask, `bias_mask`; it is applied here.
    """
    # DINOv3's and timm's names for what DINOv2 calls register_tokens.
    registers = {name: "register_tokens" for name in ("storage_tokens", "reg_token")}
    result: Tensors = {}
    for name, value in tensors.items():
        if ".attn.qkv." not in name:
            result[registers.get(name, name)] = value
            continue
        if name.endswith("bias_mask"):
            continue
        mask = tensors.get(f"{name}_mask")
        if mask is not None:
            value = np.where(np.asarray(mask, np.float32) == 0, 0, value).astype(value.dtype)
        for stem, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            result[name.replace(".qkv.", f".{stem}.")] = third
    return result


def _name_onnx_positions(tensors: Tensors, style: Style) -> Tensors:
    """Names the positions of DINOv2's ONNX export: constants of a Concat and a Reshape there."""
    stems = {name.rstrip("0123456789").removesuffix("_"): name for name in tensors}
    head, tail = stems.get("embeddings.Concat"), stems.get("embeddings.Reshape")
    if style != STYLES["dinov2"] or style.bare[2] in tensors or head is None or tail is None:
        return tensors
    tensors = dict(tensors)
    first, rest = tensors.pop(head), tensors.pop(tail)
    width = first.shape[-1]
    rows = [first.reshape(-1, width), rest.reshape(-1, width)]
    return {**tensors, style.bare[2]: np.concatenate(rows)}


def _zero_key_biases(tensors: Tensors, style: Style) -> Tensors:
    """Adds a zero bias of keys where only the query has one (DINOv3), as our keys have one."""
    query, key = (f".{name}.bias" for name in style.attention[:2])
    added = {
        name.removesuffix(query) + key: np.zeros_like(value)
        for name, value in tensors.items()
        if name.endswith(query)
    }
    return {**added, **tensors}


def _plain_tokens(tensors: Tensors, style: Style) -> Tensors:
    """Class token, registers and positions as [rows, D], without an axis of length one."""
    rows = {n: x.reshape(-1, x.shape[-1]) for n, x in tensors.items() if n in style.bare}
    return {**tensors, **rows}


def _separate_positions(tensors: Tensors, style: Style, patches: int) -> Tensors:
    """Moves the first of positions [1 + L, D] into the class token, where our trunk has it.

    L is `patches`, the model's; where the table fits neither L nor 1 + L, its grid is square.
    """
    class_token, _, position = style.bare
    if position not in tensors:
        return tensors
    table = tensors[position]
    extra = len(table) - patches
    if extra not in (0, 1):
        extra = min(1, len(table) - isqrt(len(table)) ** 2)
    result = {**tensors, position: table[extra:]}
    if extra and class_token in tensors:
        result[class_token] = tensors[class_token] + table[:1]
    return result


def _resize_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Positions [L, D] of a square grid on another one: `models.positions.resize_grid` in NumPy.

    On the host, so that every machine computes the same.
    """
    side = isqrt(len(table))
    if side * side != len(table) or (side, side) == grid:
        return table
    down, across = (cubic_weights(side, length) for length in grid)
    square = table.astype(np.float32).reshape(side, side, -1)
    resized = np.einsum("th,sw,hwd->tsd", down, across, square)
    return resized.reshape(-1, table.shape[1])


def _fold_layer_scale(tensors: Tensors, style: Style, layers: range) -> Tensors:
    """Multiplies the layer scale of some layers into the maps that end their branches."""
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
