"""Images of a benchmark to look at: the best, median and worst as a sheet and as a page.

The page is a single HTML file in which a person sorts images by IoU and hovers over classes. It
needs no network and no other file: it contains the pictures, and the label maps as bytes, from
which a short script gets the class below the pointer.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from PIL import Image

from ovseg_jax.files import replace_file
from ovseg_jax.segmentation.benchmarks import Benchmark, words_of
from ovseg_jax.segmentation.evaluate import protocol_of
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.metric import IGNORE
from ovseg_jax.segmentation.pictures import (
    BACKGROUND,
    colors,
    contact_sheet,
    paint,
    scene_panel,
)
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.report import protocol_lines
from ovseg_jax.segmentation.scores import ImageScores, Segmenter, score_images
from ovseg_jax.shapes import UInt8


@dataclass(frozen=True)
class ExtremeImage:
    """An image with all that there is to see.

    Attributes:
      index: in the benchmark.
      kind: 'best', 'median' or 'worst'.
      miou: of this image, percent.
      prediction, truth: labels.
      groups: of each pixel.
    """

    index: int
    kind: str
    miou: float
    image: UInt8[np.ndarray, "H W 3"]
    prediction: Integer[np.ndarray, "H W"]
    truth: UInt8[np.ndarray, "H W"]
    groups: Integer[np.ndarray, "H W"]


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
    labeled = _labeled(segmenter, benchmark, protocol, [image for image, _ in data], batch_size)
    return [
        ExtremeImage(
            index, kind, float(image_miou[index]), image, prediction, truth, scores.group_map()
        )
        for (index, kind), (image, truth), (scores, prediction) in zip(
            which, data, labeled, strict=True
        )
    ]


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
    """A contact sheet with the groups, the prediction and the truth of each image.

    Args:
      groups: how many the model has, so that a group has one color in every picture.
    """
    rows = []
    for extreme in images:
        title = f"{extreme.kind}: image {extreme.index}, mIoU {extreme.miou:.1f} %"
        shown = extreme.image, extreme.groups, extreme.prediction, extreme.truth
        rows.append(_panel(*shown, benchmark, groups, title))
    _save(contact_sheet(rows), path)


def write_pictures(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    directory: Path,
    *,
    count: int,
    group_count: int,
) -> Path:
    """A sheet of the first images of a benchmark: image, groups, prediction and truth.

    Args:
      protocol: as for `evaluate.evaluate`.
      count: how many images.

    Returns:
      Its path, ``DIRECTORY/NAME.png``.
    """
    data = [benchmark[index] for index in range(min(count, len(benchmark)))]
    labeled = _labeled(segmenter, benchmark, protocol, [image for image, _ in data], len(data))
    rows = [
        _panel(image, scores.group_map(), labels, truth, benchmark, group_count)
        for (image, truth), (scores, labels) in zip(data, labeled, strict=True)
    ]
    sheet = directory / f"{benchmark.name}.png"
    _save(contact_sheet(rows, columns=2 if len(rows) > 3 else 1), sheet)
    return sheet


def _panel(
    image: UInt8[np.ndarray, "H W 3"],
    groups: Integer[np.ndarray, "H W"],
    prediction: Integer[np.ndarray, "H W"],
    truth: Integer[np.ndarray, "H W"],
    benchmark: Benchmark,
    group_count: int,
    title: str = "",
) -> Image.Image:
    options = {"background": benchmark.has_background, "group_count": group_count, "title": title}
    groups = groups % group_count
    return scene_panel(image, groups, prediction, truth, benchmark.class_names, **options)


def _save(picture: Image.Image, path: Path) -> None:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    replace_file(path, stream.getvalue())


# ---- the page

WIDTH = 224  # pixels: pictures and label maps are reduced to about this side


def write_page(
    path: Path,
    result: Mapping[str, Any],
    benchmark: Benchmark,
    images: Sequence[ExtremeImage],
    groups: int,
) -> None:
    """Writes the page.

    Args:
      result: what `evaluate.evaluate` gave.
      images: those to show.
      groups: how many the model has.
    """
    names = ["background"] * benchmark.has_background + list(benchmark.class_names)
    table = [BACKGROUND] * benchmark.has_background + list(colors(len(benchmark.class_names)))
    data = {
        "names": names,
        "colors": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in table],
        "iou": [result["iou"][name] for name in names],
        "images": [_entry(extreme, groups) for extreme in images],
        "ignored": IGNORE,
    }
    measures = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
    facts = [f"{key.replace('_', ' ')} {result[key]} %" for key in measures]
    facts.append(f"{result['images']} images at {result['images_per_second']} a second")
    lines = [" · ".join(facts), *protocol_lines({benchmark.name: result})]
    page = (resources.files("ovseg_jax.segmentation") / "page.html").read_text(encoding="utf-8")
    # "</" would end the script that contains the data.
    filled = {
        "TITLE": html.escape(f"{benchmark.name}: mIoU {result['miou']} %"),
        "FACTS": "".join(f"<p>{html.escape(line)}</p>" for line in lines),
        "DATA": json.dumps(data).replace("</", "<\\/"),
    }
    for key, text in filled.items():
        page = page.replace(f"@{key}@", text)
    replace_file(path, page)


def _entry(extreme: ExtremeImage, groups: int) -> dict[str, Any]:
    step = -(-max(extreme.image.shape[:2]) // WIDTH)
    small = tuple(
        x[::step, ::step] for x in (extreme.prediction, extreme.truth, extreme.groups % groups)
    )
    height, width = small[0].shape
    return {
        "index": extreme.index,
        "kind": extreme.kind,
        "miou": round(extreme.miou, 2),
        "width": width,
        "height": height,
        "image": _embedded(extreme.image, (width, height), "JPEG"),
        "groups": _embedded(paint(small[2], groups, background=False), None, "PNG"),
        # Painted by the script, which reads the classes from them.
        "prediction": base64.b64encode(small[0].astype(np.uint8).tobytes()).decode(),
        "truth": base64.b64encode(small[1].astype(np.uint8).tobytes()).decode(),
    }


def _embedded(pixels: np.ndarray, size: tuple[int, int] | None, kind: str) -> str:
    image, stream = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if size is not None:
        image = image.resize(tuple(max(1, side) for side in size), Image.Resampling.BILINEAR)
    image.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
