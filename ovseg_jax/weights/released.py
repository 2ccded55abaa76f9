"""Checkpoints of the released PyTorch model, both ways.

What the released code stores without using it is kept apart (`extra_tensors`), so that
`to_released` gives back every tensor that `from_released` was given, to the bit.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.weights.initialize import architecture
from ovseg_jax.weights.links import (
    Link,
    Sizes,
    fused_attention,
    grid_of,
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

# Stored without being used: BERT's pooler and constants, a second temperature, the assignment
# inside the decoder.
UNUSED = (
    r"text_encoder\.transformer\.(pooler\.dense\.(weight|bias)|embeddings\.(position|token_type)_ids)",
    r"logit_scale_mask",
    r"multimodal_groupingblock\.blocks\.\d+\.assign\..*",
)

# Position embeddings are [1, L, D], or [L, D] if they came from an image checkpoint. This key
# among the extra tensors, with the axis's length, remembers the first form.
POSITION_AXIS = "pos_embed.leading_axis"

# Attention heads, which tensors cannot tell.
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


def image_config(
    sizes: Sizes, names: SimpleNamespace, heads: int, grid: tuple[int, int] | None
) -> dict[str, Any]:
    """The ``config.model.image`` of a checkpoint with `image_names`."""
    shape, stages = sizes.shape, []  # (group tokens, groups, layers) of every stage that groups
    width, _, patch, _ = shape(f"{names.patch}.weight", 4)
    while not stages or f"{names.stages}.{len(stages)}.group_token" in sizes.tensors:
        name = f"{names.stages}.{len(stages)}"
        tokens = shape(f"{name}.group_token", 3)[1]
        groups = shape(f"{name}.downsample.mlp_inter.fc2.weight", 2)[0]
        stages.append((tokens, groups, sizes.depth(f"{name}.{names.blocks}")))
    positions = np.shape(sizes.tensors.get(names.position, np.zeros((0, width))))[-2]
    fed = f"{names.stages}.0.downsample.mlp_channels.fc1.weight"
    return {
        **IMAGE_FIELDS,
        "patch": patch,
        "grid": grid_of(positions, grid, names.position),
        "width": width,
        "heads": heads,
        "mlp_ratio": sizes.ratio(fed, width),
        "first_layers": stages[0][2],
        "second_layers": sizes.depth(f"{names.stages}.{len(stages)}.{names.blocks}"),
        "group_tokens": stages[0][0],
        "num_groups": stages[0][1],
        "later_stages": tuple(stages[1:]),
        "patch_norm": f"{names.embed_norm}.weight" in sizes.tensors,
    }


def released_config(
    tensors: Mapping[str, Any], *, grid: tuple[int, int] | None = None, **heads: int
) -> dict[str, Any]:
    """The ``config.model`` of a released checkpoint, whose sizes are those of the tensors.

    Args:
      grid: rows and columns of the position embeddings; None for a square.
      heads: changes to `HEADS`.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form.
    """
    sizes = Sizes(tensors, "released checkpoint")
    shape, depth, heads = sizes.shape, sizes.depth, HEADS | heads
    image = image_config(sizes, image_names(IMAGE), heads["heads"], grid)
    image["second_heads"] = heads["second_heads"]
    vocab, text_width = shape(f"{TEXT}.embeddings.word_embeddings.weight", 2)
    fed = f"{DECODER}.0.pre_assign_attn.mlp.fc1.weight"
    decoder_width = shape(fed, 2)[1]
    text = {
        "vocab_size": vocab,
        "width": text_width,
        "depth": depth(f"{TEXT}.encoder.layer"),
        "heads": heads["text_heads"],
        "mlp_width": shape(f"{TEXT}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_positions": shape(f"{TEXT}.embeddings.position_embeddings.weight", 2)[0],
    }
    decoder = {
        "width": decoder_width,
        "heads": heads["decoder_heads"],
        "mlp_ratio": sizes.ratio(fed, decoder_width),
        "eps": 1e-5,
        "order": "cross_first",
        "depth": depth(DECODER),
        "mask_padding": False,
    }
    joint = {
        "joint_width": shape("img_projector.linear_out.weight", 3)[0],
        "projector_width": shape("img_projector.linear_hidden.0.weight", 3)[0],
        "text_pool": "cls",
    }
    towers = {"image": image, "text": text, "decoder": decoder}
    return architecture({**towers, **MODEL_FIELDS, **joint})


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
    """Our parameters, running statistics and teacher (None without one), nested NumPy.

    Raises:
      UserError: lists every tensor of `origin` that is missing, unused or of another shape.
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
        averages = read_links(momentum, _image_links(config, TEACHER), encoder, (), origin)
        teacher = unflatten_dict(averages, sep="/")["image_encoder"]
    tree = unflatten_dict(arrays, sep="/")
    return tree, tree.pop(STATISTICS), teacher


