"""The visual encoder: ViT half, binding, ViT half (Sec. 3.1.1, Eq. 2), on a grid of any size.

`trunk` sees the image alone; `group` adds the group tokens, binds and finishes. In the paper the
trunk is the patch embedding. With `group_layer = n` it has the first n layers too, and can be
frozen and its output cached.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from ovseg_jax.models.binding import GroupingBlock, GroupingStage, SlotBinding
from ovseg_jax.models.layers import Dense, Floats, LayerNorm, contract, embeddings, parameter
from ovseg_jax.models.transformer import PreNormStack
from ovseg_jax.shapes import Array, Float, UInt8

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

# Keys' cubic kernel: in DINO, DINOv2 and most ViTs; in Pillow and DINOv2 with registers.
CUBIC_A = -0.75
ANTIALIAS_A = -0.5

RESIZING = {"bicubic": False, "bicubic_antialias": True}


# ---- positions of patches


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def cubic_weights(
    source: int, target: int, antialias: bool = False
) -> Float[np.ndarray, "target source"]:
    """Matrix of one-dimensional bicubic interpolation, with half-pixel centers; rows sum to one.

    `antialias` widens the kernel where the axis shrinks, and rescales rows at the border; otherwise
    border values are repeated.
    """
    center = (np.arange(target) + 0.5) * source / target - 0.5
    if antialias:
        distance = np.arange(source)[None] - center[:, None]
        weights = _cubic(distance / max(source / target, 1.0), ANTIALIAS_A)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    first = np.floor(center).astype(int)
    weights = np.zeros((target, source))
    for offset in range(-1, 3):
        value = _cubic(center - (first + offset), CUBIC_A)
        np.add.at(weights, (np.arange(target), np.clip(first + offset, 0, source - 1)), value)
    return weights.astype(np.float32)


def resize_grid(
    table: Float[Array, "L D"],
    source: tuple[int, int],
    target: tuple[int, int],
    antialias: bool = False,
) -> Float[Array, "L2 D"]:
    """Resizes a row-major table of position embeddings between grids of (rows, columns).

    The scale is the ratio of the two grids, as in transformers (the first releases of DINO and
    DINOv2 added 0.1 to the target).
    """
    if source == target:
        return table
    grid = table.reshape(*source, -1)
    down, across = (
        jnp.asarray(cubic_weights(*pair, antialias)) for pair in zip(source, target, strict=True)
    )
    rows = jnp.einsum("th,hwd->twd", down, grid)
    both = jnp.einsum("sw,twd->tsd", across, rows)
    return both.reshape(target[0] * target[1], -1)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., 2021) in the form of DINOv3 (Simeoni et al., 2025).

    Queries and keys are turned by angles that depend on where their patch lies relative to the
    sides of the image: there are no parameters, and any grid will do.

    Attributes:
      rows, columns: of the patch grid; its patches come last in the sequence, row-major.
      prefix: tokens before the patches (class token, registers), which are not turned.
      theta: wavelengths run from 1 (half a side of the image) to nearly theta.
    """

    rows: int
    columns: int
    prefix: int
    theta: float

    def angles(self, width: int) -> Float[np.ndarray, "T half"]:
        """Angles of every token, radians, for heads of `width` channels; 0 for the prefix."""
        # Patch centers run from -1 to 1 along each side. The first quarter of the channels goes by
        # the row, the second by the column, each with wavelengths growing geometrically.
        wave = self.theta ** (np.arange(width // 4) * 4 / width)
        sides = [(np.arange(n) + 0.5) / n * 2 - 1 for n in (self.rows, self.columns)]
        places = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
        turned = (2 * np.pi * places[..., None] / wave).reshape(len(places), -1)
        return np.concatenate([np.zeros((self.prefix, turned.shape[1])), turned])

    def __call__(self, x: Float[Array, "B N T d"]) -> Float[Array, "B N T d"]:
        """Turns channel pairs (i, i + d/2) of queries or keys; d must be a multiple of 4."""
        angles = self.angles(x.shape[-1])
        cosine, sine = (jnp.asarray(f(angles), jnp.float32)[None, None] for f in (np.cos, np.sin))
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


# ---- the encoder


@struct.dataclass
class VisualTokens:
    """The output of the visual encoder.

    Attributes:
      groups, patches: after the final LayerNorm; no patches if the second half sees groups alone.
      affinity, assigned: see `Binding`; after several bindings, the products of their maps.
      query, key: see `Binding`; None after several bindings.
      whole: the trunk's class token, if it keeps one.
    """

    groups: Float[Array, "B K D"]
    patches: Float[Array, "B L D"] | None
    affinity: Float[Array, "B L K"]
    assigned: Float[Array, "B L K"]
    query: Float[Array, "B K D"] | None
    key: Float[Array, "B L D"] | None
    whole: Float[Array, "B D0"] | None = None


def normalize_image(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Maps 0..255 to zero mean and unit variance, with ImageNet's statistics."""
    mean, std = (x[None, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (image.astype(jnp.float32) / 255.0 - mean) / std


class VisualEncoder(Floats):
    """ViT with learnable group tokens and one binding module.

    Attributes:
      patch: patch size, pixels.
      grid: (rows, columns) of the stored position embeddings.
      width, heads, mlp_ratio, eps: of the layers that see the groups.
      first_layers, second_layers: before the binding (the trunk's included) and after it.
      num_groups: K, the groups that binding gives.
      group_tokens: N, the learnable tokens that join the image; 0 for as many as groups.
      binding_form: "slot" (`SlotBinding`; N = K) or "grouping_block" (`GroupingBlock`).
      second_stage: what the layers after the binding see: "groups_and_patches" (Eq. 2) or "groups".
      later_stages: (group tokens, groups, layers) of grouping stages between the binding and the
        second half; only with the grouping block and a second half that sees groups alone.
      second_heads: of the second half; 0 takes `heads`.
      patch_norm: a LayerNorm follows the patch embedding.
      group_std: of the initial group tokens. At 0.02 they start nearly alike and take long to part;
        small models trained briefly want 1.
      group_layer: how many of the first layers see the image alone; 0 in the paper.
      trunk_width, trunk_heads: of the trunk; 0 takes the encoder's.
      class_token, register_tokens: what the trunk carries beside the patches, as pretrained weights
        do (Darcet et al., 2024), until the groups join.
      position: "learned" embeddings added to the patches, or "rope" (`Rotary`; group_layer > 0).
      position_resize: to another grid: "bicubic" (DINO, DINOv2) or "bicubic_antialias" (DINOv2
        with registers).
      rope_theta: see `Rotary`.
      trunk_norm: a LayerNorm ends the trunk.
      trunk_outputs: layers of the trunk (1 is the first) whose normed outputs are concatenated as
        its features (Oquab et al., 2023, Sec. 7.4); () for the last layer alone.
      keep_class_token: the class token stays in the trunk's output, before the patches.
      layer_scale: of the trunk, see `PreNormLayer`. assignment: see `Assignment`.
      drop_path: stochastic-depth rate of the last layer, rising linearly from 0 at the first.
      remat: see `transformer.scanned`.
    """

    patch: int
    grid: tuple[int, int]
    width: int
    heads: int
    first_layers: int
    second_layers: int
    num_groups: int
    group_tokens: int = 0
    binding_form: str = "slot"
    second_stage: str = "groups_and_patches"
    later_stages: tuple[tuple[int, int, int], ...] = ()
    second_heads: int = 0
    patch_norm: bool = False
    group_std: float = 0.02
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    group_layer: int = 0
    trunk_width: int = 0
    trunk_heads: int = 0
    class_token: bool = False
    register_tokens: int = 0
    position: str = "learned"
    position_resize: str = "bicubic"
    rope_theta: float = 100.0
    trunk_norm: bool = False
    trunk_outputs: tuple[int, ...] = ()
    keep_class_token: bool = False
    layer_scale: float | None = None
    assignment: str = "hard"
    drop_path: float = 0.0
    remat: str = "none"

    def setup(self) -> None:
        trunk_width = self.trunk_width or self.width
        later_layers = sum(layers for _, _, layers in self.later_stages)
        total = self.first_layers + later_layers + self.second_layers
        rates = tuple(np.linspace(0.0, self.drop_path, total).tolist())
        sizes = {"mlp_ratio": self.mlp_ratio, "eps": self.eps, **self.floats}

        def stack(start: int, stop: int, heads: int, **options: Any) -> PreNormStack:
            options |= {"drop_rates": rates[start:stop], "remat": self.remat, **sizes}
            return PreNormStack(stop - start, heads, **options)

        def grouping_block(groups: int) -> GroupingBlock:
            options = {"num_groups": groups, "heads": self.heads, **sizes}
            return GroupingBlock(self.assignment, **options)

        self.patch_embed = Dense(trunk_width, (None, "embed"), **self.floats)
        if self.patch_norm:
            self.embed_norm = LayerNorm(self.eps, self.dtype)
        if self.position == "learned":
            rows = self.grid[0] * self.grid[1]
            self.position_table = embeddings(self, "position", rows, trunk_width)
        prefix = {"class_token": int(self.class_token), "register_tokens": self.register_tokens}
        self.prefix = [
            embeddings(self, name, rows, trunk_width) for name, rows in prefix.items() if rows
        ]
        start, heads = self.group_layer, self.trunk_heads or self.heads
        scale = self.layer_scale
        self.trunk_layers = stack(0, start, heads, layer_scale=scale, outputs=self.trunk_outputs)
        if self.trunk_norm:
            self.trunk_end = LayerNorm(self.eps, self.dtype)
        if self.feature_width != self.width:
            self.neck = Dense(self.width, (None, "embed"), **self.floats)
        drawn = nn.initializers.truncated_normal(self.group_std)
        shape = (self.group_tokens or self.num_groups, self.width)
        self.group_token = parameter(self, "group_token", drawn, shape, None, "embed")
        self.first = stack(start, self.first_layers, self.heads)
        if self.binding_form == "grouping_block":
            self.binding = grouping_block(self.num_groups)
        else:
            self.binding = SlotBinding(self.assignment, self.eps, **self.floats)
        stages, start = [], self.first_layers
        for count, groups, layers in self.later_stages:
            parts = stack(start, start + layers, self.heads), grouping_block(groups)
            stages.append(GroupingStage(count, *parts, self.eps, **self.floats))
            start += layers
        self.stages = tuple(stages)
        self.second = stack(start, total, self.second_heads or self.heads)
        self.norm = LayerNorm(self.eps, self.dtype)

    @property
    def feature_width(self) -> int:
        """D0, the channels of the trunk's output."""
        return (self.trunk_width or self.width) * max(1, len(self.trunk_outputs))

    def feature_tokens(self, size: int) -> int:
        """Tokens of the trunk's output for images of size x size pixels."""
        return (size // self.patch) ** 2 + self.keep_class_token

    def trunk(self, image: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B L D0"]:
        """Features of L patches, after the class token's with `keep_class_token`.

        Of normalized pixels; what is beyond a multiple of the patch is cut off.
        """
        batch, height, width, _ = image.shape
        rows, columns, p = height // self.patch, width // self.patch, self.patch
        pixels = image[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, 3)
        pixels = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, p * p * 3)
        x, rotary = self.patch_embed(pixels), None
        if self.patch_norm:
            x = self.embed_norm(x)
        prefix = sum(len(tokens) for tokens in self.prefix)
        if self.position == "rope":
            rotary = Rotary(rows, columns, prefix, self.rope_theta)
        else:
            antialias = RESIZING[self.position_resize]
            position = resize_grid(self.position_table, self.grid, (rows, columns), antialias)
            x = x + position[None].astype(self.dtype)
        if prefix:
            tokens = jnp.concatenate(self.prefix).astype(self.dtype)
            tokens = jnp.broadcast_to(tokens[None], (batch, *tokens.shape))
            x = jnp.concatenate([tokens, x], axis=1)
        x = self.trunk_layers(x, train, rotary)
        if self.trunk_norm:
            x = self.trunk_end(x)
        if self.trunk_outputs:
            x = jnp.concatenate(list(x), axis=-1)
        if self.keep_class_token:
            return jnp.concatenate([x[:, :1], x[:, prefix:]], axis=1)
        return x[:, prefix:]

    def group(
        self,
        features: Float[Array, "B L D0"],
        train: bool,
        noise: Float[Array, "B L K"] | None = None,
    ) -> VisualTokens:
        """Groups join the trunk's output: the rest of the first half, binding, second half.

        `noise`: see `Assignment.bind`.
        """
        x, whole = features.astype(self.dtype), None
        if self.keep_class_token:
            whole, x = x[:, 0], x[:, 1:]
        if x.shape[-1] != self.width:
            x = self.neck(x)
        count = x.shape[1]
        tokens = jnp.broadcast_to(self.group_token[None], (x.shape[0], *self.group_token.shape))
        tokens = tokens.astype(self.dtype)
        x = self.first(jnp.concatenate([x, tokens], axis=1), train)
        tokens = x[:, count:]
        bound = self.binding(tokens, x[:, :count], train, noise)
        maps = (bound.affinity, bound.assigned, bound.query, bound.key, whole)
        for stage in self.stages:
            bound, tokens = stage(bound.groups, tokens, train)
            affinity, assigned = (
                contract("bls,bsk->blk", before, after, jnp.float32)
                for before, after in zip(maps, (bound.affinity, bound.assigned), strict=False)
            )
            maps = (affinity, assigned, None, None, whole)
        if self.second_stage == "groups":
            return VisualTokens(self.norm(self.second(bound.groups, train)), None, *maps)
        x = jnp.concatenate([x[:, :count], bound.groups], axis=1)
        x = self.norm(self.second(x, train))
        return VisualTokens(x[:, count:], x[:, :count], *maps)

    def __call__(self, image: Float[Array, "B H W 3"], train: bool = False) -> VisualTokens:
        """Eq. 2: groups and patches, from normalized pixels."""
        return self.group(self.trunk(image, train), train)
