"""The ``config.model`` of a published checkpoint.

Sizes come from the tensors' shapes; what these cannot tell has the published values.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights import groupvit
from ovseg_jax.weights.released import DECODER, IMAGE, TEXT

# Attention heads, which tensors cannot tell: of the visual encoder before and after the binding, of
# the entity decoder and of the text encoder.
RELEASED_HEADS = {"heads": 8, "second_heads": 8, "decoder_heads": 8, "text_heads": 12}
GROUPVIT_HEADS = 6

# Fields of ``config.model`` that the two published models share.
_OPTIONS = {"remat": "none"}
_IMAGE = {
    "eps": 1e-5,
    "group_layer": 0,
    "binding": "grouping_block",
    "second_stage": "groups",
    "group_std": 0.02,
    "trunk_width": 0,
    "trunk_heads": 0,
    "class_token": False,
    "trunk_norm": False,
    "register_tokens": 0,
    "position": "learned",
    "position_resize": "bicubic",
    "rope_theta": 100.0,
    "layer_scale": None,
    "assignment": "hard",
    "binding_scale": None,
    "gumbel_temperature": 1.0,
    **_OPTIONS,
}
_MODEL = {
    "projector_layers": 2,
    "projector_norm": "batch",
    "projector_activation": "relu",
    "projector_bias": True,
    "pad_id": 0,
    "temperature_init": 0.07,
    "dtype": "float32",
    "matmul_dtype": "float32",
}


def released_config(
    tensors: Mapping[str, Any],
    *,
    heads: int = RELEASED_HEADS["heads"],
    second_heads: int = RELEASED_HEADS["second_heads"],
    decoder_heads: int = RELEASED_HEADS["decoder_heads"],
    text_heads: int = RELEASED_HEADS["text_heads"],
    grid: tuple[int, int] | None = None,
    drop_path: float = 0.1,
    dropout: float = 0.1,
) -> dict[str, Any]:
    """The ``config.model`` of a released checkpoint.

    Args:
      tensors: by released name; anything with a shape.
      heads: see `RELEASED_HEADS`.
      second_heads: likewise.
      decoder_heads: likewise.
      text_heads: likewise.
      grid: rows and columns of the position embeddings; None for a square.
      drop_path: rate of dropped branches in training.
      dropout: of the text encoder in training.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form, or sizes
        contradict each other.
    """
    sizes = _Sizes(tensors, "released checkpoint")
    shape, depth = sizes.shape, sizes.depth
    width, _, patch, _ = shape(f"{IMAGE}.patch_embed.proj.weight", 4)
    positions = np.shape(tensors.get(f"{IMAGE}.pos_embed", np.zeros((0, width))))[-2]
    vocab, text_width = shape(f"{TEXT}.embeddings.word_embeddings.weight", 2)
    fed = shape(f"{IMAGE}.layers.0.downsample.mlp_channels.fc1.weight", 2)[0]
    decoder_fed, decoder_width = shape(f"{DECODER}.0.pre_assign_attn.mlp.fc1.weight", 2)
    return {
        "image": {
            **_IMAGE,
            "patch": patch,
            "grid": _grid(positions, grid, f"{IMAGE}.pos_embed"),
            "width": width,
            "heads": heads,
            "second_heads": second_heads,
            "mlp_ratio": _ratio(fed, width),
            "first_layers": depth(f"{IMAGE}.layers.0.blocks"),
            "second_layers": depth(f"{IMAGE}.layers.1.blocks"),
            "num_groups": shape(f"{IMAGE}.layers.0.downsample.mlp_inter.fc2.weight", 2)[0],
            "group_tokens": shape(f"{IMAGE}.layers.0.group_token", 3)[1],
            "patch_norm": f"{IMAGE}.patch_embed.norm.weight" in tensors,
            "drop_path": drop_path,
        },
        "text": {
            "vocab_size": vocab,
            "width": text_width,
            "depth": depth(f"{TEXT}.encoder.layer"),
            "heads": text_heads,
            "mlp_width": shape(f"{TEXT}.encoder.layer.0.intermediate.dense.weight", 2)[0],
            "max_positions": shape(f"{TEXT}.embeddings.position_embeddings.weight", 2)[0],
            "dropout": dropout,
            "eps": 1e-12,
            **_OPTIONS,
        },
        "decoder": {
            "width": decoder_width,
            "heads": decoder_heads,
            "mlp_ratio": _ratio(decoder_fed, decoder_width),
            "eps": 1e-5,
            "order": "cross_first",
            "depth": depth(DECODER),
            "mask_padding": False,
        },
        **_MODEL,
        "joint_width": shape("img_projector.linear_out.weight", 3)[0],
        "projector_width": shape("img_projector.linear_hidden.0.weight", 3)[0],
        "text_pool": "cls",
    }


def groupvit_config(
    tensors: Mapping[str, Any],
    *,
    heads: int = GROUPVIT_HEADS,
    text_heads: int = 0,
    grid: tuple[int, int] | None = None,
    activation: str = "quick_gelu",
) -> dict[str, Any]:
    """The ``config.model`` of a GroupViT checkpoint.

    Args:
      tensors: by name, in either style; anything with a shape.
      heads: attention heads of the visual encoder.
      text_heads: of the text encoder; 0 for one per 64 channels.
      grid: rows and columns of the position embeddings; None for a square.
      activation: of the text encoder.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form.
    """
    style = groupvit.style_of(tensors)
    sizes = _Sizes(tensors, "GroupViT checkpoint")
    shape, depth = sizes.shape, sizes.depth
    prefix, stage = groupvit.IMAGE_PREFIX[style], groupvit.STAGES[style]
    patch, embed_norm, position, _ = (f"{prefix}.{n}" for n in groupvit.IMAGE_NAMES[style])
    word, text_position, _ = groupvit.TEXT_NAMES[style]
    text_layers = groupvit.TEXT_LAYERS[style]
    if style == groupvit.ORIGINAL:
        text_fed = shape(f"{text_layers}.0.mlp.c_fc.weight", 2)[0]
        hidden = shape("img_projector.linear_hidden.0.weight", 3)[0]
        joint = shape("img_projector.linear_out.weight", 3)[0]
    else:
        text_fed = shape(f"{text_layers}.0.mlp.fc1.weight", 2)[0]
        hidden = shape("visual_projection.0.weight", 2)[0]
        joint = shape("visual_projection.3.weight", 2)[0]
    vocab, text_width = shape(word, 2)
    width, _, side, _ = shape(f"{patch}.weight", 4)
    stages = []  # (group tokens, groups, layers) of every stage that groups
    while f"{stage}.{len(stages)}.group_token" in tensors:
        name = f"{stage}.{len(stages)}"
        tokens = shape(f"{name}.group_token", 3)[1]
        groups = shape(f"{name}.downsample.mlp_inter.fc2.weight", 2)[0]
        stages.append((tokens, groups, depth(groupvit.block_name(style, len(stages)))))
    return {
        "image": {
            **_IMAGE,
            "patch": side,
            "grid": _grid(shape(position, 3)[1], grid, position),
            "width": width,
            "heads": heads,
            "second_heads": 0,
            "mlp_ratio": _ratio(
                shape(f"{stage}.0.downsample.mlp_channels.fc1.weight", 2)[0], width
            ),
            "first_layers": stages[0][2],
            "second_layers": depth(groupvit.block_name(style, len(stages))),
            "group_tokens": stages[0][0],
            "num_groups": stages[0][1],
            "later_stages": tuple(stages[1:]),
            "patch_norm": f"{embed_norm}.weight" in tensors,
            "drop_path": 0.1,
        },
        "text_form": "causal",
        "text": {
            "vocab_size": vocab,
            "width": text_width,
            "depth": depth(text_layers),
            "heads": text_heads or max(1, text_width // 64),
            "mlp_width": text_fed,
            "max_positions": shape(text_position, 2)[0],
            "end_id": vocab - 1,  # as in CLIP's vocabulary
            "activation": activation,
            "eps": 1e-5,
            **_OPTIONS,
        },
        "decoder": None,
        **_MODEL,
        "joint_width": joint,
        "projector_width": hidden,
        "text_pool": "eot",
    }


class _Sizes:
    """Shapes of a checkpoint's tensors by name.

    Args:
      tensors: by name; anything with a shape.
      kind: what the checkpoint should be, for messages ("released checkpoint").
    """

    def __init__(self, tensors: Mapping[str, Any], kind: str):
        self._tensors, self._kind = tensors, kind

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor; UserError if it is missing or has another number of axes."""
        if name not in self._tensors:
            raise UserError(
                f"no {self._kind}: it has no tensor {name}. Its first tensors are "
                f"{', '.join(list(self._tensors)[:3])}"
            )
        shape = tuple(np.shape(self._tensors[name]))
        if len(shape) != axes:
            raise UserError(f"{name} has shape {shape}, but needs {axes} axes")
        return shape

    def depth(self, prefix: str) -> int:
        """How many numbered layers, "PREFIX.0." and on, there are."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        numbers = {int(match[1]) for match in map(pattern.match, self._tensors) if match}
        return max(numbers, default=-1) + 1


def _grid(positions: int, grid: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """Rows and columns of the position embeddings `name`; UserError if the grid does not fit."""
    side = math.isqrt(positions)
    rows, columns = grid or (side, side)
    if rows * columns != positions or not positions:
        raise UserError(
            f"{name} has {positions} positions, which is no grid of {rows} x {columns}; give the "
            "grid's rows and columns"
        )
    return rows, columns


def _ratio(hidden: int, width: int) -> float:
    """The quotient whose product with the width, cut to an integer, is `hidden` again."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
