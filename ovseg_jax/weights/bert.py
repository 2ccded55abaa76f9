"""BERT and MiniLM under Hugging Face's tensor names."""

from collections.abc import Mapping

import numpy as np

from ovseg_jax.weights.convert_tree import Rule, convert, transpose
from ovseg_jax.weights.tensors import Tensors

ROOT = "text_encoder"
ANCHOR = "embeddings.word_embeddings.weight"

# The pooler feeds next-sentence prediction, position ids are a constant, heads predict words.
DROPPED = (
    r"pooler\..*",
    r"embeddings\.(position_ids|token_type_ids)",
    r"(cls|classifier|qa_outputs)\..*",
)

_NORMS = ("attention_norm", "mlp_norm")
_BERT = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def is_bert(tensors: Tensors) -> bool:
    """Whether the names are those of a text encoder (with any prefix removed)."""
    return ANCHOR in tensors


def _new_norm_names(tensors: Tensors) -> Tensors:
    # Files converted from TensorFlow call the two vectors of a norm gamma and beta.
    new = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
    result = {}
    for name, value in tensors.items():
        old = next((suffix for suffix in new if name.endswith(suffix)), None)
        result[name if old is None else name.removesuffix(old) + new[old]] = value
    return result


def from_bert(
    tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], origin: str
) -> dict[str, np.ndarray]:
    """Parameters of the text encoder.

    Args:
      tensors: with any prefix such as "bert." removed.
      shapes: all the model's parameters.
      origin: where the tensors come from, for messages.

    Raises:
      UserError: lists every tensor that is missing, left over or misshapen.
    """
    tensors = _new_norm_names(tensors)
    wanted = {path: shape for path, shape in shapes.items() if path.startswith(f"{ROOT}/")}
    layers = shapes[f"{ROOT}/layers/mlp/fc1/bias"][0]
    return convert(tensors, _rules(layers), wanted, DROPPED, origin)


def _rules(layers: int) -> list[Rule]:
    rules = [
        Rule(f"{ROOT}/word", (ANCHOR,)),
        Rule(f"{ROOT}/position", ("embeddings.position_embeddings.weight",)),
        Rule(f"{ROOT}/token_type", ("embeddings.token_type_embeddings.weight",)),
        Rule(f"{ROOT}/embed_norm/scale", ("embeddings.LayerNorm.weight",)),
        Rule(f"{ROOT}/embed_norm/bias", ("embeddings.LayerNorm.bias",)),
    ]
    for ours, theirs in _BERT.items():
        weights, biases = (
            tuple(f"encoder.layer.{index}.{theirs}.{kind}" for index in range(layers))
            for kind in ("weight", "bias")
        )
        path = f"{ROOT}/layers/{ours}"
        if ours in _NORMS:
            rules.append(Rule(f"{path}/scale", weights, stack=True))
        else:
            rules.append(Rule(f"{path}/kernel", weights, transpose, True))
        rules.append(Rule(f"{path}/bias", biases, stack=True))
    return rules
