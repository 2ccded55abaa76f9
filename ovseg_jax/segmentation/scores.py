"""From images of any size to class scores: a model as a segmenter, and batches of windows.

Windows of many images fill one batch, so the encoder is compiled once and always works on full
batches. The results are small, one cosine for each patch and class, and stay on the host until an
image has all its windows.
"""

import functools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Integer

from ovseg_jax import sharding
from ovseg_jax.data.tokenizer import Tokenizer, unmasked
from ovseg_jax.errors import UserError
from ovseg_jax.files import listed
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.segmentation import readout
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.shapes import Array, Float, UInt8

# Pixels in a batch of windows on a CPU. On two cores, batches of four windows of 448 pixels took a
# third longer for each window than single ones (tests/bench/segment_cost.py).
CPU_PIXELS, ACCELERATOR_WINDOWS = 448**2, 32
TEXT_BATCH = 64  # prompts encoded at once
REMEMBERED = 16  # lists of words whose embeddings are kept


@runtime_checkable
class Segmenter(Interface):
    """What a model offers to zero-shot segmentation; see `ModelSegmenter`."""

    def encode(self, images: UInt8[np.ndarray, "B H W 3"]) -> tuple[Any, ...]: ...

    def text(self, names: Sequence[str], templates: Sequence[str]) -> Any: ...


def with_scale(protocol: Protocol, segmenter: Any) -> Protocol:
    """The protocol, with the scale that the model learned if it has none."""
    return protocol if protocol.scale is not None else protocol.replace(scale=segmenter.scale())