def to_released(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    config: Mapping[str, Any] | ConfigDict,
    teacher: Mapping[str, Any] | None = None,
    extra: Tensors | None = None,
) -> Tensors:
    """The inverse of `from_released` and `extra_tensors`; UserError where the form is another."""
    needed = {"image.binding": "grouping_block", "image.second_stage": "groups"}
    needed |= {"decoder.order": "cross_first", "projector_norm": "batch"}
    require_form("the released", config, needed)
    tree = {**params, STATISTICS: batch_stats}
    tensors = write_links(flatten_dict(tree, sep="/"), model_links(config))
    if teacher is not None:
        encoder = flatten_dict({"image_encoder": dict(teacher)}, sep="/")
        tensors |= write_links(encoder, _image_links(config, TEACHER))
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
            why = f"config.model.{field} is {value!r}, not {wanted!r}"
            raise UserError(f"only a model of {form} form has its names: {why}")


# ---- names


def image_names(prefix: str) -> SimpleNamespace:
    """Names of the visual encoder's tensors; `blocks` come after a stage's number."""
    return SimpleNamespace(
        patch=f"{prefix}.patch_embed.proj",
        embed_norm=f"{prefix}.patch_embed.norm",
        position=f"{prefix}.pos_embed",
        norm=f"{prefix}.norm",
        stages=f"{prefix}.layers",
        blocks="blocks",
        block=GROUPING_BLOCK,
        layer=_PRE_NORM,
        fused="attn.qkv.",
    )


def image_links(
    image: Mapping[str, Any] | ConfigDict, names: SimpleNamespace, position: str = "token"
) -> list[Link]:
    """The visual encoder of a ``config.model.image``; `position` is the form of its positions."""
    ours = "image_encoder"
    links = [
        *linear(f"{ours}/patch_embed", names.patch, form="patch"),
        *(norm(f"{ours}/embed_norm", names.embed_norm) if image["patch_norm"] else ()),
        Link((f"{ours}/position",), (names.position,), position),
        *norm(f"{ours}/norm", names.norm),
    ]
    # Of each stage: path of its layers, their number, paths of its group tokens and block.
    stages = [("first", image["first_layers"], "group_token", "binding")]
    stages += [
        (f"stages_{i}/layers", layers, f"stages_{i}/group_token", f"stages_{i}/block")
        for i, (_, _, layers) in enumerate(image["later_stages"])
    ]
    stages.append(("second", image["second_layers"], "", ""))
    for index, (stack, depth, token, block) in enumerate(stages):
        theirs, path = f"{names.stages}.{index}", f"{ours}/{stack}/layers"
        blocks = [f"{theirs}.{names.blocks}.{layer}." for layer in range(depth)]
        if blocks:
            links += module(path, blocks, names.layer, stacked=True)
        if blocks and names.fused:
            links += fused_attention(f"{path}/attention", blocks, names.fused, stacked=True)
        if token:
            links.append(Link((f"{ours}/{token}",), (f"{theirs}.group_token",), "token"))
            links += module(f"{ours}/{block}", (f"{theirs}.downsample.",), names.block)
        if token and index:
            carried = {"projector_norm": "0", "projector/fc1": "1.fc1", "projector/fc2": "1.fc2"}
            prefix = f"{theirs}.group_projector."
            links += module(f"{ours}/stages_{index - 1}", (prefix,), carried)
    return links


def _image_links(model: Mapping[str, Any] | ConfigDict, prefix: str) -> list[Link]:
    return image_links(model["image"], image_names(prefix), position="table")


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
        *_image_links(model, IMAGE),
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
