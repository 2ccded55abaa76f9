"""Zero-shot segmentation of the released model: from weights and images to label maps.

Every set in this folder that has all it takes is compared, and those in the folder that the
environment variable OVSEG_RELEASED_ARRAYS names. Embeddings and maps are within 1e-5 of the norm;
label maps are equal wherever the two best scores of a pixel differ by more than 1e-5, and at most
0.1 % of the pixels do not.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.models.build import build_model
from ovseg_jax.segmentation import one_group, readout, windows
from ovseg_jax.weights.released import from_released, released_config

HERE = Path(__file__).parent
PARTS = ("weights.npz", "inputs.npz", "seg.npz", "eval_rest.npz", "meta.json")
IMAGE_CLASSES = 5


def complete_sets():
    folders = [HERE, *map(Path, filter(None, [os.environ.get("OVSEG_RELEASED_ARRAYS")]))]
    for folder in folders:
        for path in sorted(folder.glob("*_seg.npz")):
            name = path.name.removesuffix("_seg.npz")
            if all((folder / f"{name}_{part}").is_file() for part in PARTS):
                yield folder, name


SETS = list(complete_sets())


def relative(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


def same_labels(ours, theirs, margin):
    clear = margin > 1e-5
    assert clear.mean() >= 0.999
    np.testing.assert_array_equal(ours[clear], theirs[clear])


class Released:
    """One set: its arrays, and our model with its weights."""

    def __init__(self, folder, name):
        def arrays(part):
            return np.load(folder / f"{name}_{part}.npz")

        self.seg, self.rest, self.inputs = (arrays(x) for x in ("seg", "eval_rest", "inputs"))
        self.meta = json.loads((folder / f"{name}_meta.json").read_text())
        self.sizes = self.meta["config"]
        heads = self.sizes["img"]["num_heads"]
        tensors = dict(arrays("weights"))
        config = released_config(
            tensors,
            heads=heads[0],
            second_heads=heads[1],
            text_heads=self.sizes["bert"]["num_attention_heads"],
        )
        params, statistics, _ = from_released(tensors, config)
        self.model = build_model(ConfigDict(config))
        self.variables = {"params": params, "batch_stats": statistics}
        self.scale = float(self.apply("logit_scale"))

    def apply(self, method, *args):
        return self.model.apply(self.variables, *args, method=method)

    def text(self):
        ids = jnp.asarray(self.inputs["class_text/input_ids"], jnp.int32)
        raw = np.asarray(self.apply("embed_text", self.apply("text_tokens", ids).pooled))
        return readout.unit(raw.reshape(-1, self.sizes["n_tmpl"], raw.shape[-1]).mean(1))

    def encode(self, images):
        """(soft maps on the grid, probabilities) of windows of equal size, [B, H, W, 3]."""
        tokens = self.apply("visual_tokens", jnp.asarray(images))
        groups = self.apply("project_image", tokens.groups)
        whole = self.apply("project_image", jnp.mean(tokens.groups, axis=1))
        grid = windows.grid_shape(*images.shape[1:3], tokens.affinity.shape[1], "rounded_patch")
        soft = np.asarray(tokens.affinity).reshape(len(images), *grid, -1)
        text = self.text()
        cosines = readout.cosines(groups, text), readout.cosines(whole[:, None], text)[:, 0]
        return soft, one_group.group_probabilities(*cosines, self.scale, IMAGE_CLASSES)

    def labels(self, soft, p, threshold, **geometry):
        options = {"threshold": threshold, "cap": True, "band_floats": 1 << 16}
        return one_group.label_image(soft, p, **geometry, **options)


@pytest.fixture(scope="module", params=SETS, ids=[name for _, name in SETS])
def released(request):
    return Released(*request.param)


def test_a_set_is_there():
    assert SETS


def test_class_embeddings(released):
    # Several prompts of a class are averaged before the norm.
    assert relative(released.text(), released.rest["zs/text_embedding"]) < 1e-5


def test_windows(released):
    images = sorted(key for key in released.inputs.files if key.startswith("seg_image"))
    assert images
    for key in images:
        name = key.replace("_image", "")
        image = released.inputs[key].transpose(0, 2, 3, 1)
        soft, p = released.encode(image)
        flat = soft.reshape(1, -1, soft.shape[-1]).transpose(0, 2, 1)
        assert relative(flat[:, None], released.seg[f"{name}/soft_assign"]) < 1e-5
        assert relative(p[0], released.seg[f"{name}/group_affinity_final"]) < 1e-5
        size = image.shape[1:3]
        geometry = {"window": size, "corners": ((0, 0),), "resized": size, "size": size}
        for rule, threshold in (("nobg", None), ("bg", released.meta["bg_thresh_used"])):
            labels = released.labels(soft, p, threshold, **geometry)
            margin = released.seg[f"{name}/argmax_margin"]
            same_labels(labels, released.seg[f"{name}/{rule}/seg_pred_whole"], margin)


def test_sliding_windows(released):
    slide = released.sizes["slide"]
    (side, across), (stride, _) = slide["crop"], slide["stride"]
    assert side == across
    image = released.inputs["slide_image"][0].transpose(1, 2, 0)
    corners = tuple(windows.window_grid(*image.shape[:2], side, stride))
    assert len(corners) > 1
    parts = np.stack([image[top : top + side, left : left + side] for top, left in corners])
    soft, p = released.encode(parts)
    geometry = {
        "window": parts.shape[1:3],
        "corners": corners,
        "resized": image.shape[:2],
        "size": tuple(slide["ori"]),
    }
    for rule, threshold in (("nobg", None), ("bg", released.meta["bg_thresh_used"])):
        labels = released.labels(soft, p, threshold, **geometry)
        margin = released.seg[f"slide/{rule}/argmax_margin"]
        same_labels(labels, released.seg[f"slide/{rule}/seg_pred"], margin)
