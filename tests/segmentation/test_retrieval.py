"""Classification and retrieval against counting by hand."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

import ovseg_jax
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.evaluate_model import evaluate_model
from ovseg_jax.segmentation.report import whole_image_lines, whole_image_rows
from ovseg_jax.segmentation.retrieval import classification, retrieval, whole_image_sets


def unit(seed, n, e=6):
    x = np.random.default_rng(seed).normal(size=(n, e)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_classification_by_hand():
    images, classes = unit(0, 40), unit(1, 9)
    truth = np.random.default_rng(2).integers(0, 7, 40)  # two classes never occur
    order = np.argsort(-(images @ classes.T), axis=1)
    top1 = order[:, 0] == truth
    top5 = [label in row[:5] for label, row in zip(truth, order, strict=True)]
    found = classification(images, classes, truth, "abcdefghi")
    assert found["top1"] == pytest.approx(100 * top1.mean())
    assert found["top5"] == pytest.approx(100 * np.mean(top5))
    means = [top1[truth == label].mean() for label in range(7)]
    assert found["mean_class_top1"] == pytest.approx(100 * np.mean(means))


def test_retrieval_by_hand():
    images, texts = unit(3, 12), unit(4, 30)
    owner = np.concatenate([np.arange(12), np.random.default_rng(5).integers(0, 12, 18)])
    found = retrieval(images, texts, owner)
    similarity = images @ texts.T
    for k in (1, 5, 10):
        # Text to image: the right image among the k best.
        hits = [owner[j] in np.argsort(-similarity[:, j])[:k] for j in range(30)]
        assert found[f"text_to_image_recall_at_{k}"] == pytest.approx(100 * np.mean(hits))
        # Image to text: any text of the image among the k best of all texts.
        hits = [(owner[np.argsort(-similarity[i])[:k]] == i).any() for i in range(12)]
        assert found[f"image_to_text_recall_at_{k}"] == pytest.approx(100 * np.mean(hits))
    # Equal embeddings find nothing.
    same = np.ones((20, 4), np.float32) / 2
    found = retrieval(same, same, np.arange(20))
    assert found["image_to_text_recall_at_10"] == found["text_to_image_recall_at_10"] == 0
    assert classification(same, same, np.arange(20), ["x"] * 20)["top5"] == 0


# ---- from folders


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_folders_of_classes_and_captions(directory, tmp_path):
    for seed, name in enumerate(("cat/a.png", "cat/b.png", "sky/c.png", "a_dog/d.png")):
        write(tmp_path / name, seed)
    for folder in ("empty", ".ipynb_checkpoints"):
        (tmp_path / folder).mkdir()
    write(tmp_path / ".ipynb_checkpoints" / "cat.png", 9)
    write(tmp_path / ".thumbnails" / "cat.png", 9)
    (tmp_path / "cat" / "lost.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    pairs = (("cat/a.png", "a photo of cat"), ("cat/b.png", "a dog"), ("cat/a.png", "cat ."))
    text = "\ufeff" + "\n".join("\t".join(pair) for pair in pairs) + "\n"
    (tmp_path / "captions.tsv").write_text(text, encoding="utf-8")
    names = ("classification", "retrieval")
    found = evaluate_model(str(directory), names, tmp_path / "out", data_dir=str(tmp_path))
    model = ovseg_jax.load(directory)
    files = [tmp_path / name for name in ("a_dog/d.png", "cat/a.png", "cat/b.png", "sky/c.png")]
    images = model.embed_image(files)
    names = ["a dog", "cat", "sky"]
    expected = classification(images, model.embed_text(names), np.array([0, 1, 1, 2]), names)
    first = found["classification"]
    assert expected.items() <= first.items() and first["model"] == str(directory)
    weights = (directory / "model.safetensors").read_bytes()
    assert first["model_sha256"] == hashlib.sha256(weights).hexdigest()[:12]
    assert first["class_top1"].keys() == set(names)
    assert first["protocol"]["templates"] == ["a photo of a {}."] and first["images_per_second"] > 0
    assert found["retrieval"]["protocol"]["templates"] == ["{}"]
    assert first["passed_over"] == [
        *(".thumbnails", "captions.tsv", "cat/lost.png", "cat/notes.txt", "empty")
    ]
    said = " ".join(whole_image_lines(first))
    assert "4 images, 3 classes" in said and "a photo of a {}." in said
    assert [row[0] for row in whole_image_rows(first)[1:]] == ["top1", "top5", "mean_class_top1"]
    assert len(whole_image_rows(found["retrieval"])) == 7
    texts = model.embed_text([text for _, text in pairs], ["{}"])
    expected = retrieval(images[1:3], texts, np.array([0, 1, 0]))
    assert found["retrieval"]["text_to_image_recall_at_1"] == expected["text_to_image_recall_at_1"]
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text()) == found["retrieval"]


def test_folders_that_are_no_sets(tmp_path):
    for name, where, said in (
        ("classification", "", "give --data_dir"),
        ("classification", tmp_path, "at least two classes"),
        ("retrieval", tmp_path, "cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            whole_image_sets((name,), str(where))
    for text, said in (
        ("\n", "has no captions"),
        ("a.png a caption\n", "line 1"),
        ("a.png\tone\ta.png\ttwo\n", "line 1"),
        ("a.png\ta caption\n", "no file"),
    ):
        (tmp_path / "captions.tsv").write_text(text)
        with pytest.raises(UserError, match=said):
            whole_image_sets(("retrieval",), str(tmp_path))
    write(tmp_path / "a.png", 0)
    for text, captions in (
        ('a.png\t"a ""big"" dog"\na.png\t"two\nlines"\n', ['a "big" dog', "two\nlines"]),
        ('a.png\t"so" a dog\na.png\ta 5" cat\n', ['"so" a dog', 'a 5" cat']),
    ):
        (tmp_path / "captions.tsv").write_text(text)
        assert whole_image_sets(("retrieval",), str(tmp_path))["retrieval"].texts == captions
    for option in ({"protocol_name": "paper"}, {"pictures": 1}):
        with pytest.raises(UserError, match="--pictures are about label maps"):
            options = {"data_dir": str(tmp_path), **option}
            evaluate_model("none", ("retrieval",), tmp_path / "out", **options)
