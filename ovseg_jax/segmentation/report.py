"""Results for people: tables and lines of text with published results beside them, and the best,
median and worst images as a sheet and as a page.

The page is a single HTML file in which a person sorts images by IoU and hovers over classes. It
contains the pictures, and the label maps as bytes, which a short script reads.
"""

import base64
import html
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from PIL import Image

from ovseg_jax.data.benchmarks.class_tables import IGNORE
from ovseg_jax.files import listed, replace_file
from ovseg_jax.segmentation.benchmarks import Benchmark, words_of
from ovseg_jax.segmentation.evaluate import protocol_of, scored_benchmark
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import contact_sheet, named_colors, paint, png, scene_panel
from ovseg_jax.segmentation.protocol import Protocol, data_file
from ovseg_jax.segmentation.scores import Segmenter
from ovseg_jax.shapes import UInt8

WIDTH = 224  # pixels: pictures and label maps of the page are reduced to about this side
Rows = list[tuple[str, ...]]
# Of the stored protocol: what is not among the settings, or said in other words.
_NO_SETTINGS = (
    *("name", "templates", "thresholds", "per_benchmark", "words", "notes", "class_names_file"),
    *("background", "classes", "class_names_hash", "as_named"),
)


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    """One row per benchmark, below a head."""
    head = ("benchmark", "mIoU, %", "seen", "unseen", "pixel acc.", "mean acc.", "images")
    keys = ("miou", "miou_seen", "miou_unseen", "pixel_accuracy", "mean_accuracy")
    rows: Rows = [(*head, "images/s")]
    for name, result in results.items():
        measures = (number(result.get(key)) for key in keys)
        rate = number(result["images_per_second"])
        rows.append((name, *measures, str(result["images"]), rate))
    return rows


def whole_image_rows(result: Mapping[str, Any]) -> Rows:
    """One row per measure of a benchmark of whole images, below a head."""
    kinds = ("top", "mean_class", "image_to", "text_to")
    measures = [(key, number(x)) for key, x in result.items() if key.startswith(kinds)]
    return [(result["benchmark"], "%"), *measures]


def whole_image_lines(result: Mapping[str, Any]) -> list[str]:
    """The settings that define such a result, printed with it."""
    protocol = result["protocol"]
    things = "classes" if "classes" in result else "texts"
    return [
        f"{result['benchmark']}: {result['images']} images, {result[things]} {things} (hash "
        f"{protocol['texts_hash']}); {protocol['similarity']} of {protocol['image']}, with the "
        f"text; {_templates(protocol)}; {number(result['images_per_second'])} images/s",
        *_passed_over(result),
    ]


