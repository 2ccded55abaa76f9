"""One group for each pixel: the released code's label maps, and plain NumPy on windows."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference import one_group as reference

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import labels as labels_module
from ovseg_jax.segmentation import readout, windows
from ovseg_jax.segmentation.calibrate import calibrated
from ovseg_jax.segmentation.evaluate import evaluate
from ovseg_jax.segmentation.labels import class_probabilities, label_maps
from ovseg_jax.segmentation.metric import ConfusionMatrix
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import image_scores, with_scale

RELEASED = Path(__file__).parents[1] / "released"
K, C, E, PATCH = 5, 7, 6, 4
PROTOCOL = Protocol(
    short_side=24,
    long_limit=64,
    window=24,
    stride=12,
    scale=12.0,
    threshold=0.5,
    grouping="one_group",
    image_classes=3,
    cap_threshold=True,
)


def relative(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


# ---- the released code's windows


def released_windows():
    for name in ("dev", "dev2"):
        for key in np.load(RELEASED / f"{name}_seg.npz").files:
            if key.endswith("/soft_assign"):
                yield name, key.partition("/")[0]


@pytest.fixture(scope="module", params=list(released_windows()), ids="_".join)
def released(request):
    """One window as the released model saw it, in the form that our functions take."""
    name, image = request.param
    arrays, rest = (np.load(RELEASED / f"{name}_{part}.npz") for part in ("seg", "eval_rest"))
    stage = {
        key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(f"{image}/")
    }
    text = rest["zs/text_embedding"]
    soft = stage["soft_assign"][0].transpose(0, 2, 1)
    size = stage["argmax_margin"].shape
    soft = soft.reshape(1, *windows.grid_shape(*size, soft.shape[1], "rounded_patch"), -1)
    cosines = (
        readout.cosines(stage["image_feat"], text),
        readout.cosines(stage["image_x"][:, None], text)[:, 0],
    )
    threshold = json.loads((RELEASED / f"{name}_meta.json").read_text())["bg_thresh_used"]
    return stage, soft, size, cosines, float(rest["out/logit_scale_exp_clamped"]), threshold


def test_values_of_the_released_rule(released):
    # Within 1e-5 of the norm.
    stage, soft, size, cosines, scale, _ = released
    if "attn_map_upsampled" in stage:  # the largest one is not kept
        matrices = [
            windows.bilinear_weights(n, m) for n, m in zip(size, soft.shape[1:3], strict=True)
        ]
        assert relative(readout.spread(soft, *matrices)[0], stage["attn_map_upsampled"]) < 1e-5
    first = readout.group_probabilities(*cosines, scale, 0)[0]
    assert relative(first, stage["group_affinity_unmasked_softmax"]) < 1e-5
    both = readout.group_probabilities(*cosines, scale, 5)[0]
    assert relative(both, stage["group_affinity_final"]) < 1e-5
    assert relative(both / first, stage["group_affinity_top5_softmax"]) < 1e-5


@pytest.mark.parametrize("background", ["nobg", "bg", "bg_clipped"])
def test_label_maps_of_the_released_rule(released, background):
    # Equal wherever the two best groups of a pixel differ by 1e-5; at most 0.1 % of it does not.
    stage, soft, size, cosines, scale, used = released
    threshold = {"nobg": None, "bg": used, "bg_clipped": 2.0}[background]
    p = readout.group_probabilities(*cosines, scale, 5)
    labels = readout.label_image(
        soft,
        p,
        window=size,
        corners=((0, 0),),
        resized=size,
        size=size,
        threshold=threshold,
        cap=True,
        classes=np.arange(p.shape[-1]),
        band_floats=1 << 16,
    )
    clear = stage["argmax_margin"] > 1e-5
    assert clear.mean() >= 0.999
    np.testing.assert_array_equal(labels[clear], stage[f"{background}/seg_pred_whole"][clear])
    table = p if threshold is None else readout.with_background(p, threshold, True)
    logits = np.asarray(table)[0][np.asarray(readout.pixel_groups(soft, size))[0]]
    logits = logits.transpose(2, 0, 1)[:, clear]
    assert relative(logits, stage[f"{background}/pred_logits"][:, clear]) < 1e-5


@pytest.mark.parametrize("name", ["bg21", "ade_reduce_zero"])
def test_released_miou(name):
    arrays = np.load(RELEASED / "miou.npz")
    confusion = ConfusionMatrix.empty(int(arrays[f"{name}/num_classes"]))
    for index in range(4):
        truth, predicted = (arrays[f"{name}/{kind}{index}"] for kind in ("gt", "pred"))
        truth = truth.astype(np.int64)
        if arrays[f"{name}/reduce_zero_label"]:  # 0 is ignored, the others move down by one
            truth = np.where((truth == 0) | (truth == 255), 255, truth - 1)
        confusion.update(predicted, truth)
    # The reference divides in float32.
    np.testing.assert_allclose(confusion.iou(), arrays[f"{name}/iou"], rtol=1e-6)
    assert round(100 * confusion.miou(), 2) == pytest.approx(
        float(arrays[f"{name}/miou_rounded_percent"]), abs=1e-4
    )


# ---- whole images


class Random:
    """A segmenter whose maps are smooth random functions of the mean color of the patches."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.color, self.groups = rng.normal(size=(3, K)), rng.normal(size=(K, E))
        self.class_text = rng.normal(size=(C, E)).astype(np.float32)

    def encode(self, images):
        b, h, w, _ = images.shape
        h, w = h // PATCH, w // PATCH
        cells = images[:, : h * PATCH, : w * PATCH].reshape(b, h, PATCH, w, PATCH, 3)
        color = cells.mean((2, 4)).reshape(b, h * w, 3) / 64 - 2
        logits = np.exp(color @ self.color)
        groups = self.groups + color.mean(1)[:, :1, None]
        soft = (logits / logits.sum(-1, keepdims=True)).astype(np.float32)
        return soft, groups.astype(np.float32), groups.mean(1).astype(np.float32)

    def text(self, names, templates):
        return (self.class_text[: len(names)],) * 2

    def scale(self):
        return 12.0


