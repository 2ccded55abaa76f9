"""Features of frozen towers: keys and contents of the caches, and the start of the neck."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_source import MemorySource
from ml_collections import ConfigDict

from ovseg_jax.data.captions import mask_entities, prompt, shared_prompt
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import Loader
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.records import ClassCaptions, Record
from ovseg_jax.data.scenes import ScenesSource
from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.optim.groups import nest
from ovseg_jax.progress import Progress
from ovseg_jax.train.features import (
    AFTER_TRUNK,
    cache_key,
    image_store,
    settings_of,
    standardized_neck,
    text_store,
)

ENTITIES = EntitySet({"dog": [], "cat": ["kitten"]})
TEMPLATES = ("a photo of {}", "the {}")
CLASS = ClassCaptions(("cat", "photo"), ("a {}", "the dog of a {}"))
CAPTIONS = [
    ("a dog", "the dog of the cat and the dog of a cat", "a photo"),
    CLASS,
    ("a dog",),
    CLASS,
    ("the kitten and a kitten and the kitten", "a cat of a dog"),
]
LENGTH = 12  # no multiple of 8, and short for some


def keys(config):
    model, params = build_model(config.model), {"image_encoder": {"position": jnp.zeros(3)}}
    return (
        cache_key(params, ("image_encoder/",), trunk=settings_of(model.image_encoder, AFTER_TRUNK)),
        cache_key(params, ("text_encoder/",), encoder=settings_of(model.text_encoder)),
    )


@pytest.mark.parametrize(
    ("field", "value", "changed"),
    [
        ("image.heads", 2, (True, False)),
        ("image.eps", 1e-5, (True, False)),
        ("image.position_resize", "bicubic_antialias", (True, False)),
        ("image.num_groups", 5, (False, False)),
        ("image.remat", "full", (False, False)),
        ("text.heads", 3, (False, True)),
        ("matmul_dtype", "bfloat16", (True, True)),
    ],
)
def test_a_setting_that_changes_features_changes_the_key(tiny_config, field, value, changed):
    before = keys(tiny_config)
    assert before == keys(tiny_config)
    tiny_config.model.update_from_flattened_dict({field: value})
    after = keys(tiny_config)
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changed


@pytest.mark.parametrize(("kind", "folders"), [("none", 1), ("crop", 2)])
def test_runs_of_any_seed_share_views_that_draw_nothing(
    tmp_path, tiny_model, tiny_params, kind, folders
):
    args = (tmp_path, tiny_model, tiny_params, ScenesSource("train", 2, 0, 32))
    for seed in (0, 1, 1):
        transform, progress = {"kind": kind, "size": 32}, Progress(quiet=True).count
        image_store(*args, transform, views=1, seed=seed, progress=progress)
    assert len(list(tmp_path.iterdir())) == folders


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat kitten photo of the and".split()
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model, tiny_params, tokenizer):
    source = MemorySource([Record(b"", texts, str(i)) for i, texts in enumerate(CAPTIONS)])
    said = []
    settings = {"length": LENGTH, "progress": lambda *given: said.append(given)}
    args = (tmp_path_factory.mktemp("c"), tiny_model, tiny_params)
    args += (source, ENTITIES, tokenizer, TEMPLATES)
    made = text_store(*args, **settings)
    asked = len(said)
    assert text_store(*args, **settings).directory == made.directory and len(said) == asked
    return made, said[-1]


def test_cached_sentences_that_are_cut_are_counted(
    tmp_path, tiny_model, tiny_params, tokenizer, caplog
):
    texts = ("a dog", "a dog of a dog of a dog")
    source = MemorySource([Record(b"", (text,), text) for text in texts])
    args = (tmp_path, tiny_model, tiny_params, source, EntitySet({"dog": []}), tokenizer, ("a {}",))
    with caplog.at_level(logging.WARNING):
        text_store(*args, length=6, progress=Progress(quiet=True).count)
    # Two captions, of which one is the prompt too, the same masked, the entity's own sentence.
    said = "2 of 5 cached sentences were cut to 6 tokens (config.data.text_length)"
    assert caplog.messages == [said]


def test_each_caption_has_its_features(store, tiny_model, tiny_params, tokenizer):
    made, (_, done, total) = store
    apply = jax.jit(lambda params, ids: tiny_model.apply(params, ids, method="text_tokens"))

    def encode(sentences):
        return apply({"params": tiny_params}, tokenizer.encode(sentences, LENGTH))

    def close(stored, want):
        np.testing.assert_allclose(np.float32(stored), want, rtol=2e-3, atol=2e-3)

    everything = set()
    for record, captions in enumerate(CAPTIONS):
        first, last = made["caption_starts"][record : record + 2]
        assert last - first == len(captions)
        for row, caption in zip(made["caption_rows"][first:last], captions, strict=True):
            names = [ENTITIES.names[identity] for identity in ENTITIES.find(caption)]
            prompts = [prompt(names, template) for template in TEMPLATES]
            sentences = [caption, mask_entities(caption, ENTITIES), *prompts]
            everything |= set(sentences)
            plain = encode(sentences)
            close(made["caption_pooled"][row], plain.pooled[0])
            masked = made["masked_rows"][row]
            mask = np.asarray(plain.mask[1])
            np.testing.assert_array_equal(made["masked_mask"][masked], mask)
            close(made["masked_tokens"][masked][mask], plain.tokens[1][mask])
            close(made["prompt_pooled"][made["prompt_rows"][row]], plain.pooled[2:])
    shared = [shared_prompt(name) for name in ENTITIES.names]
    close(made["shared_pooled"], encode(shared).pooled)
    # Each of them once, and no row twice.
    assert done == total == len(everything | set(shared))
    captions = {text for texts in CAPTIONS for text in texts}
    assert len(made["caption_pooled"]) == len(captions) == 8
    hidden = {mask_entities(text, ENTITIES) for text in captions}
    assert len(made["masked_tokens"]) == len(hidden) < 8


def test_cached_and_fresh_examples_are_of_the_same_caption(store, tokenizer, tmp_path):
    made, _ = store
    images = FeatureStore.create(tmp_path / "i", "k", {"image": ((5, 1, 1, 1), "float16")}).commit()
    source = MemorySource([Record(b"", texts, str(i)) for i, texts in enumerate(CAPTIONS)])
    settings = {"batch_size": 5, "seed": 0, "first_step": 0, "last_step": 20, "with_pairs": True}
    spec = {"text_length": LENGTH, "templates": TEMPLATES}

    def read(**stores):
        return list(Loader(source, ENTITIES, tokenizer, spec, **settings, **stores))

    for fresh, cached in zip(
        read(image_store=images), read(image_store=images, text_store=made), strict=True
    ):
        for name in ("record", "entity_set", "caption_set", "entity_weight", "pair_weight"):
            np.testing.assert_array_equal(fresh[name], cached[name], err_msg=name)
        for at, record in enumerate(map(int, fresh["record"])):
            ids = tokenizer.encode(list(CAPTIONS[record]), LENGTH)
            number = (ids == fresh["caption_ids"][at]).all(1).argmax()
            row = made["caption_rows"][made["caption_starts"][record] + number]
            np.testing.assert_array_equal(cached["caption_pooled"][at], made["caption_pooled"][row])
            tokens = made["masked_tokens"][made["masked_rows"][row]]
            np.testing.assert_array_equal(cached["masked_tokens"][at], tokens)


# ---- the start of the neck

TRANSFORM = {"kind": "none", "size": 32}


def model_and_params(config, trunk_width):
    config = ConfigDict(config.model.to_dict())
    config.image.update(trunk_width=trunk_width, group_layer=1)
    model = build_model(config)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.normal(0, 0.2, shape).astype(np.float32)
        for path, shape in variable_shapes(model).items()
    }
    return model, jax.tree.map(jax.numpy.asarray, nest(flat))


@pytest.mark.parametrize("image_head", [0, 10])
def test_folding_equals_standardizing_the_features(tiny_config, image_head):
    """The neck's of the patches, and those of the image head's first map of the class token."""
    if image_head:
        tiny_config.model.image.update(class_token=True, keep_class_token=True, trunk_norm=True)
        tiny_config.model.image_head = image_head
    model, params = model_and_params(tiny_config, 24)
    source = ScenesSource("train", 6, 0, 32)
    folded = standardized_neck(model, params, source, TRANSFORM, seed=0)
    images = jax.numpy.asarray(np.stack([source.scene(index).image for index in range(6)]))
    features = np.asarray(model.apply({"params": params}, images, method="trunk"), np.float64)

    def assert_folded(old, new, inputs):
        old, new = (jax.tree.map(np.asarray, tree) for tree in (old, new))
        standardized = (inputs - inputs.mean(0)) / np.maximum(inputs.std(0), 1e-3)
        expected = standardized @ old["kernel"] + old["bias"]
        atol = 1e-3 if image_head else 1e-4
        np.testing.assert_allclose(inputs @ new["kernel"] + new["bias"], expected, atol=atol)

    first = 1 if image_head else 0  # of the patches
    encoders = [tree["image_encoder"] for tree in (params, folded)]
    patches = features[:, first:].reshape(-1, 24)
    assert_folded(*(encoder["neck"] for encoder in encoders), patches)
    if image_head:
        heads = (tree["whole_head"]["fc"] for tree in (params, folded))
        assert_folded(*heads, features[:, 0])
    before, after = ({k: v for k, v in x.items() if k != "neck"} for x in encoders)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))


def test_a_model_without_neck_is_refused(tiny_config):
    model, params = model_and_params(tiny_config, 0)
    with pytest.raises(UserError, match="trunk_width"):
        standardized_neck(model, params, ScenesSource("train", 2, 0, 32), TRANSFORM, seed=0)
