"""ovseg_jax.load: what people call."""

import collections
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ovseg_jax
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.api import _check_options
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import read_image
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ModelSegmenter, image_scores
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.weights.model_dir import load_model

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def model(directory):
    return ovseg_jax.load(str(directory))


def test_labels_and_scores_are_those_of_the_pieces(directory, model):
    found = model.segment(PIXELS, ["cat", "dog"])
    saved = load_model(directory)
    protocol = Protocol.from_config(saved.info["protocol"])
    segmenter = ModelSegmenter.of_saved(saved, protocol)
    # "cat" and "dog" are themselves on the list of everyday words.
    words = ["cat", "dog", "sky", "person", "grass", "wall", "car", "tree", "floor"]
    scored = image_scores(segmenter, Vocabulary.of(words), [PIXELS], protocol, 8)
    ((one, labels),) = label_maps(scored, protocol, (0, 1, *[-1] * 7))
    np.testing.assert_array_equal(found.labels, labels)
    assert found.labels.shape == (40, 56) and found.classes == ("cat", "dog")
    assert len(np.unique(labels)) > 1
    exponents = np.exp(20.0 * one.cells.astype(np.float64))
    p = exponents / exponents.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.scores, p.max((0, 1))[:2], rtol=1e-4)
    np.testing.assert_allclose(found.areas, [(labels == 1).mean(), (labels == 2).mean()])


def test_the_affinity_of_features(directory, model):
    """Eq. 1 in the paper's words: softmax over the groups of patch features times groups."""
    saved, images = load_model(directory), np.stack([PIXELS[:32, :32]] * 8)
    segmenter = ModelSegmenter.of_saved(saved, model.protocol.replace(affinity="features"))
    tokens = saved.model.apply(segmenter.variables, jnp.asarray(images), method="visual_tokens")
    patches, groups = np.float64(tokens.patches), np.float64(tokens.groups)
    expected = np.exp(patches @ groups.swapaxes(1, 2) / np.sqrt(patches.shape[-1]))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(segmenter.encode(images)[0], expected, rtol=1e-4)


def test_background_threshold_and_words(model):
    without = model.segment(PIXELS, ["cat", "dog"], background=False)
    assert set(np.unique(without.labels)) <= {1, 2}
    assert not model.segment(PIXELS, ["cat", "dog"], threshold=1.0).labels.any()
    # Two words that compete alone, and no threshold: nothing is left for the background.
    alone = model.segment(PIXELS, ["cat", "dog"], threshold=0.0, words=2)
    np.testing.assert_array_equal(alone.labels, without.labels)


def test_every_kind_of_image_is_the_same_image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    with Image.open(path) as opened:
        for image in (path, str(path), path.read_bytes(), opened, jnp.asarray(PIXELS)):
            np.testing.assert_array_equal(read_image(image), PIXELS)
    gray = np.ascontiguousarray(PIXELS[..., 0])
    np.testing.assert_array_equal(read_image(gray), np.stack([gray] * 3, -1))
    turned = Image.fromarray(PIXELS)
    turned.getexif()[0x0112] = 6  # to be turned by a quarter
    assert read_image(turned).shape == (56, 40, 3)


def test_many_images_each_with_its_number(model):
    images = [PIXELS, PIXELS[:, ::-1], PIXELS[:33, :33], PIXELS]
    found = dict(model.segment_each(images, ["cat", "dog"], batch_size=2))
    assert sorted(found) == [0, 1, 2, 3]
    for index, image in enumerate(images):
        alone = model.segment(image, ["cat", "dog"])
        assert found[index].labels.shape == image.shape[:2]
        np.testing.assert_allclose(found[index].scores, alone.scores, rtol=1e-4)


def test_lists_stacks_and_jax_arrays(model):
    stack = np.stack([PIXELS, PIXELS[::-1]])
    alone = [model.segment(image, ["cat", "dog"]) for image in stack]
    classes = ("cat", "dog"), np.array(["cat", "dog"]), collections.deque(["cat", "dog"])
    many = collections.deque(stack), stack, jax.numpy.asarray(stack)
    for images, names in zip(many, classes, strict=True):
        for one, other in zip(model.segment(images, names), alone, strict=True):
            np.testing.assert_array_equal(one.labels, other.labels)
            np.testing.assert_array_equal(one.groups, other.groups)
    assert alone[0].groups.shape == (40, 56) and alone[0].groups.max() < 4 * 6


def test_synonyms_and_words_for_the_background(model):
    words = model.segment(PIXELS, ["cat", "dog", "sky"], threshold=0.0, words=3)
    joined = model.segment(PIXELS, ["cat|dog", "sky"], threshold=0.0, words=3)
    np.testing.assert_array_equal(joined.labels, np.array([0, 1, 1, 2])[words.labels])
    np.testing.assert_array_equal(joined.scores, [words.scores[:2].max(), words.scores[2]])
    assert joined.classes == ("cat", "sky")
    behind = model.segment(PIXELS, ["cat", "dog"], background=["sky"])
    np.testing.assert_array_equal(behind.labels, np.array([0, 1, 2, 0])[words.labels])