def cosine(a, b):
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return a @ b.T


def by_the_book(image, protocol):
    size, segmenter = image.shape[:2], Random()
    resized = windows.resized_shape(*size, protocol.short_side, protocol.long_limit)
    image = windows.resize_image(image, *resized)
    corners = windows.window_grid(*resized, protocol.window, protocol.stride)
    parts = []
    for top, left in corners:
        part = image[top : top + protocol.window, left : left + protocol.window]
        soft, groups, embedding = (x[0].astype(np.float64) for x in segmenter.encode(part[None]))
        rows, columns = (side // PATCH for side in part.shape[:2])
        parts.append(
            reference.window_scores(
                soft.reshape(rows, columns, K),
                cosine(groups, segmenter.class_text.astype(np.float64)),
                cosine(embedding, segmenter.class_text.astype(np.float64)),
                part.shape[:2],
                protocol.scale,
                protocol.threshold,
                protocol.image_classes,
                protocol.cap_threshold,
            )
        )
    return reference.labels(parts, corners, resized, size)


SIZES = ((24, 24), (24, 40), (50, 24), (90, 130), (12, 200), (7, 5), (24, 40))


def pictures():
    for index, size in enumerate(SIZES):
        coarse = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        yield windows.resize_image(coarse, *size)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threshold": None},
        {"threshold": 0.2, "cap_threshold": False, "image_classes": 0},
        {"threshold": 2.0},
        {"image_classes": 20},
    ],
)
def test_any_sizes_against_plain_numpy(changes):
    protocol, segmenter = PROTOCOL.replace(**changes), Random()
    text = segmenter.text(range(C), ())
    scores = image_scores(segmenter.encode, text, pictures(), protocol, 4)
    found = {one.index: labels for one, labels in label_maps(scores, protocol, group=3)}
    seen = set()
    for index, image in enumerate(pictures()):
        labels, margin = by_the_book(image, protocol)
        clear = margin > 1e-5
        np.testing.assert_array_equal(found[index][clear], labels[clear])
        assert clear.mean() > 0.99
        seen |= set(labels.ravel())
    assert len(seen) > 2


