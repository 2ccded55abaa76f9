"""What ``predict`` writes for an image: label maps, overlays, run lengths, numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.api import Segmentation
from ovseg_jax.segmentation.pictures import overlay, write_palette_png

# Names of the formats, and what they are.
FORMATS = {
    "png": "NAME.mask.png: palette image, 0 background, then the classes in order",
    "overlay": "NAME.overlay.png: the image, tinted, with the names on it and a legend",
    "json": "NAME.json: area and score of each class",
    "npz": "NAME.npz: labels, groups, scores, classes, for NumPy",
    "rle": "NAME.rle.json: run lengths of each class result, as COCO's results have them",
}
_PALETTE = 255  # classes that fit into a palette image


def check_formats(formats: list[str], classes: int) -> None:
    """Raises UserError for a format that does not exist, or cannot hold so many classes."""
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown format {name!r}; there are: {', '.join(FORMATS)}")
    if not formats:
        raise UserError(f"--formats is empty; there are: {', '.join(FORMATS)}")
    if classes > _PALETTE and {"png", "overlay"} & set(formats):
        raise UserError(
            f"{classes} classes do not fit into a palette image, which has {_PALETTE} beside the "
            "background: use --formats=npz,rle,json"
        )


def write_results(
    out: Path,
    name: str,
    image: np.ndarray,
    result: Segmentation,
    formats: list[str],
) -> list[Path]:
    """Writes each of `formats` and returns the files.

    Raises:
      UserError: a file cannot be written.
    """
    written = []
    try:
        for kind in formats:
            path = out / f"{name}.{_SUFFIX[kind]}"
            if kind == "png":
                write_palette_png(path, result.labels, len(result.classes))
            elif kind == "overlay":
                overlay(image, result.labels, list(result.classes), names=True).save(path)
            elif kind == "npz":
                arrays = {"labels": result.labels, "groups": result.groups, "scores": result.scores}
                np.savez_compressed(path, **arrays, classes=np.array(result.classes))
            else:
                record = _rle(name, result) if kind == "rle" else _numbers(name, result)
                path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return written


_SUFFIX = {
    "png": "mask.png",
    "overlay": "overlay.png",
    "json": "json",
    "npz": "npz",
    "rle": "rle.json",
}


def shown_file(files: list[Path]) -> Path:
    """Which of an image's files a person would open first: the overlay, if there is one."""
    overlays = [path for path in files if path.name.endswith(_SUFFIX["overlay"])]
    return (overlays or files)[0]


def summary(result: Segmentation, most: int = 5) -> str:
    """The largest classes with their share of the image, for a line: ``cat 43 %, cup 2 %``."""
    areas = result.areas
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] > 0]
    if not order:
        best = int(result.scores.argmax())
        return f"all background (best: {result.classes[best]}, {result.scores[best]:.2f})"
    parts = [f"{result.classes[i]} {100 * areas[i]:.3g} %" for i in order[:most]]
    more = len(order) - most
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _numbers(name: str, result: Segmentation) -> dict[str, Any]:
    return {
        "image": name,
        "height": result.labels.shape[0],
        "width": result.labels.shape[1],
        "background": round(float((result.labels == 0).mean()), 6),
        "classes": [
            {"name": name, "area": round(float(area), 6), "score": round(float(score), 6)}
            for name, area, score in zip(result.classes, result.areas, result.scores, strict=True)
        ],
        "competitors": list(result.competitors),
        "protocol": result.protocol.as_dict(),
    }


def _rle(name: str, result: Segmentation) -> list[dict[str, Any]]:
    """One entry a class that was result, in the form of COCO's segmentation results."""
    present = [i + 1 for i in np.flatnonzero(result.areas).tolist()]
    return [
        {
            "image_id": name,
            "category_id": label,
            "category": result.classes[label - 1],
            "score": round(float(result.scores[label - 1]), 6),
            "segmentation": segmentation,
        }
        for label, segmentation in run_lengths(result.labels, present).items()
    ]


def run_lengths(
    labels: Integer[np.ndarray, "H W"], wanted: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """COCO's uncompressed run lengths of the mask of each wanted label.

    Runs go column by column and begin with zeros.
    """
    flat = labels.T.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values, ends = flat[starts], np.append(starts[1:], flat.size)
    by_label = {}
    for label in wanted:
        ones = values == label
        # Where zeros end and ones end, in turn; what is left is zeros.
        turns = np.stack([starts[ones], ends[ones]], axis=1).reshape(-1)
        turns = turns if turns.size and turns[-1] == flat.size else np.append(turns, flat.size)
        counts = np.diff(turns, prepend=0).tolist()
        by_label[label] = {"size": list(labels.shape), "counts": counts}
    return by_label
