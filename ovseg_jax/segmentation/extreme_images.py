"""Images of a benchmark, segmented again to be looked at: the best, median and worst, or some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from ovseg_jax.segmentation.benchmarks import Benchmark, words_of
from ovseg_jax.segmentation.evaluate import protocol_of
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import contact_sheet, scene_panel, soft_maps
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ImageScores, Segmenter, image_scores, score_images
from ovseg_jax.shapes import UInt8

MAPS = 8  # soft assignment maps that are shown of an image


@dataclass(frozen=True)
class ExtremeImage:
    """An image with all that there is to see.

    Attributes:
      index: in the benchmark.
      kind: 'best', 'median' or 'worst'.
      miou: of this image, percent.
      prediction, truth: labels.
      groups: of each pixel.
      maps: affinity of the first window's patches to the groups with the largest total.
      map_groups: which groups those are.
    """

    index: int
    kind: str
    miou: float
    image: UInt8[np.ndarray, "H W 3"]
    prediction: Integer[np.ndarray, "H W"]
    truth: UInt8[np.ndarray, "H W"]
    groups: Integer[np.ndarray, "H W"]
    maps: Float[np.ndarray, "maps h w"]
    map_groups: tuple[int, ...]


def extremes(image_miou: Sequence[float | None], count: int) -> list[tuple[int, str]]:
    """(index, kind) of `count` best, median and worst images, each at most once."""
    known = [i for i, miou in enumerate(image_miou) if miou is not None]
    order = sorted(known, key=lambda i: -image_miou[i])
    middle = max(0, (len(order) - count) // 2)
    spans = (
        ("best", order[:count]),
        ("worst", order[max(count, len(order) - count) :]),
        ("median", order[middle : middle + count]),
    )
    kinds: dict[int, str] = {}
    for kind, indices in spans:
        for index in indices:
            kinds.setdefault(index, kind)
    rank = {"best": 0, "median": 1, "worst": 2}
    return sorted(kinds.items(), key=lambda pair: (rank[pair[1]], -image_miou[pair[0]]))


def extreme_images(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    image_miou: Sequence[float | None],
    count: int,
    batch_size: int,
) -> list[ExtremeImage]:
    """The extreme images, by the mIoU of each that an evaluation under `protocol` gave."""
    which = extremes(image_miou, count)
    data = [benchmark[index] for index, _ in which]
    images = [image for image, _ in data]
    labeled = _labeled(segmenter, benchmark, protocol, images, batch_size)
    # With this grouping the cells of the scores are the affinities.
    plain = protocol_of(benchmark, protocol, segmenter)
    plain = Protocol(
        short_side=plain.short_side,
        long_limit=plain.long_limit,
        window=plain.window,
        stride=plain.stride,
        resize=plain.resize,
        grid=plain.grid,
        grouping="one_group",
    )
    text = segmenter.text(list(benchmark.class_names), plain.templates)
    affinities = {
        scores.index: scores.by_window()[0]
        for scores in image_scores(segmenter.encode, text, images, plain, batch_size)
    }
    results = []
    for place, ((index, kind), (image, truth)) in enumerate(zip(which, data, strict=True)):
        scores, prediction = labeled[place]
        soft = affinities[place]
        most = np.argsort(-soft.sum((0, 1)))[:MAPS]
        results.append(
            ExtremeImage(
                index=index,
                kind=kind,
                miou=float(image_miou[index]),
                image=image,
                prediction=prediction,
                truth=truth,
                groups=scores.group_map(),
                maps=np.moveaxis(soft[..., most], -1, 0),
                map_groups=tuple(int(group) for group in most),
            )
        )
    return results


def _labeled(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    images: Sequence[np.ndarray],
    batch_size: int,
) -> list[tuple[ImageScores, Integer[np.ndarray, "H W"]]]:
    """Scores and labels of the images, in their order, as an evaluation of the benchmark gives."""
    protocol = protocol_of(benchmark, protocol, segmenter)
    vocabulary, _ = words_of(benchmark, protocol)
    scored = score_images(segmenter, vocabulary, images, protocol, batch_size)
    labeled = label_maps(scored, protocol, vocabulary.word_to_class, group=batch_size)
    return sorted(labeled, key=lambda pair: pair[0].index)


def write_sheet(
    images: Sequence[ExtremeImage], benchmark: Benchmark, path: Path, groups: int
) -> None:
    """A contact sheet with the groups, the prediction, the truth and the soft maps of each image.

    Args:
      groups: how many the model has, so that a group has one color in every picture.
    """
    rows: list[Image.Image] = []
    for one in images:
        panel = scene_panel(
            one.image,
            one.groups % groups,
            one.prediction,
            one.truth,
            benchmark.class_names,
            title=f"{one.kind}: image {one.index}, mIoU {one.miou:.1f} %",
            background=benchmark.has_background,
            group_count=groups,
        )
        rows += [panel, soft_maps(one.maps, one.map_groups, panel.width)]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(path)


def write_pictures(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    directory: Path,
    *,
    count: int,
    group_count: int,
) -> Path:
    """A panel of each image (image, groups, prediction, truth) and a sheet of all of them.

    Args:
      protocol: as for `evaluate.evaluate`.
      count: how many images, from the first on.

    Returns:
      The path of the sheet, ``DIRECTORY/NAME.png``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    count = min(count, len(benchmark))
    data = [benchmark[index] for index in range(count)]
    images = [image for image, _ in data]
    rows = []
    for scores, labels in _labeled(segmenter, benchmark, protocol, images, count):
        image, truth = data[scores.index]
        panel = scene_panel(
            image,
            scores.group_map() % group_count,
            labels,
            truth,
            benchmark.class_names,
            background=benchmark.has_background,
            group_count=group_count,
        )
        panel.save(directory / f"{benchmark.name}_{len(rows):03d}.png")
        rows.append(panel)
    sheet = directory / f"{benchmark.name}.png"
    contact_sheet(rows, columns=2 if len(rows) > 3 else 1).save(sheet)
    return sheet
