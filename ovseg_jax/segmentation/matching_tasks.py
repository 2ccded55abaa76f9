"""Zero-shot classification of images, and retrieval between images and texts.

Both compare unit embeddings of whole images with those of texts (`loaded.LoadedModel.embed_image`,
`embed_text`), so they need no masks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from ovseg_jax.errors import UserError

RANKS = (1, 5, 10)


def ranks_of(
    similarity: Float[np.ndarray, "N M"], right: Integer[np.ndarray, " N"]
) -> Integer[np.ndarray, " N"]:
    """For each row, how many columns beat the right one: 0 where it is the best.

    Columns that are equal count as better, so that a model which says nothing scores nothing.
    """
    own = similarity[np.arange(len(similarity)), right][:, None]
    return (similarity >= own).sum(1) - 1


def classification(
    images: Float[np.ndarray, "N E"],
    classes: Float[np.ndarray, "C E"],
    truth: Integer[np.ndarray, " N"],
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy in percent, overall and as a mean over the classes that occur.

    Args:
      names: of the classes; with them, the accuracy of each that occurs is given too.

    Raises:
      UserError: no image, or a label out of range.
    """
    if not len(truth) or truth.min() < 0 or truth.max() >= len(classes):
        raise UserError(
            f"classification needs images with labels from 0 to {len(classes) - 1}; there are "
            f"{len(truth)} images"
        )
    ranks = ranks_of(images @ classes.T, truth)
    by_class = {int(c): float((ranks[truth == c] == 0).mean()) for c in np.unique(truth)}
    own = {names[c]: round(100 * share, 4) for c, share in by_class.items()} if names else {}
    return {
        "images": len(truth),
        "classes": len(classes),
        "top1": 100 * float((ranks == 0).mean()),
        "top5": 100 * float((ranks < 5).mean()),
        "mean_class_top1": 100 * float(np.mean(list(by_class.values()))),
        **({"class_top1": own} if names else {}),
    }


def retrieval(
    images: Float[np.ndarray, "N E"],
    texts: Float[np.ndarray, "M E"],
    image_of: Sequence[int] | Integer[np.ndarray, " M"],
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in percent, both ways.

    An image may have several texts: it is found when its best text is, as usual on COCO and
    Flickr30k.

    Args:
      image_of: the image of each text.

    Raises:
      UserError: an image without a text, or a text of no image.
    """
    owner = np.asarray(image_of, np.int64)
    if len(owner) != len(texts) or set(owner.tolist()) != set(range(len(images))):
        raise UserError("retrieval needs at least one text of each image, and no others")
    similarity = images @ texts.T
    to_image = ranks_of(similarity.T, owner)
    best = np.full(len(images), len(texts))
    for text, image in enumerate(owner.tolist()):
        # Other texts of the same image do not stand before this one.
        others = (similarity[image] >= similarity[image, text]) & (owner != image)
        best[image] = min(best[image], int(others.sum()))
    return {
        "images": len(images),
        "texts": len(texts),
        **{f"image_to_text_recall_at_{k}": 100 * float((best < k).mean()) for k in RANKS},
        **{f"text_to_image_recall_at_{k}": 100 * float((to_image < k).mean()) for k in RANKS},
    }
