"""From images to results: windows, batches, labels, measures, with segmenters that are exact."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.segmentation import evaluate as evaluation
from ovseg_jax.segmentation import labels as labels_module
from ovseg_jax.segmentation import windows
from ovseg_jax.segmentation.benchmarks import ScenesBenchmark, make_benchmark
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.metric import ConfusionMatrix
from ovseg_jax.segmentation.protocol import Protocol, named_protocol, names_hash
from ovseg_jax.segmentation.scores import image_scores
from ovseg_jax.segmentation.segmenter import ModelSegmenter
from ovseg_jax.train.config import load_config

PATCH, C = 4, 3
PROTOCOL = Protocol(short_side=24, long_limit=64, window=24, stride=12, scale=30.0, threshold=0.617)


class ByColor:
    """A segmenter whose group of a patch is its strongest channel, and whose classes are these."""

    def __init__(self, batch_size, keys=False):
        self.batch_size, self.keys, self.calls = batch_size, keys, []

    def encode(self, images):
        assert images.dtype == np.uint8 and len(images) == self.batch_size
        self.calls.append(images.shape)
        b, h, w, _ = images.shape
        h, w = h // PATCH, w // PATCH
        cells = images[:, : h * PATCH, : w * PATCH].reshape(b, h, PATCH, w, PATCH, 3)
        color = cells.mean((2, 4)).reshape(b, h * w, 3)
        # Four groups: the three channels, and dark.
        strength = np.concatenate([color, np.full((b, h * w, 1), 60.0)], -1)
        affinity = np.eye(4, dtype=np.float32)[strength.argmax(-1)]
        groups = np.concatenate([np.eye(3), np.zeros((1, 3))]).astype(np.float32)
        encoded = affinity, np.tile(groups, (b, 1, 1)), color.mean(1).astype(np.float32)
        return (*encoded, color.astype(np.float32)) if self.keys else encoded

    def text(self, names, templates):
        assert templates == PROTOCOL.templates
        return (np.eye(len(names), dtype=np.float32),) * 2


@dataclass
class Blocks:
    """Images of colored blocks on a dark ground; labels agree with the patches exactly."""

    sizes: tuple
    has_background: bool = True
    name = "blocks"
    class_names = ("red", "green", "blue")
    unseen = (2,)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        rng = np.random.default_rng([7, index])
        h, w = self.sizes[index]
        first = 0 if self.has_background else 1
        labels = rng.integers(first, C + 1, (-(-h // 12), -(-w // 12)))
        labels = labels.repeat(12, 0).repeat(12, 1)[:h, :w]
        table = np.array([(20, 20, 20), (220, 30, 30), (30, 220, 30), (30, 30, 220)], np.uint8)
        return table[labels], (labels - first).astype(np.uint8)

    def describe(self):
        return {"images": len(self)}


def run(benchmark, protocol=PROTOCOL, batch_size=4, **options):
    segmenter = ByColor(batch_size)
    result = evaluation.evaluate(segmenter, benchmark, protocol, batch_size=batch_size, **options)
    return result, segmenter


def test_a_perfect_segmenter_scores_100():
    # Votes by patch, since blocks are whole patches; seven images leave a padded last batch.
    result, segmenter = run(Blocks(((24, 24),) * 7), PROTOCOL.replace(order="argmax_first"))
    assert segmenter.calls == [(4, 24, 24, 3)] * 2
    assert result["miou"] == result["pixel_accuracy"] == result["miou_unseen"] == 100.0
    assert result["iou"] == dict.fromkeys(("background", "red", "green", "blue"), 100.0)
    assert result["images"] == 7 and result["images_per_second"] > 0


def test_the_rate_leaves_out_images_that_were_begun_before(monkeypatch):
    """What is in work when the first image is done has had its share of the time already."""
    now = [0.0]
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: now[0])

    def rate(images, ahead=1, first=10.0, each=2.0):
        now[0] = 0.0
        clock = evaluation._Clock()
        for _ in range(min(1 + ahead, images)):
            clock.begin()
        now[0] = first
        for done in range(1, images + 1):
            clock.tick(done)
            if clock.begun < images:
                clock.begin()
            now[0] += each
        return clock.rate()

    # 0.5 images a second, after a start of ten seconds; with two images, both were in it.
    assert rate(2) == pytest.approx(2 / 12)
    assert rate(100) == pytest.approx(0.5, rel=0.02)
    assert rate(1) == pytest.approx(1 / 10)
    assert evaluation._Clock().rate() == 0.0


def test_without_background():
    benchmark = Blocks(((24, 24),) * 3, has_background=False)
    result, _ = run(benchmark, PROTOCOL.replace(order="argmax_first"))
    assert result["miou"] == 100.0 and "background" not in result["iou"]
    assert result["protocol"]["threshold"] is None and "all_background_miou" not in result
    with pytest.raises(UserError, match="threshold"):
        run(Blocks(((24, 24),)), PROTOCOL.replace(threshold=None))


def plain_labels(image, protocol):
    """The same by the book: windows, upsampled one by one, averaged, resized, thresholded."""
    size = image.shape[:2]
    resized = windows.resized_shape(*size, protocol.short_side, protocol.long_limit)
    image = windows.resize_image(image, *resized)
    total, cover = np.zeros((*resized, C)), np.zeros((*resized, 1))
    corners = windows.window_grid(*resized, protocol.window, protocol.stride)
    parts = [image[y : y + protocol.window, x : x + protocol.window] for y, x in corners]
    encoded = [ByColor(1, keys=True).encode(part[None]) for part in parts]
    whole = [embedding[0] for _, _, embedding, _ in encoded]
    whole = np.mean([embedding / np.linalg.norm(embedding) for embedding in whole], axis=0)
    image_cosine = whole / np.linalg.norm(whole)
    likeness = plain_likeness(corners, [keys[0] for *_, keys in encoded], parts[0].shape)
    for (top, left), part, (affinity, groups, *_) in zip(corners, parts, encoded, strict=True):
        h, w = part.shape[0] // PATCH, part.shape[1] // PATCH
        cosine = (affinity[0] @ groups[0]).reshape(h, w, C)
        p = np.exp(protocol.scale * cosine)
        p /= p.sum(-1, keepdims=True)
        p *= np.exp(protocol.image_scale * (image_cosine - image_cosine.max()))
        if protocol.border_scale:
            p *= np.exp(-protocol.border_scale * likeness[top, left])[..., None]
        place = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
        total[place] += upsample(p, part.shape[:2])
        cover[place] += 1
    p = upsample(total / cover, size)
    best, margin = p.argmax(-1), np.abs(p.max(-1) - protocol.threshold)
    return np.where(p.max(-1) < protocol.threshold, 0, best + 1), margin


def plain_likeness(corners, keys, shape):
    """How much each cell resembles the border of the image, 0 to 1, by window corner."""
    h, w = shape[0] // PATCH, shape[1] // PATCH
    tops, lefts = ([*dict.fromkeys(c[axis] for c in corners)] for axis in (0, 1))
    # At the image's border lie the outer cells of the outer windows.
    cells, border = {}, []
    for (top, left), key in zip(corners, keys, strict=True):
        key = (key / np.linalg.norm(key, axis=-1, keepdims=True)).reshape(h, w, -1)
        cells[top, left] = key
        for i, j in itertools.product(range(h), range(w)):
            rows = (top == tops[0] and i == 0) or (top == tops[-1] and i == h - 1)
            columns = (left == lefts[0] and j == 0) or (left == lefts[-1] and j == w - 1)
            if rows or columns:
                border.append(key[i, j])
    mean = np.mean(border, axis=0)
    mean /= np.linalg.norm(mean)
    return {corner: np.maximum(key @ mean, 0) for corner, key in cells.items()}


def upsample(maps, size):
    rows, columns = (windows.bilinear_weights(n, m) for n, m in zip(size, maps.shape, strict=False))
    return np.einsum("Hh,hwc,Ww->HWc", rows, maps, columns)


SIZES = ((24, 24), (24, 40), (50, 24), (90, 130), (24, 24), (12, 200), (7, 5), (24, 40))


@pytest.mark.parametrize(
    "band_floats, image_scale, border_scale",
    [(labels_module.BAND_FLOATS, 0, 0), (2000, 2.0, 0), (2000, 2.0, 1.5)],
)
def test_any_sizes_in_shared_batches_and_in_bands(
    monkeypatch, band_floats, image_scale, border_scale
):
    protocol = PROTOCOL.replace(image_scale=float(image_scale), border_scale=float(border_scale))
    monkeypatch.setattr(labels_module, "BAND_FLOATS", band_floats)
    benchmark, segmenter = Blocks(SIZES), ByColor(4, keys=border_scale > 0)
    text = segmenter.text(benchmark.class_names, PROTOCOL.templates)
    images = [benchmark[i][0] for i in range(len(SIZES))]
    scores = image_scores(segmenter.encode, text, images, protocol, 4)
    found = {one.index: labels for one, labels in label_maps(scores, protocol, group=3)}
    assert sorted(found) == list(range(len(SIZES)))
    for index, image in enumerate(images):
        labels, margin = plain_labels(image, protocol)
        assert found[index].shape == image.shape[:2]
        clear = margin > 1e-5
        np.testing.assert_array_equal(found[index][clear], labels[clear])
        assert clear.mean() > 0.99


@pytest.mark.parametrize("order", ["argmax_first", "upsample_first"])
@pytest.mark.parametrize("band_floats", [labels_module.BAND_FLOATS, 2000])
def test_a_capped_threshold_leaves_the_best_pixels(monkeypatch, order, band_floats):
    monkeypatch.setattr(labels_module, "BAND_FLOATS", band_floats)
    capped = PROTOCOL.replace(order=order, scale=1.0, threshold=0.9, cap_threshold=True)
    images = [Blocks(((24, 40), (130, 90)))[i][0] for i in range(2)]
    segmenter = ByColor(1)
    text = segmenter.text(["a", "b", "c"], PROTOCOL.templates)
    for image in images:
        (scores,) = image_scores(segmenter.encode, text, [image], capped, 1)
        ((_, plain),) = label_maps([scores], capped.replace(cap_threshold=False))
        ((_, labels),) = label_maps([scores], capped)
        ((_, best),) = label_maps([scores], capped.replace(threshold=0.0))
        assert not plain.any() and labels.any()
        np.testing.assert_array_equal(labels[labels > 0], best[labels > 0])
        # A threshold that some pixel reaches is left alone.
        low = capped.replace(threshold=0.4)
        pairs = [label_maps([scores], low.replace(cap_threshold=cap)) for cap in (True, False)]
        ((_, with_cap),), ((_, without),) = pairs
        np.testing.assert_array_equal(with_cap, without)


def test_an_untrained_vitb_finds_something_under_the_paper_protocol():
    config = load_config(Path(__file__).parents[2] / "configs" / "vitb.py")
    config.model.image.update(width=16, heads=2, first_layers=1, second_layers=1, grid=(4, 4))
    config.model.text.update(vocab_size=300, width=16, depth=1, heads=2, mlp_width=16)
    config.model.decoder.update(width=16, heads=2)
    config.model.update(joint_width=8, image_init="", text_init="")
    config.eval.protocol.update(short_side=64, window=64, stride=32)
    protocol = Protocol.from_config(config.eval.protocol.to_dict())
    named = named_protocol("paper")
    assert (named.scale, named.cap_threshold) == (protocol.scale, True) == (None, True)
    model = build_model(config.model)
    image, ids = np.zeros((1, 64, 64, 3), np.uint8), np.ones((1, 4), np.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), image, ids))["params"]

    class Words(Tokenizer):
        def __init__(self):
            pass

        def encode(self, texts, length):
            return 1 + np.arange(len(texts) * length).reshape(-1, length).astype(np.int32) % 299

    segmenter = ModelSegmenter(model, params, Words(), text_length=4, protocol=protocol)
    benchmark = Blocks(((64, 96), (80, 64)))
    result = evaluation.evaluate(segmenter, benchmark, protocol, batch_size=2)
    predicted = np.array(result["confusion"]).sum(0)
    assert predicted[1:].sum() > 0
    assert result["protocol"]["scale"] == pytest.approx(1 / 0.07)


class SplitByWindow(ByColor):
    """Every patch is undecided; the embedding of a window is that of its brightest channel."""

    def encode(self, images):
        affinity, groups, _ = super().encode(images)
        brightest = np.eye(C, dtype=np.float32)[images.mean((1, 2)).argmax(-1)]
        return np.full_like(affinity, 1 / affinity.shape[-1]), groups, brightest


def test_evidence_about_the_image_leaves_no_seam_between_windows():
    # Two windows that do not overlap look like two classes, and no patch prefers any class: what
    # the image as a whole looks like must decide alike on both sides of the border.
    protocol = PROTOCOL.replace(
        long_limit=96, stride=PROTOCOL.window, image_scale=5.0, threshold=0.0
    )
    side = protocol.window
    image = np.zeros((side, 3 * side, 3), np.uint8)
    image[:, :side, 0] = image[:, side:, 1] = 200
    segmenter = SplitByWindow(1)
    text = segmenter.text(["a", "b", "c"], PROTOCOL.templates)
    scores = image_scores(segmenter.encode, text, [image], protocol, 1)
    ((one, labels),) = label_maps(scores, protocol)
    assert one.tiles == (1, 3)
    np.testing.assert_array_equal(labels, 2)


def test_the_result_does_not_depend_on_the_batch_size():
    benchmark = Blocks(SIZES)
    results = [run(benchmark, batch_size=size)[0] for size in (1, 3, 16)]
    for result in results[1:]:
        assert result["iou"] == results[0]["iou"]
    assert 40 < results[0]["miou"] < 100


def test_scores_of_one_image():
    segmenter, text = ByColor(2), (np.eye(3, dtype=np.float32),) * 2
    image, truth = Blocks(((24, 40),))[0]
    (scores,) = image_scores(segmenter.encode, text, [image], PROTOCOL, 2)
    assert (scores.tiles, scores.cells.shape) == ((1, 3), (6, 18, 3))  # starts 0, 12, 16
    np.testing.assert_allclose(np.linalg.norm(scores.embeddings, axis=1), 1, rtol=1e-6)
    assert scores.embeddings.shape == (3, 3)
    group_of_label = np.array([3, 0, 1, 2])
    (whole,) = image_scores(ByColor(1).encode, text, [image[:, :24]], PROTOCOL, 1)
    np.testing.assert_array_equal(whole.group_map(), group_of_label[truth[:, :24]])


def test_progress_and_file(tmp_path):
    steps = []
    benchmark = Blocks(((24, 24),) * 6)
    result, _ = run(benchmark, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(4, 6), (6, 6)]
    path = tmp_path / "results" / "blocks.json"
    evaluation.write_result(path, result)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["blocks.json"]
    protocol = result["protocol"]
    assert protocol["class_names_hash"] == names_hash(("red", "green", "blue"))
    assert protocol["scale"] == 30.0 and protocol["classes"] == 3 and protocol["background"]


def test_summary_of_what_is_not_there_is_none():
    benchmark = Blocks(((24, 24),))
    result = evaluation.summary(ConfusionMatrix.empty(4), benchmark)
    assert result["miou"] is None and result["iou"]["red"] is None


def test_all_background_baseline():
    benchmark = Blocks(((24, 24),) * 4)
    truth = np.stack([benchmark[i][1] for i in range(4)])
    result, _ = run(benchmark)
    present = len(np.unique(truth))
    expected = 100 * (truth == 0).mean() / present
    assert result["all_background_miou"] == pytest.approx(expected, abs=1e-3)


def test_protocol_round_trip_and_mistakes():
    protocol = Protocol(scale=20.0, threshold=0.3, templates=("{}", "a {}."))
    assert Protocol.from_config(json.loads(json.dumps(protocol.as_dict()))) == protocol
    assert Protocol.from_config({"scale": 20}) == Protocol(scale=20.0)
    assert protocol.replace(threshold=0.4).threshold == 0.4
    assert names_hash(("a", "b")) != names_hash(("b", "a"))
    for wrong, said in (
        ({"strid": 3}, "unknown strid"),
        ({"order": "x"}, "upsample_first"),
        ({"window": 0}, "window"),
        ({"affinity": "x"}, "affinity"),
        ({"templates": ["a photo"]}, "template"),
    ):
        with pytest.raises(UserError, match=said):
            Protocol.from_config(wrong)


# ---- benchmarks


def test_scenes_benchmark():
    benchmark = make_benchmark("scenes", {"split": "tune", "count": 2, "seed": 3, "size": 42})
    assert isinstance(benchmark, ScenesBenchmark) and len(benchmark) == 2
    image, labels = benchmark[1]
    assert image.shape == (42, 42, 3) and labels.shape == (42, 42)
    assert image.dtype == labels.dtype == np.uint8
    assert 0 < labels.max() <= len(benchmark.class_names)
    assert 0 < len(benchmark.unseen) < len(benchmark.class_names)
    assert len(list(benchmark)) == 2
    assert benchmark.describe()["seed"] == 3


def test_unknown_benchmarks_and_fields():
    with pytest.raises(UserError, match="did you mean 'scenes'.*there are: scenes"):
        make_benchmark("scene")
    with pytest.raises(UserError, match="sise"):
        make_benchmark("scenes", {"sise": 3})
    with pytest.raises(UserError, match="split 'val'"):
        make_benchmark("scenes", {"split": "val"})
    with pytest.raises(UserError, match="count"):
        make_benchmark("scenes", {"count": 0})
