"""Examples whose texts were cut: counted over a phase, and told."""

import numpy as np

from ovseg_jax.train.text_cuts import TextCuts


def batch(**fields):
    return {"weight": np.ones(4, np.float32), **fields}


def test_examples_that_lost_words_are_counted_and_never_sent_to_the_device():
    cuts = TextCuts()
    marks = ([True, False, True, True], [False] * 4)
    seen = list(cuts.counted([batch(truncated=np.array(mark)) for mark in marks]))
    assert [set(one) for one in seen] == [{"weight"}] * 2
    assert (cuts.read, cuts.cut) == (8, 3)
    assert cuts.note("align", 24).startswith(
        "note: 3 of 8 examples in align had a text cut to 24 tokens"
    )


def test_cached_texts_count_as_whole():
    cuts = TextCuts()
    list(cuts.counted([batch()]))
    assert (cuts.read, cuts.cut) == (4, 0)
