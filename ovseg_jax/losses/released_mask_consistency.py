"""Mask consistency on the maps of the binding itself: queries of one image, keys of another.

The form of Eq. 10-12 that the released model was trained with. The teacher's group queries of an
image draw the target on the teacher's keys of the same image; the online queries of the *partner*
draw the prediction on those keys. Compared with `mask_consistency`, all groups are matched and
scored, but those least like the shared entity pass no gradient; maps are enlarged to pixels; the
matching looks at raw maps; the threshold is relative to each map's maximum; predictions are
stretched to [0, 1] instead of squashed.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.losses.mask_consistency import EXACT, mask_logits
from ovseg_jax.losses.matching import match
from ovseg_jax.shapes import Array, Bool, Float
from ovseg_jax.sharding import AnyMesh

COSTS = ("euclidean", "cosine")


def corner_weights(pixels: int, cells: int) -> Float[np.ndarray, "pixels cells"]:
    """Matrix of one-dimensional linear interpolation; first and last samples coincide.

    (Elsewhere half-pixel centers are used.)
    """
    position = np.arange(pixels) * ((cells - 1) / max(pixels - 1, 1))
    low = np.minimum(np.floor(position).astype(int), cells - 1)
    high = np.minimum(low + 1, cells - 1)
    weights = np.zeros((pixels, cells))
    np.add.at(weights, (np.arange(pixels), low), 1 - (position - low))
    np.add.at(weights, (np.arange(pixels), high), position - low)
    return weights.astype(np.float32)


def enlarge(
    maps: Float[Array, "B K L"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[Array, "B K pixels"]:
    """Maps on a row-major grid of cells, interpolated to size[0] * size[1] pixels."""
    rows, columns = (jnp.asarray(corner_weights(n, m)) for n, m in zip(size, grid, strict=True))
    cells = maps.reshape(*maps.shape[:2], *grid)
    wide = jnp.einsum("bkhw,xw->bkhx", cells, columns, precision=EXACT)
    tall = jnp.einsum("bkhx,yh->bkyx", wide, rows, precision=EXACT)
    return tall.reshape(*maps.shape[:2], -1)


def pair_costs(
    prediction: Float[Array, "B K L"],
    target: Float[Array, "B K L"],
    grid: tuple[int, int],
    size: tuple[int, int],
    cost: str,
) -> Float[Array, "B K K"]:
    """Cost of giving target j to prediction i, at [b, i, j], between the enlarged maps.

    "euclidean" is the distance of the maps at unit norm, "cosine" minus their cosine (each norm
    plus 1e-6). Inner products of enlarged maps are quadratic forms of the small ones, so nothing of
    the size of the pixels is made.
    """

    def gram(pixels: int, cells: int) -> Array:
        weights = corner_weights(pixels, cells).astype(np.float64)
        return jnp.asarray((weights.T @ weights).astype(np.float32))

    down, across = (gram(n, m) for n, m in zip(size, grid, strict=True))

    def inner(a: Array, b: Array) -> Array:
        """<enlarged a, enlarged b> over the trailing grid axes."""
        b = jnp.einsum("...hw,wx->...hx", b, across, precision=EXACT)
        b = jnp.einsum("hy,...yx->...hx", down, b, precision=EXACT)
        return jnp.sum(a * b, axis=(-2, -1))

    def unit(maps: Array) -> Array:
        maps = maps.reshape(*maps.shape[:2], *grid)
        norm = jnp.sqrt(jnp.maximum(inner(maps, maps), 0.0))
        return maps / jnp.maximum(norm, 1e-12)[..., None, None]

    a, b = unit(prediction)[:, :, None], unit(target)[:, None, :]
    if cost == "cosine":
        a, b = jnp.broadcast_arrays(a, b)
        return -inner(a, b) / (1.0 + 1e-6) ** 2
    # Not sqrt(2 - 2 cos), which loses half the digits where the maps are alike.
    difference = a - b
    return jnp.sqrt(jnp.maximum(inner(difference, difference), 0.0))


def lowest(scores: Float[Array, "B K"], count: int) -> Bool[Array, "B K"]:
    """True at the `count` groups with the lowest scores."""
    # Not `top_k`, for which the partitioner gathers all rows on every device.
    chosen = jnp.argsort(jax.lax.stop_gradient(scores), axis=-1)[:, :count]
    return jnp.any(chosen[..., None] == jnp.arange(scores.shape[1])[None, None], axis=1)


def relative_binary(
    maps: Float[Array, "B K pixels"], threshold: float
) -> Float[Array, "B K pixels"]:
    """1 where a map's sigmoid reaches `threshold` times its own maximum, else 0."""
    soft = jax.nn.sigmoid(maps)
    return (soft >= threshold * jnp.max(soft, axis=-1, keepdims=True)).astype(jnp.float32)


def stretched(maps: Float[Array, "B K pixels"]) -> Float[Array, "B K pixels"]:
    """Each map with its minimum moved to 0 and its maximum to 1; a constant map gives 0."""
    low, high = (f(maps, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    span = high - low
    return jnp.where(span > 0, (maps - low) / jnp.where(span > 0, span, 1.0), 0.0)


def group_mask_loss(
    queries: Float[Array, "B K D"],
    teacher_queries: Float[Array, "B K D"],
    teacher_keys: Float[Array, "B L D"],
    scores: Float[Array, "B K"],
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    detached_ratio: float,
    threshold: float,
    cost: str = "euclidean",
    backend: str = "host",
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "B"], dict[str, Array]]:
    """One value per pair of images, in one direction. Only `queries` receives a gradient.

    For both directions, call it on the rows of both (images exchanged), so that the matching is
    called once, and take the mean. How the released training sums: `objective.divided_sum`.

    Args:
      queries: the binding's group queries of the first image, by the online model.
      teacher_queries, teacher_keys: of the second image's groups and patches, by the teacher.
      scores: how much each group of the first image resembles the shared entity.
      grid: (rows, columns) of the second image's patches.
      size: (height, width) in pixels that maps are compared at.
      detached_ratio: the int(K * ratio) groups with the lowest scores pass no gradient.
      threshold: share of a target map's maximum that counts as inside.
      cost: see `pair_costs`. backend, mesh: see `matching.match`.

    Returns:
      The losses; and "target_fraction" [B], the share of pixels that targets cover.
    """
    keys = jax.lax.stop_gradient(teacher_keys)
    target = jax.lax.stop_gradient(mask_logits(keys, teacher_queries))
    prediction = mask_logits(keys, queries)
    detached = lowest(scores, int(scores.shape[1] * detached_ratio))
    prediction = jnp.where(detached[..., None], jax.lax.stop_gradient(prediction), prediction)
    costs = pair_costs(jax.lax.stop_gradient(prediction), target, grid, size, cost)
    permutation = match(costs, backend, mesh)
    target = jnp.take_along_axis(target, permutation[..., None], axis=1)
    binary = relative_binary(enlarge(target, grid, size), threshold)
    soft = stretched(enlarge(prediction, grid, size))
    # The dice loss of all maps of an example as one set.
    overlap = jnp.sum(binary * soft, axis=(1, 2))
    area = jnp.sum(binary, axis=(1, 2)) + jnp.sum(soft, axis=(1, 2))
    losses = 1.0 - (2.0 * overlap + 1.0) / (area + 1.0)
    return losses, {"target_fraction": jnp.mean(binary, axis=(1, 2))}
