"""The ``config.model`` of a published checkpoint: sizes from its tensors' shapes, the rest known.

What tensors cannot tell (heads, epsilons, ...) has the published values as defaults.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights import groupvit
from ovseg_jax.weights.released import DECODER, IMAGE, TEXT

# What tensors cannot tell, with the published values. A grid of None is square.
RELEASED_DEFAULTS = {
    "heads": 8,  # before the binding
    "second_heads": 8,  # after it
    "decoder_heads": 8,
    "text_heads": 12,
    "grid": None,
    "assignment": "hard",
    "drop_path": 0.1,
    "dropout": 0.1,
    "image_eps": 1e-5,
    "text_eps": 1e-12,
    "pad_id": 0,
    "dtype": "float32",
    "matmul_dtype": "float32",
    "remat": "none",
}
# Text heads of 0 are as many as there are 64 channels; an end token of -1 is the last of the
# vocabulary, as in CLIP's.
GROUPVIT_DEFAULTS = {
    "heads": 6,
    "text_heads": 0,
    "grid": None,
    "end_id": -1,
    "activation": "quick_gelu",
    "assignment": "hard",
    "drop_path": 0.1,
    "eps": 1e-5,
    "dtype": "float32",
    "matmul_dtype": "float32",
    "remat": "none",
}

# Fields of ``config.model`` that the two published models share.
_IMAGE = {
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
    "binding_scale": None,
    "gumbel_temperature": 1.0,
}
_MODEL = {
    "projector_layers": 2,
    "projector_norm": "batch",
    "projector_activation": "relu",
    "projector_bias": True,
    "temperature_init": 0.07,
}


def released_config(tensors: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """The ``config.model`` of a released checkpoint.

    Args:
      tensors: by released name; anything with a shape.
      **settings: what the tensors cannot tell; see `RELEASED_DEFAULTS`.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form, or sizes
        contradict each other.
    """
    settings = _complete(settings, RELEASED_DEFAULTS)
    sizes = _Sizes(tensors, "released checkpoint")
    shape, depth = sizes.shape, sizes.depth
    width, _, patch, _ = shape(f"{IMAGE}.patch_embed.proj.weight", 4)
    positions = np.shape(tensors.get(f"{IMAGE}.pos_embed", np.zeros((0, width))))[-2]
    vocab, text_width = shape(f"{TEXT}.embeddings.word_embeddings.weight", 2)
    fed = shape(f"{IMAGE}.layers.0.downsample.mlp_channels.fc1.weight", 2)[0]
    decoder_fed, decoder_width = shape(f"{DECODER}.0.pre_assign_attn.mlp.fc1.weight", 2)
    options = {"remat": settings["remat"], "unroll": 1}
    return {
        "image": {
            **_IMAGE,
            "patch": patch,
            "grid": _grid(positions, settings["grid"], f"{IMAGE}.pos_embed"),
            "width": width,
            "heads": settings["heads"],
            "second_heads": settings["second_heads"],
            "mlp_ratio": _ratio(fed, width),
            "eps": settings["image_eps"],
            "first_layers": depth(f"{IMAGE}.layers.0.blocks"),
            "second_layers": depth(f"{IMAGE}.layers.1.blocks"),
            "num_groups": shape(f"{IMAGE}.layers.0.downsample.mlp_inter.fc2.weight", 2)[0],
            "group_tokens": shape(f"{IMAGE}.layers.0.group_token", 3)[1],
            "patch_norm": f"{IMAGE}.patch_embed.norm.weight" in tensors,
            "assignment": settings["assignment"],
            "drop_path": settings["drop_path"],
            **options,
        },
        "text": {
            "vocab_size": vocab,
            "width": text_width,
            "depth": depth(f"{TEXT}.encoder.layer"),
            "heads": settings["text_heads"],
            "mlp_width": shape(f"{TEXT}.encoder.layer.0.intermediate.dense.weight", 2)[0],
            "max_positions": shape(f"{TEXT}.embeddings.position_embeddings.weight", 2)[0],
            "dropout": settings["dropout"],
            "eps": settings["text_eps"],
            **options,
        },
        "decoder": {
            "width": decoder_width,
            "heads": settings["decoder_heads"],
            "mlp_ratio": _ratio(decoder_fed, decoder_width),
            "eps": settings["image_eps"],
            "order": "cross_first",
            "depth": depth(DECODER),
            "mask_padding": False,
        },
        **_MODEL,
        "joint_width": shape("img_projector.linear_out.weight", 3)[0],
        "projector_width": shape("img_projector.linear_hidden.0.weight", 3)[0],
        "text_pool": "cls",
        "pad_id": settings["pad_id"],
        "dtype": settings["dtype"],
        "matmul_dtype": settings["matmul_dtype"],
    }


def groupvit_config(tensors: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """The ``config.model`` of a GroupViT checkpoint.

    Args:
      tensors: by name, in either style; anything with a shape.
      **settings: what the tensors cannot tell; see `GROUPVIT_DEFAULTS`.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form.
    """
    settings, style = _complete(settings, GROUPVIT_DEFAULTS), groupvit.style_of(tensors)
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
    fed = shape(f"{stage}.0.downsample.mlp_channels.fc1.weight", 2)[0]
    options = {"remat": settings["remat"], "unroll": 1}
    return {
        "image": {
            **_IMAGE,
            "patch": side,
            "grid": _grid(shape(position, 3)[1], settings["grid"], position),
            "width": width,
            "heads": settings["heads"],
            "second_heads": 0,
            "mlp_ratio": _ratio(fed, width),
            "eps": settings["eps"],
            "first_layers": stages[0][2],
            "second_layers": depth(groupvit.block_name(style, len(stages))),
            "group_tokens": stages[0][0],
            "num_groups": stages[0][1],
            "later_stages": tuple(stages[1:]),
            "patch_norm": f"{embed_norm}.weight" in tensors,
            "assignment": settings["assignment"],
            "drop_path": settings["drop_path"],
            **options,
        },
        "text_form": "causal",
        "text": {
            "vocab_size": vocab,
            "width": text_width,
            "depth": depth(text_layers),
            "heads": settings["text_heads"] or max(1, text_width // 64),
            "mlp_width": text_fed,
            "max_positions": shape(text_position, 2)[0],
            "end_id": settings["end_id"] % vocab,
            "activation": settings["activation"],
            "eps": settings["eps"],
            **options,
        },
        "decoder": None,
        **_MODEL,
        "joint_width": joint,
        "projector_width": hidden,
        "text_pool": "eot",
        "pad_id": 0,
        "dtype": settings["dtype"],
        "matmul_dtype": settings["matmul_dtype"],
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


def _complete(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(settings) - set(defaults))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: there are only the settings {', '.join(defaults)}")
    return {**defaults, **settings}
