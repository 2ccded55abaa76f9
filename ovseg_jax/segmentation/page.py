"""Images of a benchmark to look at: the best, median and worst as a sheet and as a page.

The page is a single HTML file in which a person sorts images by IoU and hovers over classes. It
contains the pictures, and the label maps as bytes, which a short script reads.
"""

import base64
import dataclasses
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

from ovseg_jax.data.benchmarks.class_tables import IGNORE
from ovseg_jax.files import replace_file
from ovseg_jax.segmentation.benchmarks import Benchmark, words_of
from ovseg_jax.segmentation.evaluate import protocol_of, scored_benchmark
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import contact_sheet, named_colors, paint, png, scene_panel
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.report import protocol_lines
from ovseg_jax.segmentation.scores import Segmenter
from ovseg_jax.shapes import UInt8

WIDTH = 224  # pixels: pictures and label maps of the page are reduced to about this side


@dataclass(frozen=True)
class LabeledImage:
    """An image of a benchmark with all that there is to see; `kind` is best, median or worst by the
    image's `miou`, in percent."""

    index: int
    image: UInt8[np.ndarray, "H W 3"]
    prediction: Integer[np.ndarray, "H W"]
    truth: UInt8[np.ndarray, "H W"]
    groups: Integer[np.ndarray, "H W"]
    kind: str = ""
    miou: float = 0.0


def extremes(image_miou: Sequence[float | None], count: int) -> list[tuple[int, str]]:
    """(index, kind) of `count` best, median and worst images, each at most once."""
    known = [i for i, miou in enumerate(image_miou) if miou is not None]
    order = sorted(known, key=lambda i: -image_miou[i])
    middle = max(0, (len(order) - count) // 2)
    spans = {
        "best": order[:count],
        "worst": order[max(count, len(order) - count) :],
        "median": order[middle : middle + count],
    }
    kinds: dict[int, str] = {}
    for kind, indices in spans.items():
        kinds = dict.fromkeys(indices, kind) | kinds
    rank = {"best": 0, "median": 1, "worst": 2}
    return sorted(kinds.items(), key=lambda pair: (rank[pair[1]], -image_miou[pair[0]]))


def extreme_images(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    image_miou: Sequence[float | None],
    count: int,
    batch_size: int,
) -> list[LabeledImage]:
    """The extreme images, by the mIoU of each that an evaluation under `protocol` gave."""
    kinds = dict(extremes(image_miou, count))
    images = _labeled(segmenter, benchmark, protocol, list(kinds), batch_size)
    return [
        dataclasses.replace(x, kind=kinds[x.index], miou=float(image_miou[x.index])) for x in images
    ]


def _labeled(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    numbers: Sequence[int],
    batch_size: int,
) -> list[LabeledImage]:
    """Images as an evaluation of the benchmark labels them."""
    protocol = protocol_of(benchmark, protocol, segmenter)
    word_to_class = words_of(benchmark, protocol)[0].word_to_class
    scored = scored_benchmark(segmenter, benchmark, protocol, batch_size, numbers)
    pairs = label_maps(scored, protocol, word_to_class, group=batch_size)
    shown = {x.index: (labels, x.truth, x.group_map()) for x, labels in pairs}
    return [LabeledImage(number, benchmark[number][0], *shown[number]) for number in numbers]


def write_sheet(
    images: Sequence[LabeledImage], benchmark: Benchmark, path: Path, groups: int, columns: int = 1
) -> None:
    """A contact sheet with groups, prediction and truth of each image; the model has `groups`."""
    rows = []
    for x in images:
        title = f"{x.kind}: image {x.index}, mIoU {x.miou:.1f} %" if x.kind else ""
        shown = x.image, x.groups % groups, x.prediction, x.truth, benchmark.class_names
        options = {"background": benchmark.has_background, "group_count": groups}
        rows.append(scene_panel(*shown, title=title, **options))
    replace_file(path, png(contact_sheet(rows, columns)))


def write_pictures(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    directory: Path,
    *,
    count: int,
    group_count: int,
) -> Path:
    """A sheet of the first images of a benchmark, ``DIRECTORY/NAME.png``; returns its path."""
    numbers = range(min(count, len(benchmark)))
    images = _labeled(segmenter, benchmark, protocol, numbers, len(numbers))
    sheet = directory / f"{benchmark.name}.png"
    write_sheet(images, benchmark, sheet, group_count, columns=2 if len(images) > 3 else 1)
    return sheet


# ---- the page


def write_page(
    path: Path,
    result: Mapping[str, Any],
    benchmark: Benchmark,
    images: Sequence[LabeledImage],
    groups: int,
) -> None:
    """Writes the page of some images of a benchmark with the result that `evaluate` gave."""
    legend = named_colors(benchmark.class_names, benchmark.has_background)
    data = {
        "names": [name for name, _ in legend],
        "colors": [f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in legend],
        "iou": [result["iou"][name] for name, _ in legend],
        "images": [_entry(image, groups) for image in images],
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


def _entry(extreme: LabeledImage, groups: int) -> dict[str, Any]:
    step = -(-max(extreme.image.shape[:2]) // WIDTH)
    maps = (extreme.prediction, extreme.truth, extreme.groups % groups)
    prediction, truth, group = (x[::step, ::step] for x in maps)
    height, width = prediction.shape
    small = Image.fromarray(extreme.image).resize((width, height), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    small.save(stream, "JPEG")
    of_groups = png(Image.fromarray(paint(group, groups, background=False)))
    return {
        "index": extreme.index,
        "kind": extreme.kind,
        "miou": round(extreme.miou, 2),
        "width": width,
        "height": height,
        "image": f"data:image/jpeg;base64,{_base64(stream.getvalue())}",
        "groups": f"data:image/png;base64,{_base64(of_groups)}",
        # Painted by the script, which reads the classes from them.
        "prediction": _base64(prediction.astype(np.uint8).tobytes()),
        "truth": _base64(truth.astype(np.uint8).tobytes()),
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
