"""Published ViTs (DINO, DeiT, MAE, DINOv2, DINOv3, ...) as our visual encoder.

Where the encoder's trunk ends in a norm of its own (`trunk_norm`), the whole ViT becomes the
trunk, in front of the groups. Otherwise it is laid over all layers: the first ones before the
binding, the others after it (paper, Sec. 4.1: layers 0-5 and 6-11 of DINO), and its final norm
becomes the encoder's. Group tokens, binding and neck are never part of it.
"""

from collections.abc import Mapping
from math import isqrt

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights import vit_tensors
from ovseg_jax.weights.convert_tree import Rule, convert, transpose
from ovseg_jax.weights.tensors import Tensors
from ovseg_jax.weights.vit_names import DROPPED, STYLES, Style, find_style

Shapes = Mapping[str, tuple[int, ...]]

ROOT = "image_encoder"
STACKS = ("trunk_layers", "first", "second")
BARE = ("class_token", "register_tokens", "position")


def stack_depth(shapes: Shapes, stack: str) -> int:
    """Layers of a stack of the visual encoder; 0 where it is empty."""
    return shapes.get(f"{ROOT}/{stack}/layers/mlp/fc1/bias", (0,))[0]


def from_vit(
    tensors: Tensors, shapes: Shapes, origin: str, resample_to: tuple[int, int] | None = None
) -> dict[str, np.ndarray] | None:
    """Parameters of the visual encoder from a published ViT.

    Args:
      tensors: with any prefix removed.
      shapes: all the model's parameters.
      origin: where the tensors come from, for messages.
      resample_to: the model's grid, where positions shall be resampled to it.

    Returns:
      path to array, for the parameters that a ViT fills; None where the tensors are no ViT's.

    Raises:
      UserError: lists every tensor that is missing, left over or misshapen.
    """
    tensors = vit_tensors.one_name_for_registers(vit_tensors.split_fused(tensors))
    name = find_style(tensors, origin)
    if name is None:
        return None
    style = STYLES[name]
    if name == "dinov2":
        tensors = _name_onnx_positions(tensors)
    as_trunk = f"{ROOT}/trunk_end/scale" in shapes
    stacks = STACKS[:1] if as_trunk else STACKS
    patches = shapes.get(f"{ROOT}/position", (0,))[0]
    patch = isqrt(shapes[f"{ROOT}/patch_embed/kernel"][0] // 3)
    tensors = vit_tensors.zero_key_biases(tensors, style)
    tensors = vit_tensors.separate_positions(tensors, style, patches)
    layers = _layers(shapes, stacks)
    for stack, indices in layers.items():
        if f"{ROOT}/{stack}/layers/attention_scale/scale" not in shapes:
            tensors = vit_tensors.fold_layer_scale(tensors, style, indices)
    found = _patch_and_grid(tensors, style)
    if resample_to is not None:
        tensors = vit_tensors.resample(tensors, style, resample_to)
    rules = _rules(shapes, style, layers, "trunk_end" if as_trunk else "norm")
    dropped = list(DROPPED)
    if not as_trunk:
        # Beside the groups there is no place for the class token and registers.
        dropped += [name.replace(".", r"\.") for name in style.bare[:2]]
    wanted = {path: shape for path, shape in shapes.items() if path.startswith(_filled(stacks))}
    try:
        return convert(tensors, rules, wanted, dropped, origin)
    except UserError as error:
        if resample_to is None and found != (patch, patches):
            raise UserError(
                f"{error}\n(these weights: patches of {found[0]} pixels, {found[1]} positions; the "
                f"model: {patch} and {patches}. Give the model the weights' "
                "config.model.image.patch; and their grid, or set config.model.resample_init = "
                "True)"
            ) from None
        raise


def _filled(stacks: tuple[str, ...]) -> tuple[str, ...]:
    parts = ("patch_embed/", *BARE, "trunk_end/", *(f"{stack}/" for stack in stacks))
    norm = () if len(stacks) == 1 else ("norm/",)
    return tuple(f"{ROOT}/{part}" for part in parts + norm)


def _layers(shapes: Shapes, stacks: tuple[str, ...]) -> dict[str, range]:
    layers, start = {}, 0
    for stack in stacks:
        depth = stack_depth(shapes, stack)
        if depth:
            layers[stack] = range(start, start + depth)
        start += depth
    return layers


def _patch_and_grid(tensors: Tensors, style: Style) -> tuple[int, int]:
    kernel, position = tensors.get(f"{style.patch}.weight"), tensors.get(style.bare[2])
    return (0 if kernel is None else kernel.shape[-1], 0 if position is None else len(position))


def _patch_kernel(weight: np.ndarray) -> np.ndarray:
    """[D, 3, P, P] to the flattened (row, column, channel) order of our patches."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _rows(value: np.ndarray) -> np.ndarray:
    return value.reshape(-1, value.shape[-1])


def _rules(shapes: Shapes, style: Style, layers: dict[str, range], norm: str) -> list[Rule]:
    rules = [
        Rule(f"{ROOT}/patch_embed/kernel", (f"{style.patch}.weight",), _patch_kernel),
        Rule(f"{ROOT}/patch_embed/bias", (f"{style.patch}.bias",)),
        Rule(f"{ROOT}/{norm}/scale", (f"{style.norm}.weight",)),
        Rule(f"{ROOT}/{norm}/bias", (f"{style.norm}.bias",)),
    ]
    for ours, theirs in zip(BARE, style.bare, strict=True):
        if f"{ROOT}/{ours}" in shapes:
            rules.append(Rule(f"{ROOT}/{ours}", (theirs,), _rows))
    for stack, indices in layers.items():
        root = f"{ROOT}/{stack}/layers"

        def names(suffix: str, indices: range = indices) -> tuple[str, ...]:
            return tuple(style.layer.format(index) + suffix for index in indices)

        for ours, theirs in style.layer_parts().items():
            weight = f"{root}/{ours}/{'scale' if ours.endswith('norm') else 'kernel'}"
            # A norm's weight is a vector, its own transpose.
            rules.append(Rule(weight, names(f"{theirs}.weight"), transpose, True))
            rules.append(Rule(f"{root}/{ours}/bias", names(f"{theirs}.bias"), stack=True))
        for ours, theirs in zip(("attention", "mlp"), style.scales, strict=True):
            path = f"{root}/{ours}_scale/scale"
            if path in shapes:
                rules.append(Rule(path, names(theirs), stack=True))
    return rules


def _name_onnx_positions(tensors: Tensors) -> Tensors:
    """Position embeddings of an ONNX export under their name.

    Such a file holds the class token's part and the patches' as constants of the Concat and the
    Reshape that once assembled them.
    """
    if STYLES["dinov2"].bare[2] in tensors:
        return tensors
    tensors = dict(tensors)
    parts = {name.rstrip("0123456789").removesuffix("_"): name for name in tensors}
    head, tail = parts.get("embeddings.Concat"), parts.get("embeddings.Reshape")
    if head is None or tail is None:
        return tensors  # the conversion will say that they are missing
    first, rest = tensors.pop(head), tensors.pop(tail)
    width = first.shape[-1]
    both = [first.reshape(1, 1, width), rest.reshape(1, -1, width)]
    tensors[STYLES["dinov2"].bare[2]] = np.concatenate(both, axis=1)
    return tensors
