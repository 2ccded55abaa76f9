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

# What can be asked for, and what it is.
FORMATS = {
    "png": "NAME.mask.png: palette image, 0 background, then the classes in order",
    "overlay": "NAME.overlay.png: the image, tinted, with the names on it and a legend",
    "json": "NAME.json: area and score of each class",
    "npz": "NAME.npz: labels, groups, scores, classes, for NumPy",
    "rle": "NAME.rle.json: run lengths of each class found, as COCO's results have them",
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
    found: Segmentation,
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
                write_palette_png(path, found.labels, len(found.classes))
            elif kind == "overlay":
                overlay(image, found.labels, list(found.classes), names=True).save(path)
            elif kind == "npz":
                arrays = {"labels": found.labels, "groups": found.groups, "scores": found.scores}
                np.savez_compressed(path, **arrays, classes=np.array(found.classes))
            else:
                record = _rle(name, found) if kind == "rle" else _numbers(name, found)
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
    """The one of an image's files that a person would open first: the overlay, if there is one."""
    overlays = [path for path in files if path.name.endswith(_SUFFIX["overlay"])]
    return (overlays or files)[0]


def summary(found: Segmentation, most: int = 5) -> str:
    """The largest classes with their share of the image, for a line: ``cat 43 %, cup 2 %``."""
    areas = found.areas
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] > 0]
    if not order:
        best = int(found.scores.argmax())
        return f"all background (best: {found.classes[best]}, {found.scores[best]:.2f})"
    parts = [f"{found.classes[i]} {100 * areas[i]:.3g} %" for i in order[:most]]
    more = len(order) - most
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _numbers(name: str, found: Segmentation) -> dict[str, Any]:
    return {
        "image": name,
        "height": found.labels.shape[0],
        "width": found.labels.shape[1],
        "background": round(float((found.labels == 0).mean()), 6),
        "classes": [
            {"name": name, "area": round(float(area), 6), "score": round(float(score), 6)}
            for name, area, score in zip(found.classes, found.areas, found.scores, strict=True)
        ],
        "competitors": list(found.competitors),
        "protocol": found.protocol.as_dict(),
    }


def _rle(name: str, found: Segmentation) -> list[dict[str, Any]]:
    """One entry a class that was found, in the form of COCO's segmentation results."""
    present = [i + 1 for i in np.flatnonzero(found.areas).tolist()]
    return [
        {
            "image_id": name,
            "category_id": label,
            "category": found.classes[label - 1],
            "score": round(float(found.scores[label - 1]), 6),
            "segmentation": segmentation,
        }
        for label, segmentation in run_lengths(found.labels, present).items()
    ]


def run_lengths(
    labels: Integer[np.ndarray, "H W"], wanted: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """COCO's uncompressed run lengths of the mask of each wanted label: column by column, the first
    run is of zeros."""
    flat = labels.T.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values, ends = flat[starts], np.append(starts[1:], flat.size)
    found = {}
    for label in wanted:
        ones = values == label
        # Where zeros end and ones end, in turn; what is left is zeros.
        turns = np.stack([starts[ones], ends[ones]], axis=1).reshape(-1)
        turns = turns if turns.size and turns[-1] == flat.size else np.append(turns, flat.size)
        counts = np.diff(turns, prepend=0).tolist()
        found[label] = {"size": list(labels.shape), "counts": counts}
    return found
