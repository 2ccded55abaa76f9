"""Cached features belong to the weights and to the settings that no weight tells."""

import logging

import jax.numpy as jnp
import pytest

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.records import MemorySource, Record
from ovseg_jax.data.scenes import ScenesSource
from ovseg_jax.data.tokens import Tokenizer
from ovseg_jax.models.build import build_model
from ovseg_jax.progress import Progress
from ovseg_jax.train.feature_cache import (
    AFTER_TRUNK,
    cache_key,
    image_store,
    settings_of,
    text_store,
)


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
        ("image.unroll", 2, (False, False)),
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
    source, transform = ScenesSource("train", 2, 0, 32), {"kind": kind, "size": 32}
    for seed in (0, 1, 1):
        image_store(
            tmp_path,
            tiny_model,
            tiny_params,
            source,
            transform,
            views=1,
            seed=seed,
            progress=Progress(quiet=True).count,
        )
    assert len(list(tmp_path.iterdir())) == folders


def test_cached_sentences_that_are_cut_are_counted(tmp_path, tiny_model, tiny_params, caplog):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "photo", "of"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    source = MemorySource(
        [Record(b"", (text,), text) for text in ("a dog", "a dog of a dog of a dog")]
    )
    with caplog.at_level(logging.WARNING):
        text_store(
            tmp_path,
            tiny_model,
            tiny_params,
            source,
            EntitySet({"dog": []}),
            Tokenizer(tmp_path),
            ("a {}",),
            length=6,
            progress=Progress(quiet=True).count,
        )
    # Two captions, of which one is the prompt too, the same masked, the entity's own sentence.
    assert caplog.messages == [
        "2 of 5 cached sentences were cut to 6 tokens (config.data.text_length)"
    ]
