"""Which classes of a benchmark count as seen or unseen.

*Entities* (the paper's Table 7): a class is seen if training captions were filtered, and their
words masked, by an entity of its name. The paper does not list the classes, only their numbers, so
membership here follows a written rule: a class is seen if its official name is one of the 100
surface forms or one of the 73 names of their entities, or one of the five other names in
`OTHER_NAMES`. Kinds of an entity ("wine glass", "traffic light", "swivel chair") are unseen. Counts
by this rule: VOC 20 + 0, COCO Object 64 + 16, Context 31 + 28, ADE20K 32 + 118; `PAPER_COUNTS` has
the paper's. Where they differ it is by one: COCO's are 81 with background, and Context and ADE20K
have the paper's numbers if "person" is unseen, which the paper's text calls seen.

*ZSS* (Table 2): the classes that zero-shot segmentation leaves out of training.
"""

import functools
import json
from collections.abc import Sequence
from importlib import resources

# Classes of VOC and COCO under another name than the entity's.
OTHER_NAMES = {
    "person": "people",
    "diningtable": "table",
    "pottedplant": "plant",
    "tvmonitor": "tv",
    "cellphone": "phone",
}

# Classes whose masks zero-shot segmentation never trains on (Sec. 4.2).
ZSS = {
    "voc": ("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    "context": ("cow", "motorbike", "sofa", "cat"),
}

# (seen, unseen) in Table 7. COCO's sum is 81, one more than its classes without background.
PAPER_COUNTS = {
    "voc": (20, 0),
    "coco_object": (65, 16),
    "context": (30, 29),
    "ade20k": (31, 119),
}


@functools.cache
def _surface_forms() -> frozenset[str]:
    path = resources.files("ovseg_jax.data") / "entity_lists" / "published.json"
    entities = json.loads(path.read_text(encoding="utf-8"))["entities"]
    forms = {form for words in entities.values() for form in words}
    return frozenset(form.lower() for form in (*forms, *entities))


def is_seen(name: str) -> bool:
    """Whether a class of this official name is an entity; see the module's docstring."""
    name = name.lower().strip()
    return OTHER_NAMES.get(name.replace(" ", ""), name) in _surface_forms()


def unseen_classes(base: str, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the classes that are no entities, for the sets of Table 7; else ()."""
    if base not in PAPER_COUNTS:
        return ()
    return tuple(i for i, name in enumerate(names) if not is_seen(name))


def zss_unseen(base: str, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the classes of Table 2; () for other benchmarks."""
    return tuple(i for i, name in enumerate(names) if name in ZSS.get(base, ()))
