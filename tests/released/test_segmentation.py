"""Zero-shot segmentation of the released model: from weights and images to label maps.

Every set in this folder that has all it takes is compared, and those in the folder that the
environment variable OVSEG_RELEASED_ARRAYS names. Embeddings and maps are within 1e-5 of the norm;
label maps are equal wherever the two best scores of a pixel differ by more than 1e-5, and at most
0.1 % of the pixels do not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.segmentation import readout
from released.arrays import ReleasedSet, relative, sets_with

PARTS = ("seg.npz", "weights.npz", "inputs.npz", "eval_rest.npz", "meta.json")
IMAGE_CLASSES = 5


def has_all_images(folder, name):
    with np.load(folder / f"{name}_inputs.npz") as inputs:
        return "slide_image" in inputs.files


def same_labels(ours, theirs, margin):
    clear = margin > 1e-5
    assert clear.mean() >= 0.999
    np.testing.assert_array_equal(ours[clear], theirs[clear])


class Segmentation:
    """One set: our model with its weights, and what the released code made of its images."""

    def __init__(self, folder, name):
        self.case = ReleasedSet(folder, name)
        self.seg, self.rest = self.case.file("seg"), self.case.file("eval_rest")
        self.sizes = self.case.meta["config"]
        self.threshold = self.case.meta["bg_thresh_used"]
        arrays = {"params": self.case.params, "batch_stats": self.case.statistics}
        self.variables = jax.tree.map(jnp.asarray, arrays)
        self.scale = float(self.apply("logit_scale"))

    def apply(self, method, *args):
        model = self.case.model
        run = jax.jit(lambda variables, *args: model.apply(variables, *args, method=method))
        return run(self.variables, *args)

    def text(self):
        ids = self.case.ids("class_text")
        raw = np.asarray(self.apply("embed_text", self.apply("text_tokens", ids).pooled))
        return readout.unit(raw.reshape(-1, self.sizes["n_tmpl"], raw.shape[-1]).mean(1))

    def encode(self, images):
        """(soft maps on the grid, probabilities) of windows of equal size, [B, H, W, 3]."""
        tokens = self.apply("visual_tokens", images)
        groups = self.apply("project_image", tokens.groups)
        whole = self.apply("project_image", jnp.mean(tokens.groups, axis=1))
        grid = readout.grid_shape(*images.shape[1:3], tokens.affinity.shape[1], "rounded_patch")
        soft = np.asarray(tokens.affinity).reshape(len(images), *grid, -1)
        text = self.text()
        cosines = readout.cosines(groups, text), readout.cosines(whole[:, None], text)[:, 0]
        return soft, readout.group_probabilities(*cosines, self.scale, IMAGE_CLASSES)

    def labels(self, soft, p, threshold, **geometry):
        options = {"threshold": threshold, "cap": True, "band_floats": 1 << 16}
        classes = np.arange(p.shape[-1])
        return readout.label_image(soft, p, classes=classes, **geometry, **options)


@pytest.fixture(scope="module", params=sets_with(*PARTS, chosen=has_all_images))
def released(request):
    return Segmentation(*request.param)


def test_class_embeddings(released):
    # Several prompts of a class are averaged before the norm.
    assert relative(released.text(), released.rest["zs/text_embedding"]) < 1e-5


def test_windows(released):
    images = sorted(key for key in released.case.inputs if key.startswith("seg_image"))
    assert images
    for key in images:
        name = key.replace("_image", "")
        image = released.case.image(key)
        soft, p = released.encode(image)
        flat = soft.reshape(1, -1, soft.shape[-1]).transpose(0, 2, 1)
        assert relative(flat[:, None], released.seg[f"{name}/soft_assign"]) < 1e-5
        assert relative(p[0], released.seg[f"{name}/group_affinity_final"]) < 1e-5
        size = image.shape[1:3]
        geometry = {"window": size, "corners": ((0, 0),), "resized": size, "size": size}
        for rule, threshold in (("nobg", None), ("bg", released.threshold)):
            labels = released.labels(soft, p, threshold, **geometry)
            margin = released.seg[f"{name}/argmax_margin"]
            same_labels(labels, released.seg[f"{name}/{rule}/seg_pred_whole"], margin)


def test_sliding_windows(released):
    slide = released.sizes["slide"]
    (side, across), (stride, _) = slide["crop"], slide["stride"]
    assert side == across
    image = released.case.image("slide_image")[0]
    corners = tuple(readout.window_grid(*image.shape[:2], side, stride))
    assert len(corners) > 1
    parts = jnp.stack([image[top : top + side, left : left + side] for top, left in corners])
    soft, p = released.encode(parts)
    geometry = {
        "window": parts.shape[1:3],
        "corners": corners,
        "resized": image.shape[:2],
        "size": tuple(slide["ori"]),
    }
    for rule, threshold in (("nobg", None), ("bg", released.threshold)):
        labels = released.labels(soft, p, threshold, **geometry)
        margin = released.seg[f"slide/{rule}/argmax_margin"]
        same_labels(labels, released.seg[f"slide/{rule}/seg_pred"], margin)
