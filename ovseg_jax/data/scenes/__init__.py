"""Scenes: an embedded data set of images, captions and masks, composed from the OpenMoji font.

Everything is a pure function of (seed, split, index); nothing is downloaded or stored. Masks come
from the drawings' alpha and are for evaluation only.
"""

from ovseg_jax.data.scenes.drawing import Scene, render, scene_at
from ovseg_jax.data.scenes.layout import (
    SPLITS,
    VERSION,
    Patch,
    PlacedObject,
    SceneLayout,
    layout_at,
)
from ovseg_jax.data.scenes.source import ScenesSource
from ovseg_jax.data.scenes.statistics import describe
from ovseg_jax.data.scenes.vocabulary import (
    CLASS_NAMES,
    CLASSES,
    NUM_CLASSES,
    SEEN_LABELS,
    UNSEEN_LABELS,
    SceneClass,
    class_of,
    scene_entity_table,
)

__all__ = [
    "CLASSES",
    "CLASS_NAMES",
    "NUM_CLASSES",
    "SEEN_LABELS",
    "SPLITS",
    "UNSEEN_LABELS",
    "VERSION",
    "Patch",
    "PlacedObject",
    "Scene",
    "SceneClass",
    "SceneLayout",
    "ScenesSource",
    "class_of",
    "describe",
    "layout_at",
    "render",
    "scene_at",
    "scene_entity_table",
]
