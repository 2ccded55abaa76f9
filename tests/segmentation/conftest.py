"""A tiny model directory, with a vocabulary that tells the words of these tests apart."""

import json

import pytest

from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.weights.model_dir import save_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", ".", "sky"]
# Distractors must differ from the classes for the text encoder too.
WORDS += ["person", "grass", "wall", "car", "tree", "floor", "bird", "water", "flower"]


@pytest.fixture(scope="session")
def directory(tmp_path_factory, shared_tiny_config, tiny_params):
    folder = tmp_path_factory.mktemp("loaded")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    protocol = Protocol(
        short_side=32, window=32, stride=16, scale=20.0, threshold=0.12, order="upsample_first"
    )
    save_model(
        folder / "model",
        tiny_params,
        Tokenizer(folder),
        model=json.loads(shared_tiny_config.model.to_json_best_effort()),
        protocol={k: v for k, v in protocol.as_dict().items() if k != "competing_words"},
        text_length=8,
        benchmarks={},
        provenance={"calibrated_words": 9},  # as directories of before `competing_words` have it
    )
    return folder / "model"
