"""What the training loop counts beside the losses: texts that were cut, waiting, speed."""

import time

import numpy as np

from ovseg_jax.train.loop import _Meter


def batch(**fields):
    return {"weight": np.ones(4, np.float32), **fields}


def test_examples_that_lost_words_are_counted_and_never_sent_to_the_device():
    meter = _Meter(8)
    cuts = ([True, False, True, True], [False] * 4)
    seen = list(meter.timed([batch(truncated=np.array(cut)) for cut in cuts]))
    assert [set(one) for one in seen] == [{"weight"}] * 2
    assert (meter.read, meter.truncated) == (8, 3)
    meter.restart(0)
    # The count is of the whole phase, whatever laps it has.
    assert [meter.lap(step)["truncated_examples"] for step in (1, 2)] == [3, 3]
    note = meter.truncation("align", 24)
    assert note.startswith("note: 3 of 8 examples in align had a text cut to 24 tokens")


def test_cached_texts_count_as_whole():
    meter = _Meter(8)
    list(meter.timed([batch()]))
    assert (meter.read, meter.truncated) == (4, 0)


def test_share_of_time_that_waits():
    def slow():
        for _ in range(3):
            time.sleep(0.05)
            yield batch()

    meter = _Meter(8)
    meter.restart(0)
    for _ in meter.timed(slow()):
        pass
    lap = meter.lap(3)
    assert 0 < lap["waiting_for_data"] <= 1
    assert lap["images_per_second"] > 0
    assert meter.lap(3)["waiting_for_data"] == 0, "counted anew in every lap"
