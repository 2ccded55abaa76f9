"""Benchmarks of whole images: zero-shot classification and retrieval, from your own folders.

``classification``: DIR/CLASS/*.jpg, a folder for each class, named after it (``_`` for a blank);
``retrieval``: DIR/captions.tsv, lines with the name of a file, a tab, and a caption of it.

Both compare unit embeddings of whole images with those of texts, and need no masks.
"""

import contextlib
import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

import ovseg_jax
from ovseg_jax import processes
from ovseg_jax.data.decoding import IMAGES, is_foreign
from ovseg_jax.errors import UserError
from ovseg_jax.files import check_writable
from ovseg_jax.segmentation.evaluate import write_result
from ovseg_jax.segmentation.pictures import files_in
from ovseg_jax.segmentation.protocol import names_hash
from ovseg_jax.segmentation.vocabulary import read_text

WHOLE_IMAGES = ("classification", "retrieval")
RANKS = (1, 5, 10)
_AT_ONCE = 64  # images that are read before they are encoded


class ImagesWithTexts(NamedTuple):
    """Files and texts; files and folders that are no part of the set."""

    files: list[Path]
    texts: list[str]
    match: list[int]  # the text of each image (classification), or the image of each text
    passed_over: list[str]


def whole_image_sets(names: Sequence[str], data_dir: str) -> dict[str, ImagesWithTexts]:
    """Those of the named benchmarks that are of whole images, read from their folder."""
    openers = {"classification": _class_folders, "retrieval": _captioned}
    names = [name for name in dict.fromkeys(names) if name in openers]
    if names and (not data_dir or not Path(data_dir).is_dir()):
        raise UserError(f"benchmark {names[0]} needs a folder: give --data_dir=DIR")
    return {name: openers[name](Path(data_dir)) for name in names}


def _class_folders(root: Path) -> ImagesWithTexts:
    files, texts, match, passed_over = [], [], [], []
    for path in sorted(path for path in root.iterdir() if not is_foreign(path.name)):
        is_class = path.is_dir() and not path.name.startswith(".")
        images, others = files_in(path, IMAGES) if is_class else ([], [])
        passed_over += [f"{path.name}/{other.name}" for other in others] if images else [path.name]
        if images:
            match += [len(texts)] * len(images)
            files += images
            texts.append(path.name.replace("_", " "))
    if len(texts) < 2:
        text = "needs a folder of images for each of at least two classes"
        raise UserError(f"benchmark classification: {root} {text}")
    return ImagesWithTexts(files, texts, match, passed_over)


def _captioned(root: Path) -> ImagesWithTexts:
    path, numbers, texts, match = root / "captions.tsv", {}, [], []
    for line, cells in _tab_separated(path):
        where = f"benchmark retrieval: line {line} of {path}"
        if len(cells) != 2 or not all(cells):
            raise UserError(f"{where} is not a file's name, a tab, and a caption")
        name, caption = cells
        if not (root / name).is_file():
            raise UserError(f"{where}: no file {root / name}")
        match.append(numbers.setdefault(name, len(numbers)))
        texts.append(caption)
    if not texts:
        raise UserError(f"benchmark retrieval: {path} has no captions")
    return ImagesWithTexts([root / name for name in numbers], texts, match, [])


def _tab_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the last line, cells) of each row. Quotes around whole cells, as spreadsheets and
    pandas write them, belong to the format where every quoted cell is closed; else to the texts."""
    text = read_text(path).removeprefix("\ufeff")
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter="\t", quoting=quoting, strict=True)
        with contextlib.suppress(csv.Error):
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
            return iter([(line, cells) for line, cells in rows if any(cells)])
    raise UserError(f"benchmark retrieval: {path} is no table with tabs between its columns")


def model_facts(model: str, info: Mapping[str, Any]) -> dict[str, str]:
    """Which model a result is of: its directory, and the first digits of its weights' SHA-256."""
    digest = info.get("files_sha256", {}).get("model.safetensors", "")
    return {"model": str(model), "model_sha256": digest[:12]}


