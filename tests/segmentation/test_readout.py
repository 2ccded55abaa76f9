"""Windows, Eq. 1, the background and the released rule against plain NumPy and fixtures."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import readout
from ovseg_jax.segmentation.evaluate import count_pixels, iou_of, mean_iou
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.protocol import CHOICES, Protocol
from ovseg_jax.segmentation.scores import ImageScores
from ovseg_jax.segmentation.vocabulary import Vocabulary, competition

HERE = Path(__file__).parent
RELEASED = HERE.parent / "released"
B, K, E, C, GRID = 2, 4, 8, 5, (3, 6)


# ---- windows


@pytest.mark.parametrize(
    "h, w, expected",
    [
        (448, 448, (448, 448)),
        (375, 500, (448, 597)),  # 597.33
        (500, 333, (673, 448)),  # 672.67
        (300, 3000, (205, 2048)),  # the long side decides: 204.8
        (1, 5000, (16, 2048)),  # never narrower than a patch
    ],
)
def test_resized_shape(h, w, expected):
    assert readout.resized_shape(h, w, 448, 2048) == expected


def test_window_grid():
    assert readout.window_grid(448, 597, 448, 224) == [(0, 0), (0, 149)]
    assert readout.window_grid(448, 673, 448, 224) == [(0, 0), (0, 224), (0, 225)]
    assert readout.window_grid(205, 900, 448, 224) == [(0, 0), (0, 224), (0, 448), (0, 452)]


@given(st.integers(1, 700), st.integers(1, 300), st.integers(1, 300))
def test_windows_cover_an_axis(length, window, stride):
    stride = min(stride, window)
    starts = readout.window_starts(length, window, stride)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start and start + min(window, length) <= length
        covered[start : start + window] += 1
    assert covered.min() >= 1 and starts == sorted(set(starts))
    # mmsegmentation's count of windows.
    assert len(starts) == max(length - window + stride - 1, 0) // stride + 1


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 32))
def test_grid_shape_finds_the_grid(h, w, patch):
    grid = (h // patch, w // patch)
    if min(grid):
        assert readout.grid_shape(h, w, grid[0] * grid[1]) == grid
    with pytest.raises(UserError, match="7 patches"):
        readout.grid_shape(10, 10, 7)


def test_a_window_of_odd_size_under_the_released_rule():
    for h, w, patch in ((32, 35, 16), (16, 23, 8)):
        # The rounded patch is larger than the true one, and both grids hold four patches.
        length = (h // patch) * (w // patch)
        assert readout.grid_shape(h, w, length) == (2, 2)
        assert readout.grid_shape(h, w, length, "rounded_patch") == (1, 4)
        assert readout.grid_shape(w, h, length, "rounded_patch") == (4, 1)
    for h, w in ((448, 448), (205, 448), (64, 96)):
        grid = h // 16, w // 16
        assert readout.grid_shape(h, w, grid[0] * grid[1], "rounded_patch") == grid
    # 335 // 17 = 19 rows do not divide 400 patches: no grid at all, so the exact one.
    assert readout.grid_shape(335, 335, 400, "rounded_patch") == (20, 20)


def interpolate(values, pixels):
    """Half-pixel linear interpolation with repeated borders, one output at a time."""
    cells, out = len(values), []
    for i in range(pixels):
        x = min(max((i + 0.5) * cells / pixels - 0.5, 0), cells - 1)
        low = int(x)
        high = min(low + 1, cells - 1)
        out.append(values[low] * (1 - (x - low)) + values[high] * (x - low))
    return np.array(out)


@pytest.mark.parametrize("pixels, cells", [(10, 10), (140, 10), (7, 3), (3, 7), (5, 1), (1, 5)])
def test_bilinear_weights(pixels, cells):
    values = np.random.default_rng(0).random(cells).astype(np.float32)
    weights = readout.bilinear_weights(pixels, cells)
    np.testing.assert_allclose(weights @ values, interpolate(values, pixels), atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("original, resized", [(60, 60), (97, 60), (31, 60), (20, 20)])
def test_cell_weights_are_upsample_average_resize(original, resized):
    window, stride, cells = 24, 12, 3
    starts = readout.window_starts(resized, window, stride)
    length = min(window, resized)
    values = np.random.default_rng(1).random((len(starts), cells)).astype(np.float32)
    total, cover = np.zeros(resized), np.zeros(resized)
    for start, part in zip(starts, values, strict=True):
        total[start : start + length] += interpolate(part, length)
        cover[start : start + length] += 1
    expected = interpolate(total / cover, original)
    weights = readout.cell_weights(original, resized, window, stride, cells)
    np.testing.assert_allclose(weights @ values.ravel(), expected, atol=1e-5)


def test_four_pixels_to_the_bit_of_opencv():
    arrays = np.load(HERE / "opencv_resize.npz")
    for name in {key.partition("/")[0] for key in arrays.files}:
        image, resized = arrays[f"{name}/image"], arrays[f"{name}/resized"]
        found = readout.resize_image(image, *resized.shape[:2], "four_pixels")
        np.testing.assert_array_equal(found, resized)
        assert (readout.resize_image(image, *resized.shape[:2]) != resized).any()


# ---- Eq. 1


def test_class_scores():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(B, GRID[0] * GRID[1], K))
    affinity = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    arrays = affinity, 5 * rng.normal(size=(B, K, E)), rng.normal(size=(C, E))
    affinity, groups, text = (array.astype(np.float32) for array in arrays)
    scores = jax.jit(functools.partial(readout.class_scores, grid=GRID))(affinity, groups, text)
    units = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (groups, text))
    expected = np.einsum("blk,bke,ce->blc", affinity, *units).reshape(B, *GRID, C)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    # Lengths of groups and of text do not matter, and half precision comes out as f32.
    halves = readout.class_scores(jnp.bfloat16(affinity), jnp.bfloat16(2 * groups), 3 * text, GRID)
    assert halves.dtype == jnp.float32
    np.testing.assert_allclose(halves, scores, atol=2e-2)
    np.testing.assert_array_equal(readout.class_scores(affinity, 0 * groups, text, GRID), 0)


# ---- the background


@pytest.mark.parametrize("words", [2, 7, 48, 1000])
def test_the_threshold_follows_longer_lists(words):
    # As the definition has it: the others' exponentials weighted as if there were N - 1 of them.
    protocol = Protocol(threshold=0.3, competing_words=48)
    exponents = np.exp(np.random.default_rng(words).normal(size=(2000, words)) * 3)
    best, rest = exponents.max(-1), exponents.sum(-1) - exponents.max(-1)
    weight = 47 / (words - 1) if words > 48 else 1.0
    found = best / (best + rest) >= protocol.threshold_for(words)
    np.testing.assert_array_equal(found, best / (best + weight * rest) >= 0.3)
    assert Protocol(threshold=0.3).threshold_for(words) == 0.3
    assert protocol.replace(threshold=None).threshold_for(words) is None


def one_window(cells, size, image_cosines):
    """The scores of an image of a single window."""
    return ImageScores(
        index=0,
        cells=cells,
        groups=np.zeros(cells.shape[:2], np.int32),
        embeddings=np.asarray([[1.0, 0.0]], np.float32),
        group_cosines=np.zeros((1, 3, cells.shape[2]), np.float32),
        image_cosines=np.asarray([image_cosines], np.float32),
        size=size,
        resized=size,
        tiles=(1, 1),
        window=max(size),
        stride=max(size),
        foreground=np.zeros((1, 1, 1), np.float32),
    )


@pytest.mark.parametrize("image_scale", [0.0, 3.0])
@pytest.mark.parametrize("order", CHOICES["order"])
def test_as_much_is_found_in_lists_of_any_length(image_scale, order):
    # A class that a third of the pixels show; all other words say nothing.
    rng = np.random.default_rng(0)
    cells = rng.normal(scale=0.1, size=(24, 24, 1000)).astype(np.float32)
    cells[8:16, :, 0] += 0.5
    image = rng.normal(scale=0.05, size=1000).astype(np.float32)
    image[0] += 0.2
    fields = {"scale": 10.0, "threshold": 0.3, "competing_words": 48}
    protocol = Protocol(**fields, image_scale=image_scale, order=order)
    shares = []
    for classes in (1, 7, 48, 1000):
        names = ["zebra", *(f"class {i}" for i in range(1, classes))]
        words = competition(Vocabulary.of(names), protocol)
        count = len(words.words)
        assert count == max(classes, 48)
        one = one_window(cells[..., :count], (24, 24), image[:count])
        ((_, labels),) = label_maps([one], protocol, words.word_to_class)
        shares.append((labels == 1).mean())
    assert max(shares) - min(shares) < 0.03 and 0.28 < shares[0] < 0.34


def test_what_resembles_the_border_is_surroundings():
    subject = np.zeros((8, 10), bool)
    subject[2:-2, 3:-2] = True
    keys = np.where(subject[..., None], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    keys = (keys + np.random.default_rng(0).normal(0, 0.2, keys.shape)).astype(np.float32)
    found = np.asarray(readout.foreground_log(keys, 2.0))
    assert (found <= 0).all()
    np.testing.assert_array_equal(found > -1, subject)
    # The same in a mirror, of keys of any length, and in proportion to the scale.
    mirrored = np.asarray(readout.foreground_log(keys[:, ::-1] * 3, 4.0))[:, ::-1]
    np.testing.assert_allclose(mirrored, 2 * found, atol=1e-5)
    # An image without contrast is surroundings all over.
    for size in ((1, 1), (1, 5), (4, 4)):
        keys = np.ones((*size, 3), np.float32)
        np.testing.assert_allclose(readout.foreground_log(keys, 3.0), -3.0, atol=1e-5)


# ---- the released code's windows


def relative(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


RELEASED_WINDOWS = [
    (name, key.partition("/")[0])
    for name in ("dev", "dev2")
    for key in np.load(RELEASED / f"{name}_seg.npz").files
    if key.endswith("/soft_assign")
]


@pytest.fixture(scope="module", params=RELEASED_WINDOWS, ids="_".join)
def released(request):
    """One window as the released model saw it, in the form that our functions take."""
    name, image = request.param
    arrays, rest = (np.load(RELEASED / f"{name}_{part}.npz") for part in ("seg", "eval_rest"))
    parts = (key.partition("/") for key in arrays.files)
    stage = {key: arrays[f"{of}/{key}"] for of, _, key in parts if of == image}
    text = rest["zs/text_embedding"]
    soft, size = stage["soft_assign"][0].transpose(0, 2, 1), stage["argmax_margin"].shape
    soft = soft.reshape(1, *readout.grid_shape(*size, soft.shape[1], "rounded_patch"), -1)
    groups = readout.cosines(stage["image_feat"], text)
    whole = readout.cosines(stage["image_x"][:, None], text)[:, 0]
    scale = float(rest["out/logit_scale_exp_clamped"])
    threshold = json.loads((RELEASED / f"{name}_meta.json").read_text())["bg_thresh_used"]
    return stage, soft, size, (groups, whole, scale), threshold


def test_values_of_the_released_rule(released):
    stage, soft, size, cosines, _ = released
    if "attn_map_upsampled" in stage:  # the largest one is not kept
        sides = zip(size, soft.shape[1:3], strict=True)
        matrices = [readout.bilinear_weights(n, m) for n, m in sides]
        assert relative(readout.spread(soft, *matrices)[0], stage["attn_map_upsampled"]) < 1e-5
    first, both = (readout.group_probabilities(*cosines, kept)[0] for kept in (0, 5))
    assert relative(first, stage["group_affinity_unmasked_softmax"]) < 1e-5
    assert relative(both, stage["group_affinity_final"]) < 1e-5
    assert relative(both / first, stage["group_affinity_top5_softmax"]) < 1e-5


@pytest.mark.parametrize("background", ["nobg", "bg", "bg_clipped"])
def test_label_maps_of_the_released_rule(released, background):
    # Equal wherever the two best groups of a pixel differ by 1e-5; at most 0.1 % of it does not.
    stage, soft, size, cosines, used = released
    threshold = {"nobg": None, "bg": used, "bg_clipped": 2.0}[background]
    p = readout.group_probabilities(*cosines, 5)
    geometry = {"window": size, "corners": ((0, 0),), "resized": size, "size": size}
    options = {"threshold": threshold, "cap": True, "band_floats": 1 << 16}
    labels = readout.label_image(soft, p, classes=np.arange(p.shape[-1]), **geometry, **options)
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
    confusion, labels = 0, int(arrays[f"{name}/num_classes"])
    for index in range(4):
        truth, predicted = (arrays[f"{name}/{kind}{index}"] for kind in ("gt", "pred"))
        truth = truth.astype(np.int64)
        if arrays[f"{name}/reduce_zero_label"]:  # 0 is ignored, the others move down by one
            truth = np.where((truth == 0) | (truth == 255), 255, truth - 1)
        confusion += count_pixels(predicted, truth, labels)
    # The reference divides in float32.
    np.testing.assert_allclose(iou_of(confusion), arrays[f"{name}/iou"], rtol=1e-6)
    rounded = float(arrays[f"{name}/miou_rounded_percent"])
    assert round(100 * mean_iou(confusion), 2) == pytest.approx(rounded, abs=1e-4)
