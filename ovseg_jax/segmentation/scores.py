"""Class scores of images of any size, from batches of windows of one size.

Windows of many images fill one batch, so the encoder is compiled once and always works on full
batches; the last is padded. The results are small, one cosine for each patch and class, and stay on
the host until an image has all its windows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from ovseg_jax.segmentation import protocol as protocol_lib
from ovseg_jax.segmentation import readout, windows
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.shapes import Float, UInt8

# Pixels in a batch of windows on a CPU. On two cores, batches of four windows of 448 pixels took a
# third longer for each window than single ones (tests/bench/segment_speed.py).
CPU_PIXELS, ACCELERATOR_WINDOWS = 448**2, 32


@runtime_checkable
class Segmenter(Protocol):
    """What a model offers to zero-shot segmentation."""

    def encode(self, images: UInt8[np.ndarray, "B H W 3"]) -> tuple[Any, ...]:
        """(affinity [B,L,K], groups [B,K,E], image embedding [B,E]) of a batch, jitted, and keys
        of the patches [B,L,D] where the protocol has a `border_scale`."""

    def text(self, names: list[str], templates: tuple[str, ...]) -> Any:
        """Two times [C,E]: embeddings of class words, averaged over the templates, unit norm; to
        compare groups with, and whole images."""


def with_scale(protocol: protocol_lib.Protocol, segmenter: Any) -> protocol_lib.Protocol:
    """The protocol, with the scale that the model learned if it has none."""
    return protocol if protocol.scale is not None else protocol.replace(scale=segmenter.scale())


def default_batch(window: int) -> int:
    """How many windows of this side (pixels) to encode at once on the devices there are."""
    if jax.default_backend() == "cpu":
        return max(1, CPU_PIXELS // window**2)
    return ACCELERATOR_WINDOWS


@dataclass(frozen=True)
class ImageScores:
    """Cosines of all windows of one image, and the way from their cells to its pixels.

    Attributes:
      index: position of the image in what was given.
      cells: the windows' patches, side by side in the order of the windows in the image. With the
        protocol's grouping 'soft_patches' their cosines with the classes, otherwise their affinity
        to the groups.
      groups: the group with the highest affinity for each patch, in the same arrangement.
      embeddings: unit image embedding of each window, row by row.
      group_cosines, image_cosines: of the groups and of the embedding of each window with the
        classes.
      size, resized: (height, width) of the original image, and of the image that was segmented.
      tiles: number of windows along the height and the width.
      window, stride: of the windows, pixels.
      image: at the protocol's size, where it refines by colors.
      foreground: log-probability that a cell shows no surroundings, for each word; None where the
        protocol has no `border_scale`.
    """

    index: int
    cells: Float[np.ndarray, "h w scores"]
    groups: Integer[np.ndarray, "h w"]
    embeddings: Float[np.ndarray, "windows E"]
    group_cosines: Float[np.ndarray, "windows K C"]
    image_cosines: Float[np.ndarray, "windows C"]
    size: tuple[int, int]
    resized: tuple[int, int]
    tiles: tuple[int, int]
    window: int
    stride: int
    image: UInt8[np.ndarray, "H W 3"] | None = None
    foreground: Float[np.ndarray, "h w C"] | None = None

    def weights(
        self, size: tuple[int, int] | None = None, *, nearest: bool = False
    ) -> tuple[Float[np.ndarray, "H h"], Float[np.ndarray, "W w"]]:
        """Matrices from cells to pixels for the two axes; see `windows.cell_weights`.

        Args:
          size: (height, width) of the pixels, by default those of the original image.
        """
        size = size or self.size
        rows, columns = (
            windows.cell_weights(
                size[axis],
                self.resized[axis],
                self.window,
                self.stride,
                self.cells.shape[axis] // self.tiles[axis],
                nearest=nearest,
            )
            for axis in (0, 1)
        )
        return rows, columns

    def image_margins(self) -> Float[np.ndarray, "1 1 C"]:
        """How far each class falls short of the image's best class (cosines, at most 0).

        The cosines are those of the whole image, whose embedding is the mean of the embeddings of
        all its windows. With margins window by window, labels jump where windows meet.
        """
        # The cosine with a mean of embeddings is the mean of the cosines, over the mean's norm.
        norm = float(np.linalg.norm(self.embeddings.mean(0)))
        cosines = self.image_cosines.mean(0) / max(norm, 1e-12)
        return (cosines - cosines.max()).astype(np.float32)[None, None]

    def foreground_or_zero(self) -> Float[np.ndarray, "h w C"]:
        """`foreground`, or zeros [1, 1, 1]: without it nothing is lowered."""
        return np.zeros((1, 1, 1), np.float32) if self.foreground is None else self.foreground

    @property
    def shapes(self) -> tuple:
        """Equal for images whose arrays can be stacked."""
        return self.size, self.resized, self.cells.shape

    def by_window(self) -> Float[np.ndarray, "windows h w scores"]:
        """`cells`, window by window."""
        return self.windows_of(self.cells)

    def windows_of(self, maps: np.ndarray) -> np.ndarray:
        """Maps [h, w, ...] of all windows side by side, window by window."""
        (down, across), (h, w) = self.tiles, maps.shape[:2]
        parts = maps.reshape(down, h // down, across, w // across, *maps.shape[2:])
        return parts.swapaxes(1, 2).reshape(-1, h // down, w // across, *maps.shape[2:])

    def group_map(self) -> Integer[np.ndarray, "H W"]:
        """The group of each pixel in the first window that covers it.

        Windows are grouped one by one: with K groups, those of window n count from n K.
        """
        (down, across), count = self.tiles, self.group_cosines.shape[1]
        first = np.arange(down * across, dtype=np.int32).reshape(self.tiles) * count
        sides = (self.groups.shape[0] // down, self.groups.shape[1] // across)
        numbers = self.groups + first.repeat(sides[0], 0).repeat(sides[1], 1)
        rows, columns = (matrix.argmax(1) for matrix in self.weights(nearest=True))
        return numbers[rows][:, columns]


def score_images(
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    images: Iterable[np.ndarray],
    protocol: protocol_lib.Protocol,
    batch_size: int,
) -> Iterator[ImageScores]:
    """Scores of the words of a vocabulary for each image; see `image_scores`."""
    text = segmenter.text(list(vocabulary.words), protocol.templates)
    things = vocabulary.things
    return image_scores(segmenter.encode, text, images, protocol, batch_size, things)


def image_scores(
    encode: Callable[[np.ndarray], tuple[Any, ...]],
    text: Any,
    images: Iterable[np.ndarray],
    protocol: protocol_lib.Protocol,
    batch_size: int = 32,
    things: Sequence[bool] | None = None,
) -> Iterator[ImageScores]:
    """Scores of each image, as soon as its last window is done (so not always in order).

    Args:
      encode: see `Segmenter.encode`.
      text: class embeddings, two times [C,E], see `Segmenter.text`.
      images: uint8 [H,W,3] of any sizes, read when they are needed.
      batch_size: windows in a batch; every batch is filled to it.
      things: for each word whether it names a thing, not surroundings; by default all do. The
        protocol's `border_scale` lowers only the probabilities of things.
    """
    waiting: dict[tuple[int, ...], list[_Window]] = {}  # windows to encode, by shape
    running: deque = deque()  # batches on the device while the host prepares the next

    def start(batch: list[_Window]) -> None:
        pixels = np.stack([window.pixels for window in batch])
        pixels = np.pad(pixels, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        affinity, groups, embedding, *keys = encode(pixels)
        grid = windows.grid_shape(*pixels.shape[1:3], affinity.shape[1], protocol.grid)
        results = _window_scores(affinity, groups, embedding, *text, grid, protocol.grouping)
        if protocol.border_scale:
            results += tuple(keys)
        running.append((batch, results))

    def finish() -> Iterator[ImageScores]:
        batch, results = running.popleft()
        results = [np.asarray(result) for result in results]
        grid = results[0].shape[1:3]
        results[5:] = [keys.reshape(batch_size, *grid, -1) for keys in results[5:]]
        for row, window in enumerate(batch):
            window.image.parts[window.number] = tuple(result[row] for result in results)
            if len(window.image.parts) == len(window.image.grid):
                yield window.image.scores(things)

    for index, pixels in enumerate(images):
        image = _Image(index, pixels.shape[:2], protocol)
        for number, window in enumerate(image.cut(pixels)):
            same = waiting.setdefault(window.shape, [])
            same.append(_Window(window, number, image))
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

    def __init__(self, index: int, size: tuple[int, int], protocol: protocol_lib.Protocol):
        self.index, self.size, self.protocol = index, size, protocol
        self.resized = windows.resized_shape(*size, protocol.short_side, protocol.long_limit)
        self.grid = windows.window_grid(*self.resized, protocol.window, protocol.stride)
        self.parts: dict[int, tuple[np.ndarray, ...]] = {}
        self.image: np.ndarray | None = None

    def cut(self, image: np.ndarray) -> Iterator[np.ndarray]:
        image = windows.resize_image(image, *self.resized, self.protocol.resize)
        if self.protocol.pamr_steps:
            self.image = image
        side = self.protocol.window
        for top, left in self.grid:
            yield image[top : top + side, left : left + side]

    def scores(self, things: Sequence[bool] | None) -> ImageScores:
        parts = [self.parts[i] for i in sorted(self.parts)]
        cells, groups, *rest = zip(*parts, strict=True)
        embeddings, group_cosines, image_cosines = (np.stack(part) for part in rest[:3])
        tiles = (len({top for top, _ in self.grid}), len({left for _, left in self.grid}))
        foreground = None
        if self.protocol.border_scale:
            keys = _side_by_side(rest[3], tiles)
            foreground = np.asarray(_foreground(keys, self.protocol.border_scale))[..., None]
            words = image_cosines.shape[-1]
            foreground = foreground * np.array(things or [True] * words, np.float32)
        return ImageScores(
            index=self.index,
            cells=_side_by_side(cells, tiles),
            groups=_side_by_side(groups, tiles),
            embeddings=embeddings,
            group_cosines=group_cosines,
            image_cosines=image_cosines,
            size=self.size,
            resized=self.resized,
            tiles=tiles,
            window=self.protocol.window,
            stride=self.protocol.stride,
            image=self.image,
            foreground=foreground,
        )


@dataclass(frozen=True)
class _Window:
    """Pixels to encode: window `number` of an image."""

    pixels: UInt8[np.ndarray, "h w 3"]
    number: int
    image: _Image


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
