"""Published ViTs (DINO, DeiT, MAE, DINOv2, DINOv3, ...) and BERTs as our towers.

With `trunk_norm` the whole ViT becomes the visual encoder's trunk. Otherwise it fills the layers
before and after the binding (Sec. 4.1: layers 0-5 and 6-11 of DINO), and its final norm becomes the
encoder's. Group tokens, binding and neck stay as they are.
"""

from math import isqrt
from typing import NamedTuple

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.models.vit import cubic_weights
from ovseg_jax.weights.links import Link, Shapes, linear, matching, module, norm, read_links
from ovseg_jax.weights.weight_files import Tensors

IMAGE, TEXT = "image_encoder", "text_encoder"
STACKS = ("trunk_layers", "first", "second")
BARE = ("class_token", "register_tokens", "position")
_LAYER = ("attention_norm", "mlp_norm", "attention/query", "attention/key", "attention/value")
_LAYER += ("attention/out", "mlp/fc1", "mlp/fc2")


class Style(NamedTuple):
    """Names of a ViT in one published style; ".weight" or ".bias" is added to all but bare ones."""

    layer: str  # before the names of a layer, with {} for its index
    norms: tuple[str, str]  # before attention and feed-forward
    attention: tuple[str, str, str, str]  # query, key, value and output
    mlp: tuple[str, str]
    scales: tuple[str, str]  # layer scale of the two branches (bare)
    patch: str
    norm: str  # the last
    bare: tuple[str, str, str]  # class token, register tokens and position embeddings


_HUB_ATTENTION = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_HUB_ATTENTION += ("attention.output.dense",)
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

# The names by which a tower is known; what precedes them ("backbone.", ...) precedes all names.
VIT_ANCHORS = tuple(dict.fromkeys(f"{style.patch}.weight" for style in STYLES.values()))
BERT_ANCHOR = "embeddings.word_embeddings.weight"

# No features: the mask token, heads, decoders and classifiers, constants.
VIT_DROPPED = (
    r"(embeddings\.)?mask_token",
    r"(head|fc_norm|pooler|classifier|decoder|local_cls_norm)\..*",
    r"rope_embed(dings)?\.(periods|inv_freq)",
)
# The pooler feeds next-sentence prediction, ids are constants, heads predict words.
BERT_DROPPED = (
    r"pooler\..*",
    r"embeddings\.(position_ids|token_type_ids)",
    r"(cls|classifier|qa_outputs)\..*",
)

# First maps of a gated feed-forward layer (DINOv2 giant, DINOv3 ViT-S+, ViT-H+ and 7B).
_GATED = ("mlp.w12", "mlp.w1", "mlp.weights_in", "mlp.gate_proj")
# DINOv3's and timm's names for what DINOv2 calls register_tokens.
_REGISTERS = {name: "register_tokens" for name in ("storage_tokens", "reg_token")}

