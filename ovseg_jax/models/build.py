"""From a config to a model. Sizes and options are fields; nothing is hard-coded in a module."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.bert import BertEncoder
from ovseg_jax.models.entity_decoder import EntityDecoder
from ovseg_jax.models.layers import FEED_FORWARD_ACTIVATIONS
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.models.positions import RESIZING
from ovseg_jax.models.projector import ACTIVATIONS
from ovseg_jax.models.text_transformer import CausalTextEncoder
from ovseg_jax.models.transformer import REMAT_POLICIES
from ovseg_jax.models.vit import VisualEncoder

CHOICES = {
    "image.assignment": ("hard", "soft"),
    "image.binding": ("slot", "grouping_block"),
    "image.second_stage": ("groups_and_patches", "groups"),
    "image.position": ("learned", "rope"),
    "image.position_resize": tuple(RESIZING),
    "image.remat": tuple(REMAT_POLICIES),
    "text.remat": tuple(REMAT_POLICIES),
    "text_pool": ("eot", "cls", "mean"),
    "projector_layers": (1, 2),
    "projector_norm": ("none", "batch"),
    "projector_activation": tuple(ACTIVATIONS),
    "decoder.order": ("self_first", "cross_first"),
    "dtype": ("float32", "bfloat16"),
    "matmul_dtype": ("float32", "bfloat16"),
}

# Fields of `config.text` that earlier versions wrote, with the only values that are still possible.
RETIRED = {"position_offset": 0, "token_types": 2}
# A field of image and text that earlier versions wrote, which never changed what a model computes.
IGNORED = "unroll"

TEXT_FORMS = {"bert": BertEncoder, "causal": CausalTextEncoder}


def check_model_config(config: ConfigDict) -> None:
    """Refuses a model that cannot be built.

    Raises:
      UserError: a field has none of its values, or sizes do not divide.
    """
    form = config.get("text_form", "bert")
    if form not in TEXT_FORMS:
        raise UserError(
            f"config.model.text_form is {form!r}; it must be one of "
            + ", ".join(map(repr, TEXT_FORMS))
        )
    choices = dict(CHOICES)
    if config.decoder is None:
        del choices["decoder.order"]
    if config.get("token_classes", 0):
        choices["token_classes_from"] = ("decoder", "text")
        if config.decoder is None and config.token_classes_from == "decoder":
            raise UserError(
                "config.model.token_classes_from = 'decoder' needs an entity decoder, but "
                "config.model.decoder is None: set token_classes_from = 'text'"
            )
    if form == "causal":
        choices["text.activation"] = tuple(FEED_FORWARD_ACTIVATIONS)
    for name, allowed in choices.items():
        node = config
        for part in name.split("."):
            node = node[part]
        if node not in allowed:
            listed = ", ".join(repr(value) for value in allowed)
            raise UserError(f"config.model.{name} is {node!r}; it must be one of {listed}")
    image = config.image
    widths = {
        "image.width": (image.width, image.heads),
        "image.width, after the binding,": (image.width, image.second_heads or image.heads),
        "image.trunk_width": (
            image.trunk_width or image.width,
            image.trunk_heads or image.heads,
        ),
        "text.width": (config.text.width, config.text.heads),
    }
    if config.decoder is not None:
        widths["decoder.width"] = (config.decoder.width, config.decoder.heads)
    for name, (width, heads) in widths.items():
        if width % heads:
            raise UserError(f"config.model.{name} = {width} is not a multiple of its {heads} heads")
    if image.binding == "slot" and image.group_tokens not in (0, image.num_groups):
        raise UserError(
            f"config.model.image.group_tokens = {image.group_tokens} must equal num_groups = "
            f"{image.num_groups} (or be 0) where binding = 'slot'; only 'grouping_block' mixes "
            "tokens into fewer groups"
        )
    if config.projector_norm == "batch" and config.projector_layers != 2:
        raise UserError(
            "config.model.projector_norm = 'batch' normalizes between two layers: set "
            "config.model.projector_layers = 2"
        )
    if image.get("later_stages") and (image.binding, image.second_stage) != (
        "grouping_block",
        "groups",
    ):
        raise UserError(
            "config.model.image.later_stages needs binding = 'grouping_block' and second_stage = "
            "'groups': later stages see groups alone"
        )
    if config.decoder is not None and config.decoder.depth < 1:
        raise UserError(f"config.model.decoder.depth = {config.decoder.depth} must be at least 1")
    if not 0 <= image.group_layer <= image.first_layers:
        raise UserError(
            f"config.model.image.group_layer = {image.group_layer} must lie between 0 and "
            f"first_layers = {image.first_layers}"
        )
    head_width = (image.trunk_width or image.width) // (image.trunk_heads or image.heads)
    if image.position == "rope" and (not image.group_layer or head_width % 4):
        raise UserError(
            "config.model.image.position = 'rope' acts in the attention of the trunk: it needs "
            f"group_layer > 0 (now {image.group_layer}) and heads whose width is a multiple of 4 "
            f"(now {head_width})"
        )
    outputs = image.get("trunk_outputs", ())
    if outputs and not (
        image.trunk_norm and all(1 <= number <= image.group_layer for number in outputs)
    ):
        raise UserError(
            f"config.model.image.trunk_outputs = {outputs} must be layers of the trunk, 1 to "
            f"group_layer = {image.group_layer}, and pass its norm: set trunk_norm = True"
        )
    kept = image.get("keep_class_token", False)
    if kept and not image.class_token:
        raise UserError(
            "config.model.image.keep_class_token needs a trunk with one: set class_token = True"
        )
    if bool(config.get("image_head", 0)) != kept:
        raise UserError(
            "config.model.image_head reads the class token, and nothing else does: set image_head "
            "and image.keep_class_token, or neither"
        )


def build_model(config: ConfigDict) -> OVSegmentor:
    """Builds the model that `config` (a run's ``config.model``) describes.

    Raises:
      UserError: see `check_model_config`.
    """
    check_model_config(config)
    options = {
        "dtype": jnp.dtype(config.dtype).type,
        "matmul_dtype": jnp.dtype(config.matmul_dtype).type,
    }
    image = dict(config.image)
    image["binding_form"] = image.pop("binding")
    image["grid"] = tuple(image["grid"])
    image["trunk_outputs"] = tuple(image.get("trunk_outputs", ()))
    image["later_stages"] = tuple(tuple(stage) for stage in image.get("later_stages", ()))
    text = {name: x for name, x in config.text.items() if (name, x) not in RETIRED.items()}
    for fields in (image, text):
        fields.pop(IGNORED, None)
    text_encoder = TEXT_FORMS[config.get("text_form", "bert")]
    decoder = config.decoder
    return OVSegmentor(
        image_encoder=VisualEncoder(**image, **options),
        text_encoder=text_encoder(**text, **options),
        entity_decoder=None if decoder is None else EntityDecoder(**decoder, **options),
        joint_width=config.joint_width,
        projector_layers=config.projector_layers,
        projector_width=config.projector_width,
        projector_norm=config.projector_norm,
        projector_activation=config.projector_activation,
        projector_bias=config.projector_bias,
        text_pool=config.text_pool,
        pad_id=config.pad_id,
        temperature_init=config.temperature_init,
        image_head=config.get("image_head", 0),
        image_head_dropout=config.get("image_head_dropout", 0.5),
        image_heads=config.get("image_heads", 1),
        token_classes=config.get("token_classes", 0),
        token_classes_from=config.get("token_classes_from", "decoder"),
        **options,
    )
