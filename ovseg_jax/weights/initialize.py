"""Starting parameters from published weights: the visual encoder and the text encoder."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ovseg_jax.errors import UserError
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.models.projector import STATISTICS
from ovseg_jax.optim.groups import flatten
from ovseg_jax.weights import bert, vit, vit_names
from ovseg_jax.weights.convert_tree import Rule, convert
from ovseg_jax.weights.sources import find_weights, read_weights
from ovseg_jax.weights.tensors import Tensors

Shapes = Mapping[str, tuple[int, ...]]

# The layers that see the image alone, with what comes before and directly after them.
TRUNK = (
    "image_encoder/patch_embed/",
    "image_encoder/embed_norm/",
    "image_encoder/position",
    "image_encoder/class_token",
    "image_encoder/register_tokens",
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


def variable_shapes(model: OVSegmentor) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter and, under "batch_stats/", every running statistic.

    Computes none of them.
    """
    variables = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    tree = nn.unbox({**variables["params"], STATISTICS: variables.get(STATISTICS, {})})
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def strip_prefix(tensors: Tensors, anchor: str) -> Tensors:
    """Removes what precedes `anchor` in the name that ends with it ("backbone.", "bert.", ...).

    Names without the prefix are kept as they are.
    """
    owner = next((name for name in tensors if name.endswith(anchor)), anchor)
    prefix = owner.removesuffix(anchor)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def initial_image(
    spec: str, shapes: Shapes, resample_to: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Parameters of the visual encoder from `config.model.image_init`.

    A published ViT fills the trunk or all layers, see `weights.vit`; group tokens, binding and
    neck stay random. A model of ours fills the whole visual encoder.

    Args:
      spec: see `weights.sources.find_weights`: a .safetensors, .npz or .onnx file, a folder with
        safetensors, a model directory, or a hub id.
      shapes: all the model's parameters.
      resample_to: the model's grid (rows, columns), to resample positions of another grid to
        it; None refuses weights of another grid.

    Returns:
      path to array, for the parameters that the weights fill.

    Raises:
      UserError: the weights cannot be found or read, or do not fit; names every tensor at fault.
    """
    field = "config.model.image_init"
    path = find_weights(spec, field)
    tensors = read_weights(path, field, "dino")
    ours = _from_model(tensors, shapes, "image_encoder/", str(path))
    if ours is not None:
        return ours
    for anchor in vit_names.ANCHORS:
        tensors = strip_prefix(tensors, anchor)
    found = vit.from_vit(tensors, shapes, str(path), resample_to)
    if found is None:
        raise UserError(
            f"{field}: {path} holds no ViT under names that are known (DINO, DeiT, DINOv2 or "
            "DINOv3 as released or from Hugging Face) and no model of ours; its first tensors are "
            f"{', '.join(list(tensors)[:3])}"
        )
    return found


def initial_text(spec: str, shapes: Shapes) -> dict[str, np.ndarray]:
    """Parameters of the text encoder from `config.model.text_init`; see `initial_image`."""
    field = "config.model.text_init"
    path = find_weights(spec, field)
    tensors = read_weights(path, field, "bert")
    ours = _from_model(tensors, shapes, "text_encoder/", str(path))
    if ours is not None:
        return ours
    tensors = strip_prefix(tensors, bert.ANCHOR)
    if not bert.is_bert(tensors):
        raise UserError(
            f"{field}: {path} holds no BERT ({bert.ANCHOR} is missing) and "
            f"no model of ours; its first tensors are {', '.join(list(tensors)[:3])}"
        )
    return bert.from_bert(tensors, shapes, str(path))


def _from_model(
    tensors: Tensors, shapes: Shapes, part: str, origin: str
) -> dict[str, np.ndarray] | None:
    """The parameters under `part` of a model of ours; None where the names are not ours."""
    if not any(name.startswith(part) for name in tensors):
        return None
    own = {name: value for name, value in tensors.items() if name.startswith(part)}
    wanted = {path: shape for path, shape in shapes.items() if path.startswith(part)}
    return convert(own, [Rule(path, (path,)) for path in wanted], wanted, (), origin)
