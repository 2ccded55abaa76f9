"""Parameter groups by regular expression: what is matched, and what is refused."""

import pytest
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


def test_a_catch_all_may_be_left_with_nothing():
    assert set(groups.assign(PATHS, [("a|b|s", 1), (".*", 2)], "field").values()) == {1}


@given(st.sets(st.sampled_from(["kernel$", "^a/", "bias", "^b/c", "scale"])))
def test_split_and_join_are_inverse(patterns):
    # A pattern is refused where earlier ones left it nothing: take those that own a leaf alone.
    own = [p for p in patterns if p in ("bias", "scale", "^b/c")]
    trainable, frozen = groups.split(TREE, own)
    assert not set(groups.flatten(trainable)) & set(groups.flatten(frozen))
    assert groups.join(frozen, trainable) == TREE
    assert len(groups.flatten(frozen)) == len(own)


def test_freezing_what_does_not_exist_is_a_user_error():
    with pytest.raises(UserError, match="frozen") as error:
        groups.split(TREE, ["^text"])
    assert "'^text'" in str(error.value)
