"""Starting parameters from published weights: the visual trunk and the text encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ovseg_jax.errors import UserError
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.models.projector import STATISTICS
from ovseg_jax.optim.groups import flatten
from ovseg_jax.weights import bert, dinov2, vit
from ovseg_jax.weights.convert_tree import convert
from ovseg_jax.weights.tensors import Tensors, package_file, read_tensors

Shapes = Mapping[str, tuple[int, ...]]

TRUNK = (
    "image_encoder/patch_embed/",
    "image_encoder/position",
    "image_encoder/class_token",
    "image_encoder/trunk_layers/",
    "image_encoder/trunk_end/",
)


def init_variables(model: OVSegmentor, key: jax.Array) -> Any:
    """All collections of the model at their start; see `init_params` and `init_statistics`."""
    patch = model.image_encoder.patch
    image = jnp.zeros((1, 2 * patch, 2 * patch, 3), jnp.uint8)
    ids = jnp.ones((1, 4), jnp.int32)
    return model.init({"params": key}, image, ids)


def init_params(model: OVSegmentor, key: jax.Array) -> Any:
    """Random parameters, boxed with their logical axis names (`flax.linen.unbox` opens them)."""
    return init_variables(model, key)["params"]


def init_statistics(model: OVSegmentor) -> dict[str, Any]:
    """Running statistics of batch norms at their start (mean 0, variance 1); {} without any.

    Abstract under `jax.eval_shape`.
    """
    if model.projector_norm != "batch":
        return {}
    return jax.jit(lambda: dict(init_variables(model, jax.random.key(0)).get(STATISTICS, {})))()


def model_shapes(model: OVSegmentor) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter, without computing any."""
    abstract = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(nn.unbox(abstract)).items()}


def strip_prefix(tensors: Tensors, anchor: str) -> Tensors:
    """Removes what precedes `anchor` in the name that ends with it ("backbone.", "bert.", ...).

    Names without the prefix are kept as they are.
    """
    owner = next((name for name in tensors if name.endswith(anchor)), anchor)
    prefix = owner.removesuffix(anchor)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _weights_path(spec: str, field: str) -> Path:
    path = package_file(spec, field)
    return path / "model.safetensors" if path.is_dir() else path


def initial_image(spec: str, shapes: Shapes) -> dict[str, np.ndarray]:
    """Parameters of the visual encoder from `config.model_init.image`.

    A DINOv2 backbone fills the trunk; a plain ViT (DINO, DeiT) all the encoder's layers. Group
    tokens, binding and neck stay random.

    Args:
      spec: a .safetensors, .npz or .onnx file, or a directory with model.safetensors; a path or
        "package:NAME/...".
      shapes: all the model's parameters.

    Returns:
      path to array, for the parameters that the weights fill.

    Raises:
      UserError: the weights cannot be read or do not fit; names every tensor at fault.
    """
    field = "config.model_init.image"
    path = _weights_path(spec, field)
    tensors = read_tensors(path)
    for anchor in vit.ANCHORS:
        tensors = strip_prefix(tensors, anchor)
    if dinov2.is_dinov2(tensors):
        wanted = {name: shape for name, shape in shapes.items() if name.startswith(TRUNK)}
        rules = dinov2.dinov2_rules(_depth(shapes, "trunk_layers"))
        return convert(dinov2.separate_positions(tensors), rules, wanted, dinov2.DROPPED, str(path))
    if vit.is_vit(tensors):
        tensors = vit.split_qkv(tensors)
        fresh = tuple(f"image_encoder/{name}" for name in ("group_token", "binding/", "neck/"))
        wanted = {
            name: shape
            for name, shape in shapes.items()
            if name.startswith("image_encoder/") and not name.startswith(fresh)
        }
        stacks = {name: _depth(shapes, name) for name in ("trunk_layers", "first", "second")}
        rules = vit.vit_rules(tensors, stacks, shapes["image_encoder/position"][0])
        return convert(tensors, rules, wanted, vit.DROPPED, str(path))
    raise UserError(
        f"{field}: {path} holds neither a DINOv2 backbone nor a plain ViT under names that are "
        f"known; its first tensors are {', '.join(list(tensors)[:3])}"
    )


def _depth(shapes: Shapes, stack: str) -> int:
    return shapes.get(f"image_encoder/{stack}/layers/mlp/fc1/bias", (0,))[0]


def initial_text(spec: str, shapes: Shapes) -> dict[str, np.ndarray]:
    """Parameters of the text encoder from `config.model_init.text`; see `initial_image`."""
    path = _weights_path(spec, "config.model_init.text")
    tensors = strip_prefix(read_tensors(path), "embeddings.word_embeddings.weight")
    wanted = {name: shape for name, shape in shapes.items() if name.startswith("text_encoder/")}
    layers = shapes["text_encoder/layers/mlp/fc1/bias"][0]
    return convert(tensors, bert.bert_rules(layers), wanted, bert.DROPPED, str(path))
