"""Checkpoints of the released PyTorch model, both ways.

What the released code stores without using it is kept apart (`extra_tensors`), so that
`to_released` gives back every tensor that `from_released` was given, to the bit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights.bert import bert_links
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
from ovseg_jax.weights.tensors import Sizes, Tensors, grid_of

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
IMAGE_FIELDS = {
    "eps": 1e-5,
    "binding": "grouping_block",
    "second_stage": "groups",
    "drop_path": 0.1,
}
MODEL_FIELDS = {
    "projector_layers": 2,
    "projector_norm": "batch",
    "projector_activation": "relu",
    "projector_bias": True,
}

_PRE_NORM = {
    "attention_norm": "norm1",
    "attention/out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
_CROSS = {
    "attention/query": "attn.q_proj",
    "attention/key": "attn.k_proj",
    "attention/value": "attn.v_proj",
    "attention/out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
    "norm": "norm_post",
}
GROUPING_BLOCK = {
    "token_norm": "norm_tokens",
    "mixing/fc1": "mlp_inter.fc1",
    "mixing/fc2": "mlp_inter.fc2",
    "mixed_norm": "norm_post_tokens",
    "patch_norm": "norm_x",
    **{f"cross/{ours}": f"pre_assign_attn.{theirs}" for ours, theirs in _CROSS.items()},
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
    **{f"cross/{ours}": f"pre_assign_attn.{theirs}" for ours, theirs in _CROSS.items()},
    **{f"self/{ours}": f"post_attn.{theirs}" for ours, theirs in _PRE_NORM.items()},
    "norm": "norm_new_x",
}


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
    shape, depth = sizes.shape, sizes.depth
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
                "mlp_ratio": sizes.ratio(
                    f"{IMAGE}.layers.0.downsample.mlp_channels.fc1.weight", width
                ),
                "first_layers": depth(f"{IMAGE}.layers.0.blocks"),
                "second_layers": depth(f"{IMAGE}.layers.1.blocks"),
                "num_groups": shape(f"{IMAGE}.layers.0.downsample.mlp_inter.fc2.weight", 2)[0],
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
    names = (f"{IMAGE}.pos_embed", f"{TEACHER}.pos_embed")
    flat = {n: tensors[n][0] for n in names if n in tensors and np.ndim(tensors[n]) == 3}
    flat = {**tensors, **flat}
    shapes = variable_shapes(build_model(config))
    momentum = {name: x for name, x in flat.items() if name.startswith(f"{TEACHER}.")}
    rest = {name: x for name, x in flat.items() if name not in momentum}
    arrays = read_links(rest, model_links(config), shapes, extra_tensors(tensors), origin)
    teacher = None
    if momentum:
        encoder = {path: x for path, x in shapes.items() if path.startswith("image_encoder/")}
        links = image_links(config["image"], TEACHER)
        teacher = nest(read_links(momentum, links, encoder, (), origin))["image_encoder"]
    tree = nest(arrays)
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
    config = ConfigDict(dict(config))
    require_form(
        "the released",
        {
            "image.binding": (config.image.binding, "grouping_block"),
            "image.second_stage": (config.image.second_stage, "groups"),
            "decoder.order": (config.decoder and config.decoder.order, "cross_first"),
            "projector_norm": (config.projector_norm, "batch"),
        },
    )
    tensors = write_links(flatten({**params, STATISTICS: batch_stats}), model_links(config))
    if teacher is not None:
        links = image_links(config.image, TEACHER)
        tensors |= write_links(flatten({"image_encoder": teacher}), links)
    extra = dict(extra or {})
    if extra.pop(POSITION_AXIS, None) is not None:
        for name in (f"{IMAGE}.pos_embed", f"{TEACHER}.pos_embed"):
            if name in tensors:
                tensors[name] = tensors[name][None]
    return tensors | extra


def require_form(form: str, fields: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises UserError where a field of ``config.model`` has another value than it must have.

    Args:
      form: whose form it must be, as in "the released".
      fields: (value, needed value) by name.
    """
    for field, (value, needed) in fields.items():
        if value != needed:
            raise UserError(
                f"only a model of {form} form has its names: config.model.{field} is {value!r}, "
                f"not {needed!r}"
            )


# ---- names


def pre_norm_layers(ours: str, *blocks: str) -> list[Link]:
    """A stack of pre-norm layers with fused queries, keys and values."""
    return [
        *fused_attention(f"{ours}/attention", blocks, "attn.qkv.", stacked=True),
        *module(ours, blocks, _PRE_NORM, stacked=True),
    ]


def image_links(image: Mapping[str, Any] | ConfigDict, theirs: str) -> list[Link]:
    """The visual encoder of a ``config.model.image``; `theirs` is the prefix of the tensors."""
    ours = "image_encoder"
    links = [
        *linear(f"{ours}/patch_embed", f"{theirs}.patch_embed.proj", form="patch"),
        Link((f"{ours}/position",), (f"{theirs}.pos_embed",), "table"),
        Link((f"{ours}/group_token",), (f"{theirs}.layers.0.group_token",), "token"),
    ]
    if image["patch_norm"]:
        links += norm(f"{ours}/embed_norm", f"{theirs}.patch_embed.norm")
    for stage, stack in enumerate(("first", "second")):
        depth = image[f"{stack}_layers"]
        if depth:
            blocks = (f"{theirs}.layers.{stage}.blocks.{index}." for index in range(depth))
            links += pre_norm_layers(f"{ours}/{stack}/layers", *blocks)
    links += module(f"{ours}/binding", (f"{theirs}.layers.0.downsample.",), GROUPING_BLOCK)
    return links + norm(f"{ours}/norm", f"{theirs}.norm")


def decoder_links(depth: int, aligned: str) -> list[Link]:
    """The entity decoder. `aligned`: which of "image" and "text" is projected, "" for neither."""
    ours = "entity_decoder"
    names = {"image": "align_proj_img", "text": "align_proj_text"}
    links = linear(f"{ours}/align_{aligned}", names[aligned]) if aligned else []
    for index in range(depth):
        layer, block = f"{ours}/layer_{index}", (f"{DECODER}.{index}.",)
        links += module(layer, block, _DECODER_LAYER)
        links += fused_attention(f"{layer}/self/attention", block, "post_attn.attn.qkv.")
    return links


def projector_links(
    ours: str, first: str, normed: str, last: str, form: str = "pointwise"
) -> list[Link]:
    """A projector with its running statistics.

    Args:
      ours: name of the projector.
      first: name of the first map's tensors, up to ".weight" and ".bias".
      normed: of the batch norm.
      last: of the last map.
      form: of the two maps.
    """
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
    widths = {"image": image["width"], "text": text["width"]}
    aligned = [side for side, width in widths.items() if width != decoder["width"]]
    links = [
        Link(("log_scale",), ("logit_scale",), "scalar"),
        *image_links(image, IMAGE),
        *bert_links(text["depth"], f"{TEXT}."),
        *decoder_links(decoder["depth"], aligned[0] if aligned else ""),
    ]
    for ours, theirs in PROJECTORS.items():
        hidden = f"{theirs}.linear_hidden"
        links += projector_links(ours, f"{hidden}.0", f"{hidden}.1", f"{theirs}.linear_out")
    return links
