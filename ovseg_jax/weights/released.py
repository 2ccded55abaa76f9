"""Checkpoints of the released PyTorch model, both ways.

What the released code stores without using it is kept apart (`extra_tensors`), so that
`to_released` gives back every tensor that `from_released` was given, to the bit.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.weights.initialize import architecture, variable_shapes
from ovseg_jax.weights.links import (
    Link,
    fused_attention,
    linear,
    matching,
    module,
    norm,
    read_links,
    write_links,
)
from ovseg_jax.weights.tower_links import bert_links
from ovseg_jax.weights.weight_files import Tensors

IMAGE, TEACHER = "img_encoder", "img_encoder_momentum"
TEXT = "text_encoder.transformer"
DECODER = "multimodal_groupingblock.blocks"
PROJECTORS = {
    "image_projector": "img_projector",
    "text_projector": "text_projector",
    "completion_projector": "bridge_projector",
}

# What the released code carries along without using it: BERT's pooler and constants, a second
# temperature, the assignment inside the decoder.
UNUSED = (
    r"text_encoder\.transformer\.(pooler\.dense\.(weight|bias)|embeddings\.(position|token_type)_ids)",
    r"logit_scale_mask",
    r"multimodal_groupingblock\.blocks\.\d+\.assign\..*",
)

# Position embeddings are [1, L, D], or [L, D] if they came from an image checkpoint. This key
# among the extra tensors, with the axis's length, remembers the first form.
POSITION_AXIS = "pos_embed.leading_axis"

# Attention heads, which tensors cannot tell: of the visual encoder before and after the binding, of
# the entity decoder and of the text encoder.
HEADS = {"heads": 8, "second_heads": 8, "decoder_heads": 8, "text_heads": 12}

# Fields of ``config.model`` in which this model and GroupViT differ from the defaults.
IMAGE_FIELDS = {"eps": 1e-5, "binding": "grouping_block", "second_stage": "groups"}
IMAGE_FIELDS |= {"drop_path": 0.1}
MODEL_FIELDS = {"projector_layers": 2, "projector_norm": "batch"}
MODEL_FIELDS |= {"projector_activation": "relu", "projector_bias": True}

_FED = {"mlp_norm": "norm2", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_PRE_NORM = {"attention_norm": "norm1", "attention/out": "attn.proj", **_FED}
_CROSS = {
    **{f"attention/{name}": f"attn.{name[0]}_proj" for name in ("query", "key", "value")},
    "attention/out": "attn.proj",
    **_FED,
    "norm": "norm_post",
}
_CROSS_BLOCK = {f"cross/{ours}": f"pre_assign_attn.{theirs}" for ours, theirs in _CROSS.items()}
GROUPING_BLOCK = {
    "token_norm": "norm_tokens",
    "mixing/fc1": "mlp_inter.fc1",
    "mixing/fc2": "mlp_inter.fc2",
    "mixed_norm": "norm_post_tokens",
    "patch_norm": "norm_x",
    **_CROSS_BLOCK,
    "query": "assign.q_proj",
    "key": "assign.k_proj",
    "value": "assign.v_proj",
    "out": "assign.proj",
    "mlp_norm": "norm_new_x",
    "mlp/fc1": "mlp_channels.fc1",
    "mlp/fc2": "mlp_channels.fc2",
}
_DECODER_LAYER = {
    "token_norm": "norm_tokens",
    "group_norm": "norm_x",
    **_CROSS_BLOCK,
    **{f"self/{ours}": f"post_attn.{theirs}" for ours, theirs in _PRE_NORM.items()},
    "norm": "norm_new_x",
}


# ---- sizes of a model, from its checkpoint


class Sizes:
    """Shapes of a checkpoint's tensors by name; `kind` says what it should be, for messages."""

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

    def ratio(self, name: str, width: int) -> float:
        """What the width is multiplied by, and cut to an integer, for a feed-forward's weight."""
        hidden = self.shape(name, 2)[0]
        ratio = hidden / width
        return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def grid_of(positions: int, grid: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """Rows and columns of the position embeddings `name`; UserError if the grid does not fit."""
    side = math.isqrt(positions)
    rows, columns = grid or (side, side)
    if rows * columns != positions or not positions:
        raise UserError(
            f"{name} has {positions} positions, which is no grid of {rows} x {columns}; give the "
            "grid's rows and columns"
        )
    return rows, columns


def released_config(
    tensors: Mapping[str, Any],
    *,
    heads: int = HEADS["heads"],
    second_heads: int = HEADS["second_heads"],
    decoder_heads: int = HEADS["decoder_heads"],
    text_heads: int = HEADS["text_heads"],
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The ``config.model`` of a released checkpoint, whose sizes are those of the tensors.

    Args:
      tensors: by released name; anything with a shape.
      heads, second_heads, decoder_heads, text_heads: see `HEADS`.
      grid: rows and columns of the position embeddings; None for a square.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form, or sizes
        contradict each other.
    """
    sizes = Sizes(tensors, "released checkpoint")
    shape, depth, block = sizes.shape, sizes.depth, f"{IMAGE}.layers.0.downsample"
    width, _, patch, _ = shape(f"{IMAGE}.patch_embed.proj.weight", 4)
    positions = np.shape(tensors.get(f"{IMAGE}.pos_embed", np.zeros((0, width))))[-2]
    vocab, text_width = shape(f"{TEXT}.embeddings.word_embeddings.weight", 2)
    fed = f"{DECODER}.0.pre_assign_attn.mlp.fc1.weight"
    decoder_width = shape(fed, 2)[1]
    return architecture(
        {
            "image": {
                **IMAGE_FIELDS,
                "patch": patch,
                "grid": grid_of(positions, grid, f"{IMAGE}.pos_embed"),
                "width": width,
                "heads": heads,
                "second_heads": second_heads,
                "mlp_ratio": sizes.ratio(f"{block}.mlp_channels.fc1.weight", width),
                "first_layers": depth(f"{IMAGE}.layers.0.blocks"),
                "second_layers": depth(f"{IMAGE}.layers.1.blocks"),
                "num_groups": shape(f"{block}.mlp_inter.fc2.weight", 2)[0],
                "group_tokens": shape(f"{IMAGE}.layers.0.group_token", 3)[1],
                "patch_norm": f"{IMAGE}.patch_embed.norm.weight" in tensors,
            },
            "text": {
                "vocab_size": vocab,
                "width": text_width,
                "depth": depth(f"{TEXT}.encoder.layer"),
                "heads": text_heads,
                "mlp_width": shape(f"{TEXT}.encoder.layer.0.intermediate.dense.weight", 2)[0],
                "max_positions": shape(f"{TEXT}.embeddings.position_embeddings.weight", 2)[0],
            },
            "decoder": {
                "width": decoder_width,
                "heads": decoder_heads,
                "mlp_ratio": sizes.ratio(fed, decoder_width),
                "eps": 1e-5,
                "order": "cross_first",
                "depth": depth(DECODER),
                "mask_padding": False,
            },
            **MODEL_FIELDS,
            "joint_width": shape("img_projector.linear_out.weight", 3)[0],
            "projector_width": shape("img_projector.linear_hidden.0.weight", 3)[0],
            "text_pool": "cls",
        }
    )


# ---- there and back


def extra_tensors(tensors: Tensors) -> Tensors:
    """Tensors that the released code stores without using them, for `to_released` alone."""
    extra = {name: tensors[name] for name in matching(tensors, UNUSED)}
    if np.ndim(tensors.get(f"{IMAGE}.pos_embed")) == 3:
        extra[POSITION_AXIS] = np.asarray(1, np.int64)
    return extra


def from_released(
    tensors: Tensors, config: Mapping[str, Any] | ConfigDict, origin: str = "the checkpoint"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Our parameters, running statistics and teacher, nested NumPy, from a released checkpoint.

    The teacher is the visual encoder's moving average, None where the checkpoint has none.

    Args:
      tensors: by released name ("img_encoder...."; no "module." in front).
      config: see `released_config`.
      origin: where the tensors come from, for messages.

    Raises:
      UserError: one message that lists every tensor that is missing, unused or of another shape.
    """
    config = ConfigDict(dict(config))
    positions = {name: tensors.get(f"{name}.pos_embed") for name in (IMAGE, TEACHER)}
    flat = {f"{name}.pos_embed": x[0] for name, x in positions.items() if np.ndim(x) == 3}
    flat = {**tensors, **flat}
    shapes = variable_shapes(build_model(config))
    momentum = {name: x for name, x in flat.items() if name.startswith(f"{TEACHER}.")}
    rest = {name: x for name, x in flat.items() if name not in momentum}
    arrays = read_links(rest, model_links(config), shapes, extra_tensors(tensors), origin)
    teacher = None
    if momentum:
        encoder = {path: x for path, x in shapes.items() if path.startswith("image_encoder/")}
        arrays_of = read_links(momentum, image_links(config["image"], TEACHER), encoder, (), origin)
        teacher = unflatten_dict(arrays_of, sep="/")["image_encoder"]
    tree = unflatten_dict(arrays, sep="/")
    return tree, tree.pop(STATISTICS), teacher


def to_released(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    config: Mapping[str, Any] | ConfigDict,
    teacher: Mapping[str, Any] | None = None,
    extra: Tensors | None = None,
) -> Tensors:
    """A released checkpoint's tensors, the inverse of `from_released` and `extra_tensors`.

    Raises:
      UserError: the model is of another form than the released one.
    """
    needed = {"image.binding": "grouping_block", "image.second_stage": "groups"}
    needed |= {"decoder.order": "cross_first", "projector_norm": "batch"}
    require_form("the released", config, needed)
    tree = {**params, STATISTICS: batch_stats}
    tensors = write_links(flatten_dict(tree, sep="/"), model_links(config))
    if teacher is not None:
        encoder = flatten_dict({"image_encoder": dict(teacher)}, sep="/")
        tensors |= write_links(encoder, image_links(config["image"], TEACHER))
    extra = dict(extra or {})
    if extra.pop(POSITION_AXIS, None) is not None:
        for name in (f"{IMAGE}.pos_embed", f"{TEACHER}.pos_embed"):
            if name in tensors:
                tensors[name] = tensors[name][None]
    return tensors | extra


def require_form(
    form: str, config: Mapping[str, Any] | ConfigDict, needed: Mapping[str, Any]
) -> None:
    """Raises UserError where a ``config.model`` has other values than `needed`, by field.

    `form` says whose form it must be, as in "the released".
    """
    for field, wanted in needed.items():
        value = config
        for name in field.split("."):
            value = value and value[name]  # None where there is no decoder
        if value != wanted:
            raise UserError(
                f"only a model of {form} form has its names: config.model.{field} is {value!r}, "
                f"not {wanted!r}"
            )


# ---- names


def pre_norm_layers(ours: str, blocks: list[str]) -> list[Link]:
    """A stack of pre-norm layers with fused queries, keys and values."""
    fused = fused_attention(f"{ours}/attention", blocks, "attn.qkv.", stacked=True)
    return fused + module(ours, blocks, _PRE_NORM, stacked=True)


def image_links(image: Mapping[str, Any] | ConfigDict, theirs: str) -> list[Link]:
    """The visual encoder of a ``config.model.image``; `theirs` is the prefix of the tensors."""
    ours = "image_encoder"
    links = [
        *linear(f"{ours}/patch_embed", f"{theirs}.patch_embed.proj", form="patch"),
        Link((f"{ours}/position",), (f"{theirs}.pos_embed",), "table"),
        Link((f"{ours}/group_token",), (f"{theirs}.layers.0.group_token",), "token"),
        *(norm(f"{ours}/embed_norm", f"{theirs}.patch_embed.norm") if image["patch_norm"] else ()),
        *module(f"{ours}/binding", (f"{theirs}.layers.0.downsample.",), GROUPING_BLOCK),
        *norm(f"{ours}/norm", f"{theirs}.norm"),
    ]
    for stage, stack in enumerate(("first", "second")):
        depth = image[f"{stack}_layers"]
        if depth:
            blocks = [f"{theirs}.layers.{stage}.blocks.{index}." for index in range(depth)]
            links += pre_norm_layers(f"{ours}/{stack}/layers", blocks)
    return links


def projector_links(
    ours: str, first: str, normed: str, last: str, form: str = "pointwise"
) -> list[Link]:
    """A projector with its running statistics: both maps of a form, and the batch norm between."""
    running = f"{STATISTICS}/{ours}/norm"
    return [
        *linear(f"{ours}/fc", first, form=form),
        *norm(f"{ours}/norm", normed),
        *linear(f"{ours}/out", last, form=form),
        Link((f"{running}/mean",), (f"{normed}.running_mean",), "vector"),
        Link((f"{running}/variance",), (f"{normed}.running_var",), "vector"),
        Link((f"{running}/count",), (f"{normed}.num_batches_tracked",), "count"),
    ]


def model_links(model: Mapping[str, Any] | ConfigDict) -> list[Link]:
    """Everything in a ``config.model`` but the teacher."""
    image, text, decoder = (model[name] for name in ("image", "text", "decoder"))
    links = [
        Link(("log_scale",), ("logit_scale",), "scalar"),
        *image_links(image, IMAGE),
        *bert_links(text["depth"], f"{TEXT}."),
    ]
    if image["width"] != decoder["width"]:
        links += linear("entity_decoder/align_image", "align_proj_img")
    if text["width"] != decoder["width"]:
        links += linear("entity_decoder/align_text", "align_proj_text")
    for index in range(decoder["depth"]):
        layer, block = f"entity_decoder/layer_{index}", (f"{DECODER}.{index}.",)
        links += module(layer, block, _DECODER_LAYER)
        links += fused_attention(f"{layer}/self/attention", block, "post_attn.attn.qkv.")
    for ours, theirs in PROJECTORS.items():
        hidden = f"{theirs}.linear_hidden"
        links += projector_links(ours, f"{hidden}.0", f"{hidden}.1", f"{theirs}.linear_out")
    return links
