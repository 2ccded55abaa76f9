"""Masks in COCO's forms, through pycocotools, which is an extra."""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool

from ovseg_jax.errors import UserError


def load_codec() -> Any:
    """The module pycocotools.mask.

    Raises:
      UserError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            "reading COCO's masks needs pycocotools: pip install 'ovseg_jax[benchmarks]'"
        ) from error
    return mask


def mask_of(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """The pixels of a region.

    Args:
      segmentation: a list of polygons, or run lengths, compressed (text) or not (numbers).
    """
    codec = load_codec()
    if isinstance(segmentation, list):
        encoded = codec.merge(codec.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = codec.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    with warnings.catch_warnings():
        # Its arrays follow the protocol of NumPy 1, which NumPy 2 still takes.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return codec.decode(encoded).astype(bool)
