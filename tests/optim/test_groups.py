"""Parameter groups by regular expression: what is matched, and what is refused."""

import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from ovseg_jax.errors import UserError
from ovseg_jax.optim import groups

TREE = {"a": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 3}}, "scale": 4}
PATHS = list(groups.flatten(TREE))


def test_the_first_match_wins():
    rules = [("bias|scale", 0.0), ("^b/", 0.5), (".*", 1.0)]
    assert groups.assign(PATHS, rules, "field") == {
        "a/kernel": 1.0,
        "a/bias": 0.0,
        "b/c/kernel": 0.5,
        "scale": 0.0,
    }


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("kernel", 1)], ["a/bias", "scale", "'.*'"]),
        ([("kernal", 1), (".*", 2)], ["'kernal'", "a/kernel"]),
        ([("a/", 1), ("a/bias", 2), (".*", 3)], ["'a/bias'"]),
        ([("(", 1), (".*", 2)], ["'('"]),
    ],
)
def test_rules_that_do_not_fit_are_user_errors(rules, words):
    with pytest.raises(UserError) as error:
        groups.assign(PATHS, rules, "config.optimizer.some_rules")
    for word in ["config.optimizer.some_rules", *words]:
        assert word in str(error.value)


@given(st.sets(st.sampled_from(["kernel$", "^a/", "bias", "^b/c", "scale"])))
def test_split_and_join_are_inverse(patterns):
    # A pattern is refused where earlier ones left it nothing: take those that own a leaf alone.
    own = [p for p in patterns if p in ("bias", "scale", "^b/c")]
    trainable, frozen = groups.split(TREE, own)
    assert not set(groups.flatten(trainable)) & set(groups.flatten(frozen))
    assert groups.join(frozen, trainable) == TREE
    assert len(groups.flatten(frozen)) == len(own)
    with pytest.raises(UserError, match="frozen: '\\^text'"):
        groups.split(TREE, ["^text"])


def test_decay_of_all_but_biases_and_norms(tiny_boxed):
    # The released rule: no decay where a tensor has one axis or is called bias. Here layers are
    # stacked, so the axes that count are those besides "layers", and the rule goes by name.
    def exempt(path, leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        return path.endswith("bias") or len([n for n in names if n != "layers"]) == 1

    flat = groups.flatten(tiny_boxed)
    rules = [(r"/(bias|scale)$", 0.0), (".*", 1.0)]
    found = groups.assign(list(flat), rules, "config.optimizer.decay_rules")
    assert found == {path: 0.0 if exempt(path, leaf) else 1.0 for path, leaf in flat.items()}
    assert found["log_scale"] == 1.0 and found["image_encoder/position"] == 1.0
