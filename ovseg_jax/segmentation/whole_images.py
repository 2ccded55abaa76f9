"""Benchmarks of whole images: classification and retrieval, from one's own folders.

``classification``: DIR/CLASS/*.jpg, one folder a class, named as the class (``_`` for a blank);
``retrieval``: DIR/captions.tsv, lines of a file's name, a tab, and a caption of it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax import processes
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.evaluate import write_result
from ovseg_jax.segmentation.inputs import IMAGES
from ovseg_jax.segmentation.loaded import LoadedModel
from ovseg_jax.segmentation.matching_tasks import classification, retrieval
from ovseg_jax.segmentation.protocol import names_hash

WHOLE_IMAGES = ("classification", "retrieval")
CAPTIONS = "captions.tsv"
_AT_ONCE = 64  # images that are read before they are encoded


@dataclass(frozen=True)
class LabeledImages:
    """Files, the texts they are matched with, and which belongs to which: the text of each image
    (classification), or the image of each text (retrieval)."""

    files: tuple[Path, ...]
    texts: tuple[str, ...]
    owner: tuple[int, ...]


def whole_image_sets(names: Sequence[str], data_dir: str) -> dict[str, LabeledImages]:
    """The sets among `names` that are of whole images, from the folder that holds them.

    Raises:
      UserError: the folder is missing, or not of the layout in the module's docstring.
    """
    openers = {"classification": _class_folders, "retrieval": _captioned}
    found = {}
    for name in dict.fromkeys(names):
        if name in openers:
            if not data_dir or not Path(data_dir).is_dir():
                raise UserError(f"benchmark {name} needs a folder: give --data_dir=DIR")
            found[name] = openers[name](Path(data_dir))
    return found


def _class_folders(root: Path) -> LabeledImages:
    files, texts, owner = [], [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
        if images:
            owner += [len(texts)] * len(images)
            files += images
            texts.append(folder.name.replace("_", " "))
    if len(texts) < 2:
        raise UserError(
            f"benchmark classification: {root} needs a folder of images for each of at least two "
            "classes"
        )
    return LabeledImages(tuple(files), tuple(texts), tuple(owner))


def _captioned(root: Path) -> LabeledImages:
    path, numbers, texts, owner = root / CAPTIONS, {}, [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"benchmark retrieval: {path} cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, caption = (part.strip() for part in line.partition("\t"))
        if not (name and caption):
            raise UserError(
                f"benchmark retrieval: line {number} of {path} is not a file's name, a tab, and a "
                "caption"
            )
        if not (root / name).is_file():
            raise UserError(f"benchmark retrieval: line {number} of {path}: no file {root / name}")
        owner.append(numbers.setdefault(name, len(numbers)))
        texts.append(caption)
    if not texts:
        raise UserError(f"benchmark retrieval: {path} has no captions")
    return LabeledImages(tuple(root / name for name in numbers), tuple(texts), tuple(owner))


def model_facts(model: str, info: Mapping[str, Any]) -> dict[str, str]:
    """Which model a result is of: its directory, and the first digits of its weights' SHA-256."""
    digest = info.get("files_sha256", {}).get("model.safetensors", "")
    return {"model": str(model), "model_sha256": digest[:12]}


def whole_image_results(
    model: str, sets: Mapping[str, LabeledImages], results: Path
) -> dict[str, dict[str, Any]]:
    """The result of each set, also written to ``RESULTS/NAME.json``.

    Args:
      model: model directory.
    """
    if not sets:
        return {}
    loaded, found = LoadedModel(model), {}
    for name, data in sets.items():
        start = time.perf_counter()
        rows = [
            loaded.embed_image(list(data.files[first : first + _AT_ONCE]))
            for first in range(0, len(data.files), _AT_ONCE)
        ]
        images = np.concatenate(rows)
        classes = name == "classification"
        # A caption is a whole sentence, so it goes into no template.
        templates = loaded.protocol.templates if classes else ("{}",)
        texts = loaded.embed_text(data.texts, templates)
        measured = (
            classification(images, texts, np.array(data.owner), data.texts)
            if classes
            else retrieval(images, texts, data.owner)
        )
        seconds = time.perf_counter() - start
        found[name] = {
            "benchmark": name,
            **measured,
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
            write_result(results / f"{name}.json", found[name])
    return found
