"""The best, median and worst images of a benchmark, segmented again to be looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.class_words import words_of
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import contact_sheet, scene_panel, soft_maps
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import Segmenter, image_scores, with_scale, without_index
from ovseg_jax.shapes import UInt8

MAPS = 8  # soft assignment maps that are shown of an image


@dataclass(frozen=True)
class Chosen:
    """One image with all that there is to see.

    Attributes:
      index: in the benchmark. kind: 'best', 'median' or 'worst'.
      miou: of this image alone, percent.
      prediction, truth: labels. groups: of each pixel.
      maps: affinity of the first window's patches to the groups that have most of it.
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
    """(index, kind) of `count` best, median and worst images, none of them twice."""
    known = [i for i, miou in enumerate(image_miou) if miou is not None]
    order = sorted(known, key=lambda i: -image_miou[i])
    middle = max(0, (len(order) - count) // 2)
    spans = (
        ("best", order[:count]),
        ("worst", order[max(count, len(order) - count) :]),
        ("median", order[middle : middle + count]),
    )
    found: dict[int, str] = {}
    for kind, indices in spans:
        for index in indices:
            found.setdefault(index, kind)
    rank = {"best": 0, "median": 1, "worst": 2}
    return sorted(found.items(), key=lambda pair: (rank[pair[1]], -image_miou[pair[0]]))


def chosen_images(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    image_miou: Sequence[float | None],
    count: int,
    batch_size: int,
) -> list[Chosen]:
    """The extreme images, by the mIoU of each that an evaluation under `protocol` gave.

    Args:
      protocol: as it was for this benchmark.
    """
    protocol = with_scale(protocol, segmenter)
    which = extremes(image_miou, count)
    data = [benchmark[index] for index, _ in which]
    vocabulary, _ = words_of(benchmark, protocol)
    text = segmenter.text(list(vocabulary.words), protocol.templates)
    encode, images = without_index(segmenter.encode), [image for image, _ in data]
    scored = image_scores(encode, text, images, protocol, batch_size, vocabulary.things)
    labels = {
        one.index: (found, one.group_map())
        for one, found in label_maps(scored, protocol, vocabulary.owners)
    }
    # The cells of this form are the affinities themselves.
    plain = Protocol(
        short_side=protocol.short_side,
        long_limit=protocol.long_limit,
        window=protocol.window,
        stride=protocol.stride,
        resize=protocol.resize,
        grid=protocol.grid,
        grouping="one_group",
    )
    found = []
    for one in image_scores(encode, text, images, plain, batch_size):
        (index, kind), (image, truth) = which[one.index], data[one.index]
        soft = one.by_window()[0]
        most = np.argsort(-soft.sum((0, 1)))[:MAPS]
        prediction, groups = labels[one.index]
        found.append(
            Chosen(
                index=index,
                kind=kind,
                miou=float(image_miou[index]),
                image=image,
                prediction=prediction,
                truth=truth,
                groups=groups,
                maps=np.moveaxis(soft[..., most], -1, 0),
                map_groups=tuple(int(group) for group in most),
            )
        )
    order = {index: place for place, (index, _) in enumerate(which)}
    return sorted(found, key=lambda one: order[one.index])


def write_sheet(chosen: Sequence[Chosen], benchmark: Benchmark, path: Path, groups: int) -> None:
    """A contact sheet: of each image the groups, the prediction, the truth, the soft maps.

    Args:
      groups: how many the model has, so that a group has one color in every picture.
    """
    rows: list[Image.Image] = []
    names: Any = benchmark.class_names
    for one in chosen:
        panel = scene_panel(
            one.image,
            one.groups % groups,
            one.prediction,
            one.truth,
            names,
            title=f"{one.kind}: image {one.index}, mIoU {one.miou:.1f} %",
            background=benchmark.has_background,
            group_count=groups,
        )
        rows += [panel, soft_maps(one.maps, one.map_groups, panel.width)]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(path)
