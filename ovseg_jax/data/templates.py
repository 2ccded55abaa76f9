"""Sentences to put entity names in: prompt templates in the style of CLIP.

All are of the list that OpenAI published with CLIP (https://github.com/openai/CLIP), which is in
clip_templates.json with its license.
"""

import json
from collections.abc import Sequence
from importlib import resources

from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

# The sentence for the entity that two images share (Sec. 3.2.3); no article, no period.
SHARED = "a photo of {}"
# The whole list, by this name in a config.
CLIP_NAME = "clip"
CLIP: tuple[str, ...] = tuple(
    json.loads(resources.files("ovseg_jax.data").joinpath("clip_templates.json").read_text())[
        "templates"
    ]
)
# One of these is drawn for each example, the target of the entity loss (Eq. 9), where the config
# names none: the shorter ones that suit any entity.
TRAINING = (
    "a photo of a {}.",
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "a cropped photo of the {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a pixelated photo of the {}.",
    "a blurry photo of a {}.",
    "a good photo of the {}.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a photo of the large {}.",
    "a photo of a small {}.",
    "itap of a {}.",
)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The templates that a config lists: each once, "clip" being all of CLIP's, () the default.

    Raises:
      UserError: one has no place for names.
    """
    listed = [CLIP if name == CLIP_NAME else (name,) for name in names]
    templates = tuple(dict.fromkeys(template for group in listed for template in group))
    for template in templates:
        fill(template, ("dog",))
    return templates or TRAINING


def join_entities(names: Sequence[str]) -> str:
    """['a', 'b', 'c'] -> 'a and b and c'."""
    return " and ".join(names)


def fill(template: str, names: Sequence[str]) -> str:
    """Puts the joined names into a template.

    Raises:
      UserError: the template has not exactly one {}.
    """
    if template.count("{}") != 1:
        raise UserError(
            f"the template {template!r} must have {{}} once, where the names go"
            + nearest(template, [CLIP_NAME])
        )
    return template.replace("{}", join_entities(names))