_BERT_LAYER = {
    **{f"attention/{name}": f"attention.self.{name}" for name in ("query", "key", "value")},
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def bert_links(depth: int, prefix: str = "") -> list[Link]:
    """A BERT of `depth` layers whose names begin with `prefix`."""
    blocks = [f"{prefix}encoder.layer.{index}." for index in range(depth)]
    tables = [
        Link((f"{TEXT}/{name}",), (f"{prefix}embeddings.{name}_embeddings.weight",), "table")
        for name in ("word", "position", "token_type")
    ]
    links = tables + norm(f"{TEXT}/embed_norm", f"{prefix}embeddings.LayerNorm")
    return links + module(f"{TEXT}/layers", blocks, _BERT_LAYER, stacked=True)


def from_bert(tensors: Tensors, shapes: Shapes, origin: str) -> dict[str, np.ndarray] | None:
    """Parameters of the text encoder by path, from a BERT; see `from_vit`."""
    if BERT_ANCHOR not in tensors:
        return None
    # Files converted from TensorFlow call the two vectors of a norm gamma and beta.
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        old, new = f".LayerNorm.{old}", f".LayerNorm.{new}"
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    wanted = {path: shape for path, shape in shapes.items() if path.startswith(f"{TEXT}/")}
    links = bert_links(shapes[f"{TEXT}/layers/mlp/fc1/bias"][0])
    return read_links(tensors, links, wanted, matching(tensors, BERT_DROPPED), origin)


def from_vit(
    tensors: Tensors, shapes: Shapes, origin: str, resample_to: tuple[int, int] | None = None
) -> dict[str, np.ndarray] | None:
    """Parameters of the visual encoder by path, from a published ViT.

    Args:
      tensors: without a prefix such as "backbone.".
      shapes: of all the model's parameters.
      resample_to: the model's grid (rows, columns), to resize positions of another grid to it.

    Returns:
      The parameters that a ViT fills; None where the tensors are no ViT's.

    Raises:
      UserError: lists every tensor of `origin` that is missing, left over or misshapen.
    """
    tensors = _split_fused(tensors)
    style = find_style(tensors, origin)
    if style is None:
        return None
    as_trunk = f"{IMAGE}/trunk_end/scale" in shapes
    stacks, start = {}, 0  # the layers of the ViT that fill each stack that the model has
    for stack in STACKS[:1] if as_trunk else STACKS:
        depth = shapes.get(f"{IMAGE}/{stack}/layers/mlp/fc1/bias", (0,))[0]
        if depth:
            stacks[stack] = range(start, start + depth)
        start += depth
    patches = shapes.get(f"{IMAGE}/position", (0,))[0]
    _adapt_tokens(tensors, style, patches)
    for stack, indices in stacks.items():
        if f"{IMAGE}/{stack}/layers/attention_scale/scale" not in shapes:
            _fold_layer_scale(tensors, style, indices)
    patch = isqrt(shapes[f"{IMAGE}/patch_embed/kernel"][0] // 3)
    kernel, table = tensors.get(f"{style.patch}.weight"), tensors.get(style.bare[2])
    given = (0 if kernel is None else kernel.shape[-1], 0 if table is None else len(table))
    if resample_to is not None and table is not None:
        tensors[style.bare[2]] = _resize_positions(table, resample_to)
    dropped = matching(tensors, VIT_DROPPED)
    if not as_trunk:
        # Beside the groups there is no room for the class token and registers.
        dropped += style.bare[:2]
    names = [*stacks, "patch_embed", *BARE, "trunk_end" if as_trunk else "norm"]
    roots = tuple(f"{IMAGE}/{name}" for name in names)
    ours = {path: "/".join(path.split("/")[:2]) for path in shapes}
    wanted = {path: shapes[path] for path, root in ours.items() if root in roots}
    try:
        return read_links(tensors, _vit_links(style, stacks, wanted), wanted, dropped, origin)
    except UserError as error:
        if resample_to is not None or given == (patch, patches):
            raise
        raise UserError(
            f"{error}\n(these weights: patches of {given[0]} pixels, {given[1]} positions; the "
            f"model: {patch} and {patches}. Give the model the weights' config.model.image.patch; "
            "and their grid, or set config.model.resample_init = True)"
        ) from None


def _vit_links(style: Style, stacks: dict[str, range], wanted: Shapes) -> list[Link]:
    """A ViT's tensors, with query, key and value apart, as the wanted parameters."""
    last = "trunk_end" if f"{IMAGE}/trunk_end/scale" in wanted else "norm"
    links = linear(f"{IMAGE}/patch_embed", style.patch, form="patch")
    links += norm(f"{IMAGE}/{last}", style.norm)
    for ours, theirs in zip(BARE, style.bare, strict=True):
        if f"{IMAGE}/{ours}" in wanted:
            links.append(Link((f"{IMAGE}/{ours}",), (theirs,), "table"))
    names = dict(zip(_LAYER, (*style.norms, *style.attention, *style.mlp), strict=True))
    for stack, indices in stacks.items():
        root, layers = f"{IMAGE}/{stack}/layers", [style.layer.format(index) for index in indices]
        links += module(root, layers, names, stacked=True)
        for ours, theirs in zip(("attention", "mlp"), style.scales, strict=True):
            path = f"{root}/{ours}_scale/scale"
            if path in wanted:
                scales = tuple(layer + theirs for layer in layers)
                links.append(Link((path,), scales, "vector", stacked=True))
    return links


def find_style(tensors: Tensors, origin: str) -> Style | None:
    """The style of a ViT's names (without prefix, fused maps split), or None for no ViT."""
    for style in STYLES.values():
        layer = style.layer.format(0)
        stems = (style.norms[0], style.attention[1])
        if not all(f"{layer}{stem}.weight" in tensors for stem in stems):
            continue
        if any(f"{layer}{gate}.weight" in tensors for gate in _GATED):
            raise UserError(
                f"{origin} is a ViT with SwiGLU, which cannot be built: take a smaller one"
            )
        return style
    return None


# ---- what differs beyond names


def _split_fused(tensors: Tensors) -> Tensors:
    """Fused maps as three, "attn.query" and so on; register tokens under one name."""
    result: Tensors = {}
    for name, value in tensors.items():
        if ".attn.qkv." not in name:
            result[_REGISTERS.get(name, name)] = value
        elif not name.endswith("bias_mask"):
            mask = tensors.get(f"{name}_mask")  # DINOv3 keeps the bias of its keys at zero
            if mask is not None:
                value = np.where(np.asarray(mask, np.float32) == 0, 0, value).astype(value.dtype)
            for stem, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                result[name.replace(".qkv.", f".{stem}.")] = third
    return result


def _adapt_tokens(tensors: Tensors, style: Style, patches: int) -> None:
    """Gives a ViT's tensors, in place, the biases, class token and positions that our trunk has."""
    class_token, _, position = style.bare
    # DINOv2's ONNX export has its positions as constants of a Concat and a Reshape.
    stems = {name.rstrip("0123456789").removesuffix("_"): name for name in tensors}
    parts = [stems.get(f"embeddings.{node}") for node in ("Concat", "Reshape")]
    if style == STYLES["dinov2"] and position not in tensors and all(parts):
        first, rest = (tensors.pop(name) for name in parts)
        width = first.shape[-1]
        tensors[position] = np.concatenate([first.reshape(-1, width), rest.reshape(-1, width)])
    # Where only the query has a bias (DINOv3), our keys have one of zero.
    query, key = (f".{name}.bias" for name in style.attention[:2])
    for name in [name for name in tensors if name.endswith(query)]:
        tensors.setdefault(name.removesuffix(query) + key, np.zeros_like(tensors[name]))
    # Without an axis of length one: [rows, D].
    for name in set(style.bare) & set(tensors):
        tensors[name] = tensors[name].reshape(-1, tensors[name].shape[-1])
    if position not in tensors:
        return
    # The first of 1 + L positions goes into the class token. L is the model's number of patches;
    # where the table fits neither L nor 1 + L, its grid is square.
    table = tensors[position]
    extra = len(table) - patches
    if extra not in (0, 1):
        extra = min(1, len(table) - isqrt(len(table)) ** 2)
    tensors[position] = table[extra:]
    if extra and class_token in tensors:
        tensors[class_token] = tensors[class_token] + table[:1]


def _resize_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`models.vit.resize_grid` from a square grid, in NumPy: every machine computes the same."""
    side = isqrt(len(table))
    if side * side != len(table) or (side, side) == grid:
        return table
    down, across = (cubic_weights(side, length) for length in grid)
    square = table.astype(np.float32).reshape(side, side, -1)
    resized = np.einsum("th,sw,hwd->tsd", down, across, square)
    return resized.reshape(-1, table.shape[1])


def _fold_layer_scale(tensors: Tensors, style: Style, layers: range) -> None:
    """Multiplies, in place, some layers' scales into the maps that end their branches."""
    for index in layers:
        for scale, end in zip(style.scales, (style.attention[3], style.mlp[1]), strict=True):
            factor = tensors.pop(style.layer.format(index) + scale, None)
            for name in (f"{style.layer.format(index)}{end}.{kind}" for kind in ("weight", "bias")):
                if factor is not None and name in tensors:
                    value = tensors[name]
                    tensors[name] = value * factor.reshape((-1,) + (1,) * (value.ndim - 1))