def remarks(result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know: other numbers of images, thresholds, Tables 2 and 7."""
    data, protocol, expected = result["data"], result["protocol"], _expected(result)
    not_compared = "so it is not compared with published scores"
    if expected and result["images"] != expected:
        yield f"{result['images']} images, but the whole set has {expected}: this is not its score"
    if data.get("differs"):
        yield f"{data['differs']}, {not_compared}"
    if data.get("images_without_mask"):
        yield f"{data['images_without_mask']} images have no mask and were left out"
    yield from _passed_over(data)
    if protocol["notes"] and not protocol["as_named"]:
        yield f"settings differ from those of protocol {protocol['name']}, {not_compared}"
    if sweep := result.get("threshold_sweep"):
        yield f"threshold {protocol['threshold']} by {sweep['images']} training images"
    if zss := result.get("zss"):
        yield f"{number(zss['miou'])} on {', '.join(zss['classes'])} among all (Table 2)"
    if usage := result.get("group_usage"):
        yield (
            f"a window's patches spread over {number(usage['used'])} of {usage['groups']} groups, "
            f"entropy {usage['entropy']:.2f} of 1"
        )
    entities = result.get("entities")
    if entities and entities["in_paper"]:
        paper = " + ".join(map(str, entities["in_paper"]))
        yield (
            f"{entities['seen']} + {entities['unseen']} classes seen + unseen by our rule, {paper} "
            "in the paper (Table 7)"
        )


def _expected(result: Mapping[str, Any]) -> int | None:
    return result["data"].get("images_expected")


def _passed_over(facts: Mapping[str, Any]) -> list[str]:
    files = facts.get("passed_over")
    return [f"passed over, as no part of the set: {listed(files)}"] if files else []


def protocol_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings that define the results of a run: what they share, then what differs."""
    protocols = {name: result["protocol"] for name, result in results.items()}
    first, *others = protocols.values()
    shared = [key for key in first if all(other.get(key) == first[key] for other in others)]
    lines = [f"protocol {first['name']}: {_settings(first, shared)}", _templates(first)]
    if notes := first["notes"]:
        parts = (notes[key].rstrip(". ") for key in ("title", "source", "differs"))
        lines.append(f"{'. '.join(filter(None, parts))}.")
    for name, protocol in protocols.items():
        differing = _settings(protocol, [key for key in protocol if key not in shared])
        file = protocol["class_names_file"]
        named = f"{file['file']} ({file['sha256']})" if file else "the benchmark's own"
        background = " and background" * protocol["background"]
        lines.append(
            f"{name}: {differing}{', ' * bool(differing)}{protocol['classes']} classes{background},"
            f" names from {named}, hash {protocol['class_names_hash']}"
        )
    return lines


def _templates(protocol: Mapping[str, Any]) -> str:
    return f"{len(protocol['templates'])} templates, the first {protocol['templates'][0]!r}"


def _settings(protocol: Mapping[str, Any], keys: Collection[str]) -> str:
    shown = {key: protocol[key] for key in protocol if key in keys and key not in _NO_SETTINGS}
    return ", ".join(f"{key} {'none' if x is None else x}" for key, x in shown.items())


def published_rows(protocol: str, benchmark: str) -> list[dict[str, Any]]:
    """Published models with a mIoU on the benchmark under the protocol, each with its source."""
    rows = data_file("published_results.json")["rows"]
    return [row for row in rows if protocol in row["protocols"] and benchmark in row["miou"]]


def comparison_rows(result: Mapping[str, Any]) -> Rows:
    """Our score among published ones of its protocol, best last; [] where there are none.

    Nothing is compared where a setting of the protocol was changed, images are missing, or the
    labels are not those that published scores were computed from.
    """
    name, protocol = result["benchmark"], result["protocol"]
    whole = _expected(result) == result["images"] and not result["data"].get("differs")
    rows = published_rows(protocol["name"], name)
    if not rows or not protocol["as_named"] or not whole or result["miou"] is None:
        return []
    scored = [(row["miou"][name], row["method"], row["backbone"], row["data"]) for row in rows]
    scored.append((result["miou"], "this model", "", ""))
    scored.sort(key=lambda row: row[0])
    head = (f"{name}, protocol {protocol['name']}", "backbone", "training data", "mIoU, %")
    return [head, *((*row, number(score)) for score, *row in scored)]


def number(value: float | None) -> str:
    """One digit, or a dash for what is not defined."""
    return "-" if value is None else f"{value:.1f}"


# ---- the best, median and worst images


class LabeledImage(NamedTuple):
    """An image of a benchmark; `kind` is best, median or worst by its `miou`, in percent."""

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
    kinds = dict.fromkeys(order[middle : middle + count], "median")
    kinds |= dict.fromkeys(order[max(count, len(order) - count) :], "worst")
    kinds |= dict.fromkeys(order[:count], "best")
    # The kinds are in the order of the alphabet.
    return sorted(kinds.items(), key=lambda pair: (pair[1], -image_miou[pair[0]]))


def labeled_images(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    numbers: Sequence[int],
    batch_size: int,
) -> list[LabeledImage]:
    """Images as an evaluation of the benchmark under the protocol labels them."""
    protocol = protocol_of(benchmark, protocol, segmenter)
    word_to_class = words_of(benchmark, protocol)[0].word_to_class
    scored = scored_benchmark(segmenter, benchmark, protocol, batch_size, numbers)
    pairs = label_maps(scored, protocol, word_to_class, group=batch_size)
    shown = {x.index: (labels, x.truth, x.group_map()) for x, labels in pairs}
    return [LabeledImage(number, benchmark[number][0], *shown[number]) for number in numbers]


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
    images = labeled_images(segmenter, benchmark, protocol, list(kinds), batch_size)
    return [x._replace(kind=kinds[x.index], miou=float(image_miou[x.index])) for x in images]


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
    images = labeled_images(segmenter, benchmark, protocol, numbers, len(numbers))
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
