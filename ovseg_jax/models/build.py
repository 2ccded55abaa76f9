"""From a config to a model. The defaults of its fields are those of the modules."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.models.ovsegmentor import ACTIVATIONS, STATISTICS, OVSegmentor
from ovseg_jax.models.text import BertEncoder, CausalTextEncoder, EntityDecoder
from ovseg_jax.models.transformer import REMAT_POLICIES
from ovseg_jax.models.vit import RESIZING, VisualEncoder

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
    "token_classes_from": ("decoder", "text"),
    "dtype": ("float32", "bfloat16"),
    "matmul_dtype": ("float32", "bfloat16"),
}

# Fields of image and text that earlier versions wrote, with the values that are still possible;
# `unroll` never changed what a model computes.
RETIRED = {
    "image.binding_scale": None,
    "image.gumbel_temperature": 1.0,
    "text.position_offset": 0,
    "text.token_types": 2,
    "text.activation": "quick_gelu",
}
IGNORED = ("image.unroll", "text.unroll")

TEXT_FORMS = {"bert": BertEncoder, "causal": CausalTextEncoder}

# Fields that say what a run's parameters start from, which is no part of the model.
START = {"image_init": "", "text_init": "", "resample_init": False, "neck_init": ""}

# Fields of modules that a config has elsewhere, or not at all.
_NOT_IN_CONFIGS = ("parent", "name", "dtype", "matmul_dtype")
_TOWERS = ("image_encoder", "text_encoder", "entity_decoder")


def complete_model(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """A ``config.model`` with the module's default for every field that it leaves out.

    Raises:
      UserError: an unknown text form, a field that does not exist, or a missing size.
    """
    form = config.get("text_form", "bert")
    if form not in list(TEXT_FORMS):
        known = ", ".join(map(repr, TEXT_FORMS))
        raise UserError(f"config.model.text_form is {form!r}; it must be one of {known}")
    defaults = {
        "image": {},
        "text_form": form,
        "text": {},
        "decoder": None,
        **_defaults(OVSegmentor, without=_TOWERS),
        "dtype": "float32",
        "matmul_dtype": "float32",
        **START,
    }
    full = _complete(config, defaults, "")
    modules = {"image": VisualEncoder, "text": TEXT_FORMS[form], "decoder": EntityDecoder}
    for name, module in modules.items():
        if full[name] is not None:
            full[name] = _complete(full[name], _defaults(module), f"{name}.")
    return ConfigDict(full)


def _defaults(module: type[nn.Module], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Config fields of a module; those without a default are `dataclasses.MISSING`."""
    names = {"binding_form": "binding"}
    return {
        names.get(field.name, field.name): field.default
        for field in dataclasses.fields(module)
        if field.name not in (*_NOT_IN_CONFIGS, *without)
    }


def _complete(given: Any, defaults: dict[str, Any], where: str) -> dict:
    if not isinstance(given, Mapping | ConfigDict):
        raise UserError(f"config.model.{where.rstrip('.')} is {given!r}, but has fields of its own")
    full = dict(defaults)
    for key, value in given.items():
        name = f"{where}{key}"
        if key in defaults:
            full[key] = value
        elif name not in IGNORED and (name, value) not in RETIRED.items():
            near = nearest(key, list(defaults))
            raise UserError(f"config.model.{name} = {value!r} is no field{near}")
    missing = [key for key, value in full.items() if value is dataclasses.MISSING]
    if missing:
        raise UserError(f"config.model.{where.rstrip('.')} needs {', '.join(missing)}")
    return full


