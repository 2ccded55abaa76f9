"""How hard the scenes are: the figures that are printed beside a score."""

import re

import numpy as np

from ovseg_jax.data.scenes.drawing import draw
from ovseg_jax.data.scenes.layout import layout_at
from ovseg_jax.data.scenes.vocabulary import scene_entity_table

# An object with less than this share of its pixels visible counts as occluded.
_VISIBLE = 0.9


def entity_pattern() -> re.Pattern[str]:
    """Matches any surface form of any seen class as whole words."""
    forms = {form for forms in scene_entity_table().values() for form in forms}
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b", re.IGNORECASE)


def describe(split: str, count: int, seed: int, size: int) -> dict[str, float]:
    """Statistics of the first `count` scenes of a split, drawn at `size` pixels.

    `foreground`: mean share of labeled pixels; `two_classes`: share of scenes with at least two
    classes; `objects`: mean number a scene; `occluded`: share of objects with over a tenth covered
    (`scenes_with_occlusion`: of scenes with one); `captions_with_entity`: share that names a seen
    class; `caption_words`: mean length. Objects wholly outside the frame do not occur.
    """
    pattern = entity_pattern()
    foreground, two_classes, objects, named, words = [], [], [], [], []
    occluded: list[list[bool]] = []
    for index in range(count):
        layout = layout_at(seed, split, index)
        _, owner, areas = draw(layout, size)
        visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)
        foreground.append(1 - visible[0] / owner.size)
        covered = [bool(v < _VISIBLE * a) for v, a in zip(visible[1:], areas, strict=True)]
        occluded.append(covered)
        two_classes.append(len({item.label for item in layout.objects}) >= 2)
        objects.append(len(layout.objects))
        named.append(bool(pattern.search(layout.caption)))
        words.append(len(layout.caption.split()))
    return {
        "scenes": float(count),
        "foreground": float(np.mean(foreground)),
        "two_classes": float(np.mean(two_classes)),
        "objects": float(np.mean(objects)),
        "occluded": float(np.mean([flag for flags in occluded for flag in flags])),
        "scenes_with_occlusion": float(np.mean([any(flags) for flags in occluded])),
        "captions_with_entity": float(np.mean(named)),
        "caption_words": float(np.mean(words)),
    }