def test_bands_change_nothing(monkeypatch):
    def run():
        segmenter = Random()
        text = segmenter.text(range(C), ())
        scored = image_scores(segmenter.encode, text, pictures(), PROTOCOL, 4)
        return [labels for _, labels in sorted_by_index(label_maps(scored, PROTOCOL))]

    def sorted_by_index(pairs):
        return sorted(pairs, key=lambda pair: pair[0].index)

    whole = run()
    monkeypatch.setattr(labels_module, "BAND_FLOATS", 9000)
    for a, b in zip(run(), whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_distractors_are_background():
    segmenter, protocol = Random(), PROTOCOL.replace(threshold=0.0)
    text = segmenter.text(range(C), ())

    def run(**options):
        scored = image_scores(segmenter.encode, text, pictures(), protocol, 4)
        return {one.index: labels for one, labels in label_maps(scored, protocol, **options)}

    few_of = (0, 1, 2, *[-1] * (C - 3))
    every, few = run(), run(word_to_class=few_of)
    for index, labels in every.items():
        np.testing.assert_array_equal(few[index], np.where(labels > 3, 0, labels))
    assert any((labels > 3).any() for labels in every.values())
    protocol = protocol.replace(threshold=None)
    with pytest.raises(UserError, match="background"):
        run(word_to_class=few_of)


def test_probabilities_of_each_group_of_each_window():
    segmenter = Random()
    image = next(iter(list(pictures())[1:]))
    text = segmenter.text(range(C), ())
    (one,) = image_scores(segmenter.encode, text, [image], PROTOCOL, 1)
    p = class_probabilities(one, PROTOCOL)
    assert p.shape == (3, K, C) and one.by_window().shape == (3, 6, 6, K)
    assert ((p > 0).sum(-1) == PROTOCOL.image_classes).all()
    soft = PROTOCOL.replace(grouping="soft_patches", image_classes=0, cap_threshold=False)
    (one,) = image_scores(segmenter.encode, text, [image], soft, 1)
    np.testing.assert_allclose(class_probabilities(one, soft).sum(-1), 1, rtol=1e-5)


def test_an_open_scale_is_the_models_own():
    segmenter = Random()
    assert with_scale(PROTOCOL.replace(scale=None), segmenter) == PROTOCOL
    assert with_scale(PROTOCOL.replace(scale=3.0), segmenter).scale == 3.0


class Painted:
    """A benchmark whose truth is what the rule itself says."""

    name, class_names, has_background, unseen = "painted", tuple("abcdefg"), True, ()

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        image = list(pictures())[index]
        return image, by_the_book(image, PROTOCOL)[0].astype(np.uint8)

    def describe(self):
        return {}


def test_evaluation_and_tuning_take_the_rule():
    open_scale = PROTOCOL.replace(scale=None)
    result = evaluate(Random(), Painted(), open_scale, batch_size=4)
    assert result["miou"] > 99.9 and result["protocol"]["scale"] == 12.0
    protocol, miou = calibrated(Random(), Painted(), PROTOCOL, 4)
    assert protocol == PROTOCOL and miou == result["miou"]


def test_benchmarks_have_their_own_thresholds():
    protocol = PROTOCOL.replace(thresholds={"painted": 0.3, "other": 0.7})
    result = evaluate(Random(), Painted(), protocol, batch_size=4)["protocol"]
    assert result["threshold"] == 0.3 and result["thresholds"] == {}
    assert protocol.for_benchmark("third").threshold == PROTOCOL.threshold