def check_model_config(config: ConfigDict) -> None:
    """Refuses a model whose complete config cannot be built.

    Raises:
      UserError: a field has none of its values, or sizes do not divide.
    """
    for name, allowed in CHOICES.items():
        group, _, field = name.rpartition(".")
        node = config[group] if group else config
        if node is not None and node[field] not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise UserError(f"config.model.{name} is {node[field]!r}; it must be one of {listed}")
    image, text, decoder = config.image, config.text, config.decoder
    trunk_width, trunk_heads = image.trunk_width or image.width, image.trunk_heads or image.heads
    widths = {
        "image.width": (image.width, image.heads),
        "image.width, after the binding,": (image.width, image.second_heads or image.heads),
        "image.trunk_width": (trunk_width, trunk_heads),
        "text.width": (text.width, text.heads),
        "decoder.width": (decoder.width, decoder.heads) if decoder else (0, 1),
    }
    for name, (width, heads) in widths.items():
        if heads < 1 or width % heads:
            raise UserError(f"config.model.{name} = {width} is not a multiple of its {heads} heads")
    form, layers, outputs = image.binding, image.group_layer, image.trunk_outputs
    in_trunk = all(1 <= number <= layers for number in outputs)
    faults = {
        "token_classes_from = 'decoder' needs an entity decoder, but config.model.decoder is None: "
        "set token_classes_from = 'text'": (
            config.token_classes and decoder is None and config.token_classes_from == "decoder"
        ),
        f"image.group_tokens = {image.group_tokens} must equal num_groups = {image.num_groups} (or "
        "be 0) where binding = 'slot'; only 'grouping_block' mixes tokens into fewer groups": (
            form == "slot" and image.group_tokens not in (0, image.num_groups)
        ),
        "projector_norm = 'batch' normalizes between two layers: set config.model.projector_layers "
        "= 2": config.projector_norm == "batch" and config.projector_layers != 2,
        "image.later_stages needs binding = 'grouping_block' and second_stage = 'groups': later "
        "stages see groups alone": (
            image.later_stages and (form, image.second_stage) != ("grouping_block", "groups")
        ),
        "decoder.depth must be at least 1": decoder and decoder.depth < 1,
        f"image.group_layer = {layers} must lie between 0 and first_layers = "
        f"{image.first_layers}": not 0 <= layers <= image.first_layers,
        "image.position = 'rope' acts in the attention of the trunk: it needs group_layer > 0 (now "
        f"{layers}) and heads whose width is a multiple of 4 (now {trunk_width // trunk_heads})": (
            image.position == "rope" and (not layers or trunk_width // trunk_heads % 4)
        ),
        f"image.trunk_outputs = {outputs} must be layers of the trunk, 1 to group_layer = {layers}"
        ", and pass its norm: set trunk_norm = True": (
            outputs and not (image.trunk_norm and in_trunk)
        ),
        "image.keep_class_token needs a trunk with one: set class_token = True": (
            image.keep_class_token and not image.class_token
        ),
        "image_head reads the class token, and nothing else does: set image_head and "
        "image.keep_class_token, or neither": bool(config.image_head) != image.keep_class_token,
    }
    for fault, present in faults.items():
        if present:
            raise UserError(f"config.model.{fault}")


def build_model(config: Mapping[str, Any] | ConfigDict) -> OVSegmentor:
    """Builds the model that `config` (a run's ``config.model``) describes.

    Raises:
      UserError: see `complete_model` and `check_model_config`.
    """
    config = complete_model(config)
    check_model_config(config)
    options = {name: jnp.dtype(config[name]).type for name in ("dtype", "matmul_dtype")}
    image = dict(config.image)
    image["binding_form"] = image.pop("binding")
    image["grid"] = tuple(image["grid"])
    image["trunk_outputs"] = tuple(image["trunk_outputs"])
    image["later_stages"] = tuple(tuple(stage) for stage in image["later_stages"])
    decoder = config.decoder
    return OVSegmentor(
        image_encoder=VisualEncoder(**image, **options),
        text_encoder=TEXT_FORMS[config.text_form](**config.text, **options),
        entity_decoder=None if decoder is None else EntityDecoder(**decoder, **options),
        **{name: config[name] for name in _defaults(OVSegmentor, without=_TOWERS)},
        **options,
    )


# ---- random values


def init_variables(model: OVSegmentor, key: jax.Array) -> Any:
    """All collections of the model at their start; see `init_params` and `init_statistics`."""
    patch = model.image_encoder.patch
    image = jnp.zeros((1, 2 * patch, 2 * patch, 3), jnp.uint8)
    return model.init({"params": key}, image, jnp.ones((1, 4), jnp.int32))


def init_params(model: OVSegmentor, key: jax.Array) -> Any:
    """Random parameters, boxed with their logical axis names (`flax.linen.unbox` opens them)."""
    return init_variables(model, key)["params"]


def init_statistics(model: OVSegmentor) -> dict[str, Any]:
    """Running statistics of batch norms at their start (mean 0, variance 1); {} without any."""
    if model.projector_norm != "batch":
        return {}
    return jax.jit(lambda: dict(init_variables(model, jax.random.key(0)).get(STATISTICS, {})))()


@functools.cache  # tracing a whole model takes seconds
def variable_shapes(model: OVSegmentor) -> Mapping[str, tuple[int, ...]]:
    """Path and shape of every parameter and, under "batch_stats/", every running statistic."""
    variables = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    tree = nn.unbox({**variables["params"], STATISTICS: variables.get(STATISTICS, {})})
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}
    return MappingProxyType(shapes)