def whole_image_results(
    model: str, sets: Mapping[str, ImagesWithTexts], results: Path
) -> dict[str, dict[str, Any]]:
    """The result of each set of a model directory, also written to ``RESULTS/NAME.json``."""
    if not sets:
        return {}
    if processes.is_first():
        check_writable(results)
    loaded, by_name = ovseg_jax.load(model), {}
    for name, data in sets.items():
        start = time.perf_counter()
        firsts = range(0, len(data.files), _AT_ONCE)
        rows = [loaded.embed_image(data.files[first : first + _AT_ONCE]) for first in firsts]
        images, match = np.concatenate(rows), np.array(data.match)
        if name == "classification":
            templates = loaded.protocol.templates
            texts = loaded.embed_text(data.texts, templates)
            measures = classification(images, texts, match, data.texts)
        else:
            templates = ("{}",)  # a caption is a whole sentence, so it goes into no template
            measures = retrieval(images, loaded.embed_text(data.texts, templates), match)
        seconds = time.perf_counter() - start
        by_name[name] = {
            "benchmark": name,
            **measures,
            "passed_over": data.passed_over,
            "seconds": round(seconds, 3),
            "images_per_second": round(len(images) / max(seconds, 1e-9), 3),
            "protocol": {
                "image": f"the square in the middle, {loaded.protocol.window} pixels a side",
                "similarity": "cosine",
                "templates": list(templates),
                "average": loaded.protocol.average,
                "texts_hash": names_hash(data.texts),
            },
            **model_facts(model, loaded.info),
        }
        if processes.is_first():
            try:
                write_result(results / f"{name}.json", by_name[name])
            except UserError as error:
                by_name[name]["not_written"] = str(error)
    return by_name


# ---- measures


def ranks_of(
    similarity: Float[np.ndarray, "N M"], right: Integer[np.ndarray, " N"]
) -> Integer[np.ndarray, " N"]:
    """For each row, how many columns beat the right one, or equal it (0 where it is the best)."""
    of_right = similarity[np.arange(len(similarity)), right][:, None]
    return (similarity >= of_right).sum(1) - 1


def classification(
    images: Float[np.ndarray, "N E"],
    classes: Float[np.ndarray, "C E"],
    truth: Integer[np.ndarray, " N"],
    names: Sequence[str],
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy in percent: overall, of each class that occurs, and their mean."""
    ranks = ranks_of(images @ classes.T, truth)
    by_class = {int(c): float((ranks[truth == c] == 0).mean()) for c in np.unique(truth)}
    return {
        "images": len(truth),
        "classes": len(classes),
        "top1": 100 * float((ranks == 0).mean()),
        "top5": 100 * float((ranks < 5).mean()),
        "mean_class_top1": 100 * float(np.mean(list(by_class.values()))),
        "class_top1": {names[c]: round(100 * x, 4) for c, x in by_class.items()},
    }


def retrieval(
    images: Float[np.ndarray, "N E"],
    texts: Float[np.ndarray, "M E"],
    image_of: Integer[np.ndarray, " M"],
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in percent, both ways; `image_of` is the image of each text. An image
    with several texts is retrieved when its best text is, as usual on COCO."""
    similarity = images @ texts.T
    to_image = ranks_of(similarity.T, image_of)
    to_text = np.full(len(images), len(texts))
    for text, image in enumerate(image_of.tolist()):
        # Other texts of the same image do not count as better than this one.
        better = (similarity[image] >= similarity[image, text]) & (image_of != image)
        to_text[image] = min(to_text[image], int(better.sum()))
    ways = (("image_to_text", to_text), ("text_to_image", to_image))
    recall = {f"{w}_recall_at_{k}": 100 * float((r < k).mean()) for w, r in ways for k in RANKS}
    return {"images": len(images), "texts": len(texts), **recall}
