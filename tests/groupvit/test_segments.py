"""A GroupViT with its own text encoder as a model directory: read back, it segments images."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from ovseg_jax.data.tokenizer import CLIP, Tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.protocol import named_protocol
from ovseg_jax.segmentation.scores import ModelSegmenter, image_scores, with_scale
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.weights.groupvit import from_groupvit, groupvit_config
from ovseg_jax.weights.model_dir import load_model, save_model

PREFIX = "weights/"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Whole words as tokens, framed as in CLIP."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["a", "photo", "of", "dog", "cat", "sky"]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {CLIP.start: 97, CLIP.end: 98}
    backend = Backend(models.WordLevel(vocabulary, unk_token=CLIP.end))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing((CLIP.end, 98), (CLIP.start, 97))
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    arrays = np.load(Path(__file__).with_name("tiny.npz"))
    tensors = {k.removeprefix(PREFIX): arrays[k] for k in arrays.files if k.startswith(PREFIX)}
    config = groupvit_config(tensors, heads=4, text_heads=4)
    params, statistics = from_groupvit(tensors, config)
    protocol = named_protocol("groupvit").replace(short_side=32, window=32, stride=16)
    target = tmp_path_factory.mktemp("models") / "groupvit"
    save_model(
        target,
        params,
        tokenizer,
        model=config,
        protocol=protocol.as_dict(),
        text_length=12,
        benchmarks={},
        provenance={},
        batch_stats=statistics,
    )
    return load_model(target), protocol


def test_it_segments(saved):
    model, protocol = saved
    assert model.model.entity_decoder is None
    assert model.model.image_encoder.later_stages == ((3, 3, 1),)
    segmenter = ModelSegmenter.of_saved(model, protocol)
    protocol = with_scale(protocol, segmenter)
    np.testing.assert_allclose(protocol.scale, np.exp(1.3), rtol=1e-5)
    words, templates = Vocabulary.of(["dog", "cat", "sky"]), ("a photo of a {}", "{}")
    text = segmenter.text(words.words, templates)
    np.testing.assert_allclose(np.linalg.norm(text[0], axis=1), 1, rtol=1e-5)
    ids = model.tokenizer.encode(["a photo of a dog", "dog"], 12)
    assert ids[0].tolist()[:7] == [97, 0, 1, 2, 0, 3, 98] and (ids[1][2:] == 98).all()
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    protocol = protocol.replace(templates=templates)
    scored = image_scores(segmenter, words, [image], protocol, 2)
    ((scores, labels),) = label_maps(scored, protocol)
    assert labels.shape == (40, 60) and scores.cells.shape[-1] == 3
    assert set(np.unique(labels)) <= {0, 1, 2, 3} and (labels > 0).any()


def test_prompts_are_averaged_before_or_after_their_norm(saved):
    model, protocol = saved
    names, templates = ["dog", "sky"], ("a photo of a {}", "{}")
    ids = model.tokenizer.encode([t.format(n) for n in names for t in templates], 12)
    arrays = {"params": model.params, "batch_stats": model.batch_stats}
    variables = jax.tree.map(jnp.asarray, arrays)
    pooled = model.model.apply(variables, jnp.asarray(ids), method="text_tokens").pooled
    raw = np.asarray(model.model.apply(variables, pooled, method="embed_text"))
    raw = raw.reshape(2, 2, -1).astype(np.float64)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    expected = {"raw": unit(raw.mean(1)), "unit": unit(unit(raw).mean(1))}
    assert np.abs(expected["raw"] - expected["unit"]).max() > 1e-3
    for average, embeddings in expected.items():
        segmenter = ModelSegmenter.of_saved(model, protocol.replace(average=average))
        np.testing.assert_allclose(segmenter.text(names, templates)[0], embeddings, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"border_scale": 1.0}, "border_scale must be 0"),
        ({"affinity": "features"}, "must be 'binding'"),
    ],
)
def test_what_several_bindings_do_not_have(saved, changes, message):
    model, protocol = saved
    protocol = protocol.replace(**changes, grouping="soft_patches", image_classes=0)
    with pytest.raises(UserError, match=message):
        ModelSegmenter.of_saved(model, protocol).encode(np.zeros((1, 32, 32, 3), np.uint8))
