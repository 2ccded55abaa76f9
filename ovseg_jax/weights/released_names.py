"""The tensor names of the released PyTorch checkpoints, and the parameters that they are here."""

from ml_collections import ConfigDict

from ovseg_jax.models.projector import STATISTICS
from ovseg_jax.weights.two_way import Link

IMAGE, TEACHER = "img_encoder", "img_encoder_momentum"
TEXT = "text_encoder.transformer"
DECODER = "multimodal_groupingblock.blocks"
PROJECTORS = {
    "image_projector": "img_projector",
    "text_projector": "text_projector",
    "completion_projector": "bridge_projector",
}

# What the released code carries without using it: BERT's pooler and constants, a second
# temperature, the assignment inside the decoder.
UNUSED = (
    r"text_encoder\.transformer\.(pooler\.dense\.(weight|bias)|embeddings\.(position|token_type)_ids)",
    r"logit_scale_mask",
    r"multimodal_groupingblock\.blocks\.\d+\.assign\..*",
)

_BERT_LINEAR = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
_BERT_NORM = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def linear(ours: str, *theirs: str, stacked: bool = False, form: str = "linear") -> list[Link]:
    """Weight and bias of a linear map, of one layer or of a stack of them."""
    weights, biases = (tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias"))
    return [
        Link((f"{ours}/kernel",), weights, form, stacked),
        Link((f"{ours}/bias",), biases, "vector", stacked),
    ]


def norm(ours: str, *theirs: str, stacked: bool = False) -> list[Link]:
    """Weight and bias of a LayerNorm or batch norm."""
    weights, biases = (tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias"))
    return [
        Link((f"{ours}/scale",), weights, "vector", stacked),
        Link((f"{ours}/bias",), biases, "vector", stacked),
    ]


def pre_norm_layers(ours: str, *blocks: str, stacked: bool) -> list[Link]:
    """Pre-norm layers with fused queries, keys and values."""

    def at(suffix: str) -> tuple[str, ...]:
        return tuple(f"{block}.{suffix}" for block in blocks)

    fused = tuple(f"{ours}/attention/{part}" for part in ("query", "key", "value"))
    kernels, biases = (tuple(f"{path}/{x}" for path in fused) for x in ("kernel", "bias"))
    return [
        *norm(f"{ours}/attention_norm", *at("norm1"), stacked=stacked),
        Link(kernels, at("attn.qkv.weight"), "fused_linear", stacked),
        Link(biases, at("attn.qkv.bias"), "fused_vector", stacked),
        *linear(f"{ours}/attention/out", *at("attn.proj"), stacked=stacked),
        *norm(f"{ours}/mlp_norm", *at("norm2"), stacked=stacked),
        *linear(f"{ours}/mlp/fc1", *at("mlp.fc1"), stacked=stacked),
        *linear(f"{ours}/mlp/fc2", *at("mlp.fc2"), stacked=stacked),
    ]


def cross_attention(ours: str, theirs: str) -> list[Link]:
    """A `CrossAttentionBlock`."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "proj"}
    links = [
        link
        for ourname, name in names.items()
        for link in linear(f"{ours}/attention/{ourname}", f"{theirs}.attn.{name}")
    ]
    return [
        *links,
        *norm(f"{ours}/mlp_norm", f"{theirs}.norm2"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
        *norm(f"{ours}/norm", f"{theirs}.norm_post"),
    ]


def grouping_block(ours: str, theirs: str) -> list[Link]:
    """A `GroupingBlock`."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "proj"}
    return [
        *norm(f"{ours}/token_norm", f"{theirs}.norm_tokens"),
        *linear(f"{ours}/mixing/fc1", f"{theirs}.mlp_inter.fc1"),
        *linear(f"{ours}/mixing/fc2", f"{theirs}.mlp_inter.fc2"),
        *norm(f"{ours}/mixed_norm", f"{theirs}.norm_post_tokens"),
        *norm(f"{ours}/patch_norm", f"{theirs}.norm_x"),
        *cross_attention(f"{ours}/cross", f"{theirs}.pre_assign_attn"),
        *(
            link
            for ourname, name in names.items()
            for link in linear(f"{ours}/{ourname}", f"{theirs}.assign.{name}")
        ),
        *norm(f"{ours}/mlp_norm", f"{theirs}.norm_new_x"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp_channels.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp_channels.fc2"),
    ]


def image_links(image: ConfigDict, theirs: str) -> list[Link]:
    """The visual encoder, or (`theirs` = `TEACHER`) its moving average.

    Args:
      image: a ``config.model.image``.
    """
    ours = "image_encoder"

    def blocks(stage: int, count: int) -> tuple[str, ...]:
        return tuple(f"{theirs}.layers.{stage}.blocks.{index}" for index in range(count))

    links = [
        *linear(f"{ours}/patch_embed", f"{theirs}.patch_embed.proj", form="patch"),
        Link((f"{ours}/position",), (f"{theirs}.pos_embed",), "table"),
        Link((f"{ours}/group_token",), (f"{theirs}.layers.0.group_token",), "token"),
    ]
    if image["patch_norm"]:
        links += norm(f"{ours}/embed_norm", f"{theirs}.patch_embed.norm")
    for stage, (stack, depth) in enumerate(
        (("first", image["first_layers"]), ("second", image["second_layers"]))
    ):
        if depth:
            links += pre_norm_layers(f"{ours}/{stack}/layers", *blocks(stage, depth), stacked=True)
    links += grouping_block(f"{ours}/binding", f"{theirs}.layers.0.downsample")
    return links + norm(f"{ours}/norm", f"{theirs}.norm")


def text_links(depth: int) -> list[Link]:
    """BERT, of `depth` layers."""
    ours = "text_encoder"

    def layers(suffix: str) -> tuple[str, ...]:
        return tuple(f"{TEXT}.encoder.layer.{index}.{suffix}" for index in range(depth))

    tables = {"word": "word", "position": "position", "token_type": "token_type"}
    links = [
        Link((f"{ours}/{name}",), (f"{TEXT}.embeddings.{theirs}_embeddings.weight",), "table")
        for name, theirs in tables.items()
    ]
    links += norm(f"{ours}/embed_norm", f"{TEXT}.embeddings.LayerNorm")
    for name, theirs in _BERT_LINEAR.items():
        links += linear(f"{ours}/layers/{name}", *layers(theirs), stacked=True)
    for name, theirs in _BERT_NORM.items():
        links += norm(f"{ours}/layers/{name}", *layers(theirs), stacked=True)
    return links


def decoder_links(depth: int, aligned: str) -> list[Link]:
    """The entity decoder, of `depth` layers.

    Args:
      aligned: "image" or "text", the side that is projected to the other's width; "" for neither.
    """
    ours = "entity_decoder"
    names = {"image": "align_proj_img", "text": "align_proj_text"}
    links = linear(f"{ours}/align_{aligned}", names[aligned]) if aligned else []
    for index in range(depth):
        layer, block = f"{ours}/layer_{index}", f"{DECODER}.{index}"
        links += norm(f"{layer}/token_norm", f"{block}.norm_tokens")
        links += norm(f"{layer}/group_norm", f"{block}.norm_x")
        links += cross_attention(f"{layer}/cross", f"{block}.pre_assign_attn")
        links += pre_norm_layers(f"{layer}/self", f"{block}.post_attn", stacked=False)
        links += norm(f"{layer}/norm", f"{block}.norm_new_x")
    return links


def projector_links() -> list[Link]:
    """The three projectors with their running statistics, which lie under "batch_stats/"."""
    links = []
    for ours, theirs in PROJECTORS.items():
        hidden, statistics = f"{theirs}.linear_hidden", f"{STATISTICS}/{ours}/norm"
        links += linear(f"{ours}/fc", f"{hidden}.0", form="pointwise")
        links += norm(f"{ours}/norm", f"{hidden}.1")
        links += linear(f"{ours}/out", f"{theirs}.linear_out", form="pointwise")
        links += [
            Link((f"{statistics}/mean",), (f"{hidden}.1.running_mean",), "vector"),
            Link((f"{statistics}/variance",), (f"{hidden}.1.running_var",), "vector"),
            Link((f"{statistics}/count",), (f"{hidden}.1.num_batches_tracked",), "count"),
        ]
    return links


def model_links(model: ConfigDict) -> list[Link]:
    """Everything but the teacher.

    Args:
      model: a ``config.model`` of the released form.
    """
    image, text, decoder = (model[name] for name in ("image", "text", "decoder"))
    widths = {"image": image["width"], "text": text["width"]}
    aligned = [side for side, width in widths.items() if width != decoder["width"]]
    return [
        Link(("log_scale",), ("logit_scale",), "scalar"),
        *image_links(image, IMAGE),
        *text_links(text["depth"]),
        *decoder_links(decoder["depth"], aligned[0] if aligned else ""),
        *projector_links(),
    ]
