"""Results as tables for people: ours, and beside published ones of the same protocol."""

from collections.abc import Mapping
from typing import Any

from ovseg_jax.segmentation.published import published_rows

Rows = list[tuple[str, ...]]


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    """One row a benchmark, below a head."""
    rows: Rows = [
        ("benchmark", "mIoU, %", "seen", "unseen", "pixel acc.", "mean acc.", "images", "images/s")
    ]
    for name, result in results.items():
        numbers = ("miou", "miou_seen", "miou_unseen", "pixel_accuracy", "mean_accuracy")
        cells = (number(result.get(key)) for key in numbers)
        rate = number(result["images_per_second"])
        rows.append((name, *cells, str(result["images"]), rate))
    return rows


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
        if sweep := result.get("threshold_sweep"):
            threshold = result["protocol"]["threshold"]
            lines.append(f"{name}: threshold {threshold} by {sweep['images']} training images")
        if zss := result.get("zss"):
            score = number(zss["miou"])
            lines.append(f"{name}: {score} on {', '.join(zss['classes'])} among all (Table 2)")
        entities = result.get("entities")
        if entities and entities["in_paper"]:
            paper = " + ".join(map(str, entities["in_paper"]))
            lines.append(
                f"{name}: {entities['seen']} + {entities['unseen']} classes seen + unseen by our "
                f"rule, {paper} in the paper (Table 7)"
            )
    return lines


def protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    """What defines a result, as it is printed with it; `protocol` is a result's."""
    left = (
        "name",
        "templates",
        "thresholds",
        "per_benchmark",
        "words",
        "notes",
        "class_names_file",
    )
    settings = ", ".join(
        f"{key} {'none' if value is None else value}"
        for key, value in protocol.items()
        if key not in left
    )
    count = len(protocol["templates"])
    file = protocol["class_names_file"]
    named = f"{file['file']} ({file['sha256']})" if file else "the benchmark's own"
    lines = [
        f"protocol {protocol['name']}: {settings}",
        f"{count} template{'s' * (count != 1)}, the first {protocol['templates'][0]!r}; class "
        f"names: {named}",
    ]
    if notes := protocol["notes"]:
        lines.append(f"{notes['title']}. {notes['source']}. {notes['differs']}".rstrip(" ."))
    return lines


def comparison_rows(result: Mapping[str, Any]) -> Rows:
    """Our score among published ones of its protocol, best last; [] where there are none.

    Nothing is compared where a setting of the protocol was changed, or images are missing.
    """
    protocol, data = result["protocol"], result["data"]
    whole = data.get("images_expected") == result["images"]
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
