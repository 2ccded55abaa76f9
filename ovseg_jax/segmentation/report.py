"""Results for people: tables and lines of text, published results beside them, and a page.

The page is a single HTML file in which a person sorts images by IoU and hovers over classes. It
needs no network and no other file: it contains the pictures, and the label maps as bytes, from
which a short script gets the class below the pointer.
"""

import base64
import html
import io
import json
from collections.abc import Collection, Mapping, Sequence
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
from ovseg_jax.segmentation.protocol import published_rows

Rows = list[tuple[str, ...]]


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    """One row per benchmark, below a head."""
    rows: Rows = [
        ("benchmark", "mIoU, %", "seen", "unseen", "pixel acc.", "mean acc.", "images", "images/s")
    ]
    for name, result in results.items():
        numbers = ("miou", "miou_seen", "miou_unseen", "pixel_accuracy", "mean_accuracy")
        cells = (number(result.get(key)) for key in numbers)
        rate = number(result["images_per_second"])
        rows.append((name, *cells, str(result["images"]), rate))
    return rows


def whole_image_rows(result: Mapping[str, Any]) -> Rows:
    """One row per measure of a benchmark of whole images, below a head."""
    measures = [
        key for key in result if key.startswith(("top", "mean_class", "image_to", "text_to"))
    ]
    return [(result["benchmark"], "%"), *((key, number(result[key])) for key in measures)]


def whole_image_lines(result: Mapping[str, Any]) -> list[str]:
    """The settings that define such a result, printed with it."""
    protocol = result["protocol"]
    count = len(protocol["templates"])
    things = "classes" if "classes" in result else "texts"
    return [
        f"{result['benchmark']}: {result['images']} images, {result[things]} {things} (hash "
        f"{protocol['texts_hash']}); {protocol['similarity']} of {protocol['image']}, with the "
        f"text; {count} template{'s' * (count != 1)}, the first {protocol['templates'][0]!r}; "
        f"{number(result['images_per_second'])} images/s"
    ]


def remarks(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know: other numbers of images, thresholds, Tables 2 and 7."""
    lines = []
    for name, result in results.items():
        expected = result["data"].get("images_expected")
        if expected and result["images"] != expected:
            lines.append(
                f"{name}: {result['images']} images, but the whole set has {expected}: this is not "
                "its score"
            )
        if differs := result["data"].get("differs"):
            lines.append(f"{name}: {differs}, so it is not compared with published scores")
        if left_out := result["data"].get("images_without_mask"):
            lines.append(f"{name}: {left_out} images have no mask and were left out")
        protocol = result["protocol"]
        if protocol["notes"] and not protocol["as_named"]:
            lines.append(
                f"{name}: settings differ from those of protocol {protocol['name']}, so it is not "
                "compared with published scores"
            )
        if sweep := result.get("threshold_sweep"):
            threshold, s = result["protocol"]["threshold"], "s" * (sweep["images"] != 1)
            lines.append(f"{name}: threshold {threshold} by {sweep['images']} training image{s}")
        if zss := result.get("zss"):
            score = number(zss["miou"])
            lines.append(f"{name}: {score} on {', '.join(zss['classes'])} among all (Table 2)")
        if usage := result.get("group_usage"):
            lines.append(
                f"{name}: a window's patches spread over {number(usage['used'])} of "
                f"{usage['groups']} groups, entropy {usage['entropy']:.2f} of 1"
            )
        entities = result.get("entities")
        if entities and entities["in_paper"]:
            paper = " + ".join(map(str, entities["in_paper"]))
            lines.append(
                f"{name}: {entities['seen']} + {entities['unseen']} classes seen + unseen by our "
                f"rule, {paper} in the paper (Table 7)"
            )
    return lines


# What is not among the settings, or in other words.
_LEFT = (
    *("name", "templates", "thresholds", "per_benchmark", "words", "notes", "class_names_file"),
    *("background", "classes", "class_names_hash", "as_named"),
)


def protocol_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings that define the results of a run: what they share, then what differs."""
    protocols = {name: result["protocol"] for name, result in results.items()}
    first, *others = protocols.values()
    shared = [key for key in first if all(other.get(key) == first[key] for other in others)]
    count, sample = len(first["templates"]), first["templates"][0]
    lines = [
        f"protocol {first['name']}: {_settings(first, shared)}",
        f"{count} template{'s' * (count != 1)}, the first {sample!r}",
    ]
    if notes := first["notes"]:
        parts = (notes[key].rstrip(". ") for key in ("title", "source", "differs"))
        lines.append(f"{'. '.join(part for part in parts if part)}.")
    for name, protocol in protocols.items():
        differing = _settings(protocol, [key for key in protocol if key not in shared])
        lines.append(f"{name}: {differing}{', ' * bool(differing)}{_words(protocol)}")
    return lines


def _settings(protocol: Mapping[str, Any], keys: Collection[str]) -> str:
    return ", ".join(
        f"{key} {'none' if value is None else value}"
        for key, value in protocol.items()
        if key in keys and key not in _LEFT
    )


def _words(protocol: Mapping[str, Any]) -> str:
    file = protocol["class_names_file"]
    named = f"{file['file']} ({file['sha256']})" if file else "the benchmark's own"
    background = " and background" * protocol["background"]
    return (
        f"{protocol['classes']} classes{background}, names from {named}, hash "
        f"{protocol['class_names_hash']}"
    )


def comparison_rows(result: Mapping[str, Any]) -> Rows:
    """Our score among published ones of its protocol, best last; [] where there are none.

    Nothing is compared where a setting of the protocol was changed, images are missing, or the
    labels are not those that published scores were computed from.
    """
    protocol, data = result["protocol"], result["data"]
    whole = data.get("images_expected") == result["images"] and not data.get("differs")
    rows = published_rows(protocol["name"], result["benchmark"])
    if not rows or not protocol["as_named"] or not whole or result["miou"] is None:
        return []
    name = result["benchmark"]
    listed = [(row["miou"][name], row["method"], row["backbone"], row["data"]) for row in rows]
    listed.append((result["miou"], "this model", "", ""))
    head = (f"{name}, protocol {protocol['name']}", "backbone", "training data", "mIoU, %")
    return [
        head,
        *(
            (method, backbone, where, number(score))
            for score, method, backbone, where in sorted(listed, key=lambda row: row[0])
        ),
    ]


def number(value: float | None) -> str:
    """One digit, or a dash for what is not defined."""
    return "-" if value is None else f"{value:.1f}"


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
        "images": [_entry(one, groups) for one in images],
        "ignored": IGNORE,
    }
    measures = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
    facts = [f"{key.replace('_', ' ')} {result[key]} %" for key in measures]
    facts.append(f"{result['images']} images at {result['images_per_second']} a second")
    lines = [" · ".join(facts), *protocol_lines({benchmark.name: result})]
    page = (resources.files("ovseg_jax.segmentation") / "report.html").read_text(encoding="utf-8")
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
