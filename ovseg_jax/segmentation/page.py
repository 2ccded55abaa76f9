"""One HTML file in which a person sorts images by IoU and hovers over classes.

It needs no network and no other file: pictures are embedded, and the label maps as bytes, from
which a few lines of script tell the class below the pointer.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.evaluate import replace_file
from ovseg_jax.segmentation.extreme_images import ExtremeImage
from ovseg_jax.segmentation.metric import IGNORE
from ovseg_jax.segmentation.pictures import BACKGROUND, colors, paint
from ovseg_jax.segmentation.report import protocol_lines

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
        "images": [_entry(one, groups) for one in images],
        "ignored": IGNORE,
    }
    measures = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
    facts = [f"{key.replace('_', ' ')} {result[key]} %" for key in measures]
    facts.append(f"{result['images']} images at {result['images_per_second']} a second")
    lines = [" · ".join(facts), *protocol_lines(result["protocol"])]
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


def _entry(one: ExtremeImage, groups: int) -> dict[str, Any]:
    step = -(-max(one.image.shape[:2]) // WIDTH)
    small = tuple(x[::step, ::step] for x in (one.prediction, one.truth, one.groups % groups))
    height, width = small[0].shape
    return {
        "index": one.index,
        "kind": one.kind,
        "miou": round(one.miou, 2),
        "width": width,
        "height": height,
        "image": _embedded(one.image, (width, height), "JPEG"),
        "groups": _embedded(paint(small[2], groups, background=False), None, "PNG"),
        "maps": [
            {"group": group, "picture": _embedded(_gray(soft), (width // 4, height // 4), "JPEG")}
            for group, soft in zip(one.map_groups, one.maps, strict=True)
        ],
        # Painted by the script, which reads the classes from them.
        "prediction": base64.b64encode(small[0].astype(np.uint8).tobytes()).decode(),
        "truth": base64.b64encode(small[1].astype(np.uint8).tobytes()).decode(),
    }


def _gray(soft: np.ndarray) -> np.ndarray:
    return (
        np.repeat(np.rint(255 * soft / max(float(soft.max()), 1e-9)), 3)
        .reshape(*soft.shape, 3)
        .astype(np.uint8)
    )


def _embedded(pixels: np.ndarray, size: tuple[int, int] | None, kind: str) -> str:
    image, stream = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if size is not None:
        image = image.resize(tuple(max(1, side) for side in size), Image.Resampling.BILINEAR)
    image.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
