"""Results for people: tables and lines of text, published results beside them."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ovseg_jax.files import listed
from ovseg_jax.segmentation.protocol import data_file

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
    measures = [key for key in result if key.startswith(kinds)]
    return [(result["benchmark"], "%"), *((key, number(result[key])) for key in measures)]


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


def remarks(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know: other numbers of images, thresholds, Tables 2 and 7."""
    return [f"{name}: {line}" for name, result in results.items() for line in _remarks(result)]


def _remarks(result: Mapping[str, Any]) -> Iterator[str]:
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
    return [f"{len(files)} files were passed over: {listed(files)}"] if files else []


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
