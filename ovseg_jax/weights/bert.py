"""BERT text encoders (bert-base-uncased, MiniLM, ...) under Hugging Face's tensor names."""

from ovseg_jax.weights.convert_tree import Rule, transpose

# The pooler feeds next-sentence prediction, position ids are a constant, cls heads predict words.
DROPPED = (r"pooler\..*", r"embeddings\.position_ids", r"cls\..*")

_LINEAR = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
_NORM = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def bert_rules(layers: int) -> list[Rule]:
    """Rules for the text encoder.

    Args:
      layers: depth of the encoder.
    """
    stack = "text_encoder/layers"

    def names(suffix: str) -> tuple[str, ...]:
        return tuple(f"encoder.layer.{index}.{suffix}" for index in range(layers))

    rules = [
        Rule("text_encoder/word", ("embeddings.word_embeddings.weight",)),
        Rule("text_encoder/position", ("embeddings.position_embeddings.weight",)),
        Rule("text_encoder/token_type", ("embeddings.token_type_embeddings.weight",)),
        Rule("text_encoder/embed_norm/scale", ("embeddings.LayerNorm.weight",)),
        Rule("text_encoder/embed_norm/bias", ("embeddings.LayerNorm.bias",)),
    ]
    for ours, theirs in _LINEAR.items():
        rules.append(Rule(f"{stack}/{ours}/kernel", names(f"{theirs}.weight"), transpose, True))
        rules.append(Rule(f"{stack}/{ours}/bias", names(f"{theirs}.bias"), stack=True))
    for ours, theirs in _NORM.items():
        rules.append(Rule(f"{stack}/{ours}/scale", names(f"{theirs}.weight"), stack=True))
        rules.append(Rule(f"{stack}/{ours}/bias", names(f"{theirs}.bias"), stack=True))
    return rules