def default_batch(window: int) -> int:
    """How many windows of this side (pixels) to encode at once on the devices there are."""
    on_cpu = jax.default_backend() == "cpu"
    return max(1, CPU_PIXELS // window**2) if on_cpu else ACCELERATOR_WINDOWS


# ---- a model as a segmenter


def encode_images(
    model: OVSegmentor, variables: Mapping[str, Any], images: Array, protocol: Protocol
) -> tuple[Array, ...]:
    """(affinity [B, L, K], groups [B, K, E], image embedding [B, E]), to be jitted; with the
    protocol's `border_scale` also the binding's keys of the patches [B, L, D], unit norm, float16.

    Images are uint8 [B, H, W, 3], or [B, L, D0] trunk features.
    """
    tokens = model.apply(variables, images, method="visual_tokens")
    soft = tokens.affinity
    if protocol.affinity == "features":
        if tokens.patches is None:
            text = "protocol: affinity must be 'binding' for a model without final patches"
            raise UserError(text)
        patches, centers = (x.astype(jnp.float32) for x in (tokens.patches, tokens.groups))
        logits = jnp.einsum("bld,bkd->blk", patches, centers, precision=readout.EXACT)
        soft = jax.nn.softmax(logits * patches.shape[-1] ** -0.5, axis=-1)
    groups = model.apply(variables, tokens.groups, method="project_image")
    encoded = soft, groups, model.apply(variables, tokens, method="embed_whole")
    if not protocol.border_scale:
        return encoded
    if tokens.key is None:
        raise UserError("protocol: border_scale must be 0 for a model with several bindings")
    return *encoded, readout.unit(tokens.key).astype(jnp.float16)


def embed_prompts(
    model: OVSegmentor, variables: Mapping[str, Any], ids: Array, average: str
) -> tuple[Array, ...]:
    """Embeddings [B, E] of prompts (int32 [B, M]) to compare groups with, and with an image head
    also those for whole images; to be averaged over templates, to be jitted."""
    text = model.apply(variables, ids, method="text_tokens")
    method = "project_text" if average == "unit" else "embed_text"
    embedded = model.apply(variables, text.pooled, method=method)
    if not model.image_head:
        return (embedded,)
    return embedded, model.apply(variables, text.pooled, method="embed_whole_text")


class ModelSegmenter:
    """A `Segmenter` of a model and its parameters, wherever they lie. Batches are split over the
    mesh. The protocol's `affinity`, `average` and `border_scale` decide what is computed."""

    def __init__(
        self,
        model: OVSegmentor,
        params: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        *,
        text_length: int,
        protocol: Protocol,
        batch_stats: Mapping[str, Any],
        mesh: Mesh,
    ):
        self.variables = {"params": params, "batch_stats": batch_stats}
        self._model, self._window, self._mesh = model, protocol.window, mesh
        self._tokenizer, self._length = tokenizer, text_length
        self._texts = functools.lru_cache(REMEMBERED)(self._averaged)
        everywhere = sharding.replicated(mesh)
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self.variables)):
            # Once: arrays of the host would travel to the devices in every call.
            self.variables = jax.device_put(self.variables, everywhere)
        encode = functools.partial(encode_images, model, protocol=protocol)
        embed = functools.partial(embed_prompts, model, average=protocol.average)
        self._encode = jax.jit(encode, out_shardings=everywhere)
        self._embed = jax.jit(embed, out_shardings=everywhere)

    @classmethod
    def of_saved(cls, saved: Any, protocol: Protocol) -> "ModelSegmenter":
        """Of a `weights.model_dir.SavedModel`, on the devices of this process."""
        return cls(
            saved.model,
            saved.params,
            saved.tokenizer,
            text_length=saved.info["text_length"],
            protocol=protocol,
            batch_stats=saved.batch_stats,
            mesh=sharding.make_mesh(devices=jax.local_devices()),
        )

    def whole_batch(self, batch_size: int) -> int:
        """`batch_size` windows, or with 0 a number that suits the devices, rounded up to a number
        that the devices share evenly."""
        shards = sharding.batch_shards(self._mesh)
        return -(-(batch_size or default_batch(self._window)) // shards) * shards

    def encode(
        self, images: UInt8[np.ndarray, "B H W 3"] | Float[np.ndarray, "B L D"]
    ) -> tuple[Array, ...]:
        """`encode_images` of a batch."""
        if len(images) % sharding.batch_shards(self._mesh) == 0:
            # Every process holds the whole batch here and gives its own devices their rows.
            images = jax.device_put(images, sharding.batch_sharding(self._mesh))
        return self._encode(self.variables, images)

    def text(
        self, names: Sequence[str], templates: Sequence[str]
    ) -> tuple[Float[np.ndarray, "C E"], Float[np.ndarray, "C E"]]:
        """Class embeddings to compare groups with, and whole images: unit norm, averaged over the
        templates. Without an image head both are the same."""
        return self._texts(tuple(names), tuple(templates))

    def _averaged(self, names: tuple[str, ...], templates: tuple[str, ...]) -> tuple:
        names = [unmasked(name) for name in names]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        ids, cut = self._tokenizer.encode_with_cuts(prompts, self._length)
        self._log_indistinct(names, cut.reshape(len(names), -1).any(1))
        # The columns that the longest prompt needs, a multiple of 4 so that few shapes compile. At
        # least one column of padding stays, because CLIP's tokenizer pads with the end token.
        longest = int((ids != self._model.pad_id).any(axis=0).nonzero()[0].max(initial=0)) + 1
        rows, most = [], 4 * (longest // 4 + 1)
        for start in range(0, len(ids), TEXT_BATCH):
            part = ids[start : start + TEXT_BATCH, :most]
            padded = np.pad(part, ((0, TEXT_BATCH - len(part)), (0, 0)))
            rows.append([np.asarray(x)[: len(part)] for x in self._embed(self.variables, padded)])
        units = []
        for embedded in zip(*rows, strict=True):
            mean = np.concatenate(embedded).reshape(len(names), len(templates), -1).mean(1)
            # In NumPy: JAX would compile each operation by itself.
            norm = np.linalg.norm(mean.astype(np.float32), axis=1, keepdims=True)
            units.append(mean / np.maximum(norm, np.float32(1e-12)))
        return units[0], units[-1]

    def _log_indistinct(self, names: Sequence[str], cut: np.ndarray) -> None:
        """Logs the names that the text encoder does not know, reads alike, or reads in part."""
        tokenizer = self._tokenizer
        ids = tokenizer.encode(names, self._length)
        unknown = np.zeros(len(names), bool)
        if tokenizer.family.unknown != tokenizer.family.end:
            unknown = (ids == tokenizer.unknown_id).any(1)
        alike: dict[bytes, list[str]] = {}
        for name, row in zip(names, ids, strict=True):
            alike.setdefault(row.tobytes(), []).append(name)
        equal = [" = ".join(same) for same in alike.values() if len(same) > 1]
        for what, which in (
            ("are unknown to the text encoder, so it guesses", np.array(names)[unknown].tolist()),
            ("are the same to the text encoder, so only the first is ever found", equal),
            (f"are cut after {self._length} tokens", np.array(names)[cut].tolist()),
        ):
            if which:
                logging.getLogger(__name__).warning("names that %s: %s", what, listed(which))

    def scale(self) -> float:
        """The inverse temperature that the model learned, for a protocol whose scale is None."""
        return float(self._model.apply(self.variables, method="logit_scale"))


# ---- scores of whole images


@dataclass(frozen=True)
class ImageScores:
    """Cosines of all windows of one image, and the way from their cells to its pixels."""

    index: int  # position of the image in what was given
    # Of the patches of all windows, side by side as the windows lie: the cosines with the classes,
    # or with the grouping 'one_group' the affinity to the groups; and the best group.
    cells: Float[np.ndarray, "h w scores"]
    groups: Integer[np.ndarray, "h w"]
    # Of each window, row by row: the unit image embedding; cosines of its groups and of the
    # embedding with the classes.
    embeddings: Float[np.ndarray, "windows E"]
    group_cosines: Float[np.ndarray, "windows K C"]
    image_cosines: Float[np.ndarray, "windows C"]
    # (height, width) of the original image, and of the image that was segmented.
    size: tuple[int, int]
    resized: tuple[int, int]
    tiles: tuple[int, int]  # number of windows along the height and the width
    window: int  # pixels, as the stride
    stride: int
    # See `readout.foreground_log`, for each word; zeros [1, 1, 1] for none.
    foreground: Float[np.ndarray, "..."]
    image: UInt8[np.ndarray, "H W 3"] | None = None  # where the protocol refines by its colors
    truth: UInt8[np.ndarray, "height width"] | None = None  # labels, where they are known

    def weights(self, size: tuple[int, int] | None = None, nearest: bool = False) -> list:
        """`readout.cell_weights` of both axes, to so many pixels, by default the original ones."""
        sides = zip(size or self.size, self.resized, self.cells.shape, self.tiles, strict=False)
        windows = self.window, self.stride
        return [
            readout.cell_weights(pixels, resized, *windows, cells // tiles, nearest=nearest)
            for pixels, resized, cells, tiles in sides
        ]

    def evidence(self) -> tuple[Float[np.ndarray, "1 1 C"], Float[np.ndarray, "..."]]:
        """(margins, foreground) for `readout.downweight_by_image_score`, of the whole image, whose
        embedding is the mean over its windows: margins window by window let labels jump where
        windows meet."""
        # The cosine with a mean of embeddings is the mean of the cosines, over the mean's norm.
        norm = float(np.linalg.norm(self.embeddings.mean(0)))
        cosines = self.image_cosines.mean(0) / max(norm, 1e-12)
        return (cosines - cosines.max()).astype(np.float32)[None, None], self.foreground

    @property
    def shapes(self) -> tuple:
        """Equal for images whose arrays can be stacked."""
        return self.size, self.resized, self.cells.shape

    def windows_of(self, maps: np.ndarray) -> np.ndarray:
        """Maps [h, w, ...] of all windows side by side, window by window."""
        (down, across), (h, w) = self.tiles, maps.shape[:2]
        parts = maps.reshape(down, h // down, across, w // across, *maps.shape[2:])
        return parts.swapaxes(1, 2).reshape(-1, h // down, w // across, *maps.shape[2:])

    def group_map(self) -> Integer[np.ndarray, "H W"]:
        """The group of each pixel in the first window that covers it; those of window n of K groups
        count from n K."""
        (down, across), count = self.tiles, self.group_cosines.shape[1]
        first = np.arange(down * across, dtype=np.int32).reshape(self.tiles) * count
        sides = (self.groups.shape[0] // down, self.groups.shape[1] // across)
        numbers = self.groups + first.repeat(sides[0], 0).repeat(sides[1], 1)
        rows, columns = (matrix.argmax(1) for matrix in self.weights(nearest=True))
        return numbers[rows][:, columns]


def image_scores(
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    images: Iterable[np.ndarray],
    protocol: Protocol,
    batch_size: int,
) -> Iterator[ImageScores]:
    """Scores of a vocabulary's words for each image (uint8 [H,W,3] of any size, read when needed),
    as soon as its last window is done, so not always in order. Every batch is filled to
    `batch_size` windows."""
    text = segmenter.text(vocabulary.words, protocol.templates)
    waiting: dict[tuple[int, ...], list[tuple]] = {}  # (pixels, number, image), by shape
    running: deque = deque()  # batches on the device while the host prepares the next

    def start(batch: list[tuple]) -> None:
        pixels = np.stack([window for window, _, _ in batch])
        pixels = np.pad(pixels, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        affinity, groups, embedding, *keys = segmenter.encode(pixels)
        grid = readout.grid_shape(*pixels.shape[1:3], affinity.shape[1], protocol.grid)
        results = _window_scores(affinity, groups, embedding, *text, grid, protocol.grouping)
        if protocol.border_scale:
            results += tuple(x.reshape(batch_size, *grid, -1) for x in keys)
        running.append((batch, results))

    def finish() -> Iterator[ImageScores]:
        batch, results = running.popleft()
        results = [np.asarray(result) for result in results]
        for row, (_, number, image) in enumerate(batch):
            image.parts[number] = tuple(result[row] for result in results)
            if len(image.parts) == len(image.corners):
                yield image.scores(vocabulary.things)

    for index, pixels in enumerate(images):
        image = _Image(index, pixels, protocol)
        for number, (top, left) in enumerate(image.corners):
            window = image.pixels[top : top + protocol.window, left : left + protocol.window]
            same = waiting.setdefault(window.shape, [])
            same.append((window, number, image))
            if len(same) == batch_size:
                start(waiting.pop(window.shape))
        while len(running) > 1:
            yield from finish()
    for batch in waiting.values():
        start(batch)
    while running:
        yield from finish()


class _Image:
    """An image, some of whose windows are not encoded yet."""

    def __init__(self, index: int, pixels: np.ndarray, protocol: Protocol):
        self.index, self.size, self.protocol = index, pixels.shape[:2], protocol
        resized = readout.resized_shape(*self.size, protocol.short_side, protocol.long_limit)
        self.pixels = readout.resize_image(pixels, *resized, protocol.resize)
        self.corners = readout.window_grid(*resized, protocol.window, protocol.stride)
        self.parts: dict[int, tuple[np.ndarray, ...]] = {}

    def scores(self, things: Sequence[bool]) -> ImageScores:
        protocol = self.protocol
        cells, groups, *rest = zip(*(self.parts[i] for i in sorted(self.parts)), strict=True)
        embeddings, group_cosines, image_cosines = (np.stack(part) for part in rest[:3])
        tiles = tuple(len(set(starts)) for starts in zip(*self.corners, strict=True))
        foreground = np.zeros((1, 1, 1), np.float32)
        if protocol.border_scale:
            keys = _side_by_side(rest[3], tiles)
            foreground = np.asarray(_foreground(keys, protocol.border_scale))[..., None]
            # Only things are lowered, not words for surroundings.
            foreground = foreground * np.array(things, np.float32)
        return ImageScores(
            index=self.index,
            cells=_side_by_side(cells, tiles),
            groups=_side_by_side(groups, tiles),
            embeddings=embeddings,
            group_cosines=group_cosines,
            image_cosines=image_cosines,
            size=self.size,
            resized=self.pixels.shape[:2],
            tiles=tiles,
            window=protocol.window,
            stride=protocol.stride,
            foreground=foreground,
            image=self.pixels if protocol.pamr_steps else None,
        )


def _side_by_side(parts: tuple[np.ndarray, ...], tiles: tuple[int, int]) -> np.ndarray:
    """Equal blocks, given row by row, as one array."""
    down, across = tiles
    bands = [np.concatenate(parts[i * across : (i + 1) * across], 1) for i in range(down)]
    return np.concatenate(bands, 0)


_foreground = jax.jit(readout.foreground_log, static_argnames="scale")


@jax.jit(static_argnames=("grid", "grouping"))
def _window_scores(affinity, groups, embedding, text, image_text, grid, grouping):
    affinity, embedding = jnp.asarray(affinity), readout.unit(embedding)
    nearest = jnp.argmax(affinity, -1).reshape(-1, *grid).astype(jnp.int32)
    if grouping == "one_group":
        cells = affinity.astype(jnp.float32).reshape(-1, *grid, affinity.shape[-1])
    else:
        cells = readout.class_scores(affinity, groups, text, grid)
    whole = readout.cosines(embedding[:, None], image_text)[:, 0]
    return cells, nearest, embedding, readout.cosines(groups, text), whole