def test_embeddings(directory, model):
    saved = load_model(directory)
    segmenter = ModelSegmenter.of_saved(saved, model.protocol)
    square = np.ascontiguousarray(PIXELS[:32, :32])
    whole = np.asarray(segmenter.encode(np.stack([square] * 8))[2])[0]
    found = model.embed_image([square, PIXELS])
    assert found.shape == (2, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], whole / np.linalg.norm(whole), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.embed_image(square)[0], found[0], rtol=1e-5, atol=1e-6)
    text = model.embed_text(["cat", "dog"])
    np.testing.assert_allclose(text, segmenter.text(["cat", "dog"], model.protocol.templates)[1])
    other = model.embed_text(["cat"], ["a {}", "{}"])
    assert other.shape == (1, 8) and not np.allclose(other[0], text[0])


def test_any_size_and_aspect(model):
    rng = np.random.default_rng(4)
    found = model.segment(PIXELS, [f"cat {i}" for i in range(500)])
    assert found.scores.shape == (500,)
    for h, w in ((1, 1), (16, 900), (900, 16), (700, 500)):
        image = rng.integers(0, 256, (h, w, 3), np.uint8)
        found = model.segment(image, ["cat", "dog"])
        assert found.labels.shape == found.groups.shape == (h, w)


def test_names_that_the_text_encoder_cannot_tell_apart(model, caplog):
    long = " ".join(["cat"] * 9)
    model.segment(PIXELS, ["cat", "CÁT", "\N{HORSE FACE}", "\N{THAI CHARACTER KO KAI}", long])
    said = caplog.messages
    assert any("are unknown" in line and "\N{HORSE FACE}" in line for line in said)
    assert any("cat = CÁT" in line for line in said)
    assert any("are cut after 8 tokens" in line and long in line for line in said)


def truncated():
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return Image.open(io.BytesIO(stream.getvalue()[:2000]))


BAD = {
    "not one text": lambda m, p: m.segment(PIXELS, "cat"),
    "background is a list": lambda m, p: m.segment(PIXELS, ["cat"], background="sky"),
    "batch_size is -1": lambda m, p: m.segment(PIXELS, ["cat"], batch_size=-1),
    "at least one text": lambda m, p: m.embed_text([]),
    "each with {}": lambda m, p: m.embed_text(["cat"], ["a cat"]),
    "not float64": lambda m, p: m.segment(PIXELS / 255, ["cat"]),
    r"\[3, 40, 56\]": lambda m, p: m.segment(PIXELS.transpose(2, 0, 1), ["cat"]),
    "no images": lambda m, p: m.embed_image([]),
    "no images: give": lambda m, p: m.segment([], ["cat"]),
    "not a set": lambda m, p: m.segment(PIXELS, {"cat", "dog"}),
    "not a generator": lambda m, p: m.segment(PIXELS, (name for name in ["cat"])),
    "not a dict": lambda m, p: m.segment(PIXELS, ["cat"], background={"sky": 1}),
    "images is a list, not a generator": lambda m, p: m.segment((x for x in [PIXELS]), ["cat"]),
    "the PIL image cannot be read": lambda m, p: m.segment(truncated(), ["cat"]),
    "none of them empty": lambda m, p: m.embed_text(["cat", " "]),
    "a least probability": lambda m, p: _check_options(0.4, None, 0),
    "threshold is a probability": lambda m, p: _check_options(True, "0.5", 0),
    "not nan": lambda m, p: m.segment(PIXELS, ["cat"], threshold=float("nan")),
    "not 2": lambda m, p: _check_options(True, 2, 0),
    "not True": lambda m, p: _check_options(True, True, 0),
    "words is True": lambda m, p: _check_options(True, None, True),
    "no text in UTF-8": lambda m, p: m.segment(PIXELS, ["caf\udce9"]),
    "words is -3": lambda m, p: m.segment(PIXELS, ["cat"], words=-3),
    "scale cannot be 'x'": lambda m, p: ovseg_jax.load(p, scale="x"),
    "unknown fscale": lambda m, p: ovseg_jax.load(p, fscale=True),
    "is empty": lambda m, p: m.segment(PIXELS[:0], ["cat"]),
    "as an image: No such": lambda m, p: m.segment("/no.jpg", ["cat"]),
    "cannot be read as an image: not an image": lambda m, p: m.segment(__file__, ["cat"]),
    "no such directory": lambda m, p: ovseg_jax.load(p / "none"),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_input(reason, model, directory):
    with pytest.raises(UserError, match=reason):
        BAD[reason](model, directory)


def test_importing_the_package_is_light():
    code = "import ovseg_jax, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "flax", "PIL"} & set(done.stdout.split())
