"""The released model's forward pass in evaluation, from converted weights.

Recorded values are compared by |ours - theirs| / |theirs| (Euclidean norms over the array) with
the limit 1e-5; the group that each patch is assigned to must be the same everywhere.
"""

import jax
import numpy as np
import pytest

from released import forward
from released.arrays import ReleasedSet, sets_with

LIMIT = 1e-5


@pytest.fixture(scope="module", params=sets_with("eval_image.npz", "eval_rest.npz"))
def case(request):
    return ReleasedSet(*request.param)


def test_visual_encoder(case):
    recorded = case.file("eval_image")
    ours = jax.jit(lambda params: forward.image_values(case, params))(case.params)
    errors = forward.errors_of(ours, recorded) | forward.position_errors(case, recorded)
    case.check("eval", errors, LIMIT)
    groups, theirs = (np.argmax(x["grouping/hard"][:, 0], axis=1) for x in (ours, recorded))
    np.testing.assert_array_equal(groups, theirs)


def test_joint_space_text_decoder_and_losses(case):
    recorded = case.file("eval_rest")
    ours = jax.jit(lambda params: forward.rest_values(case, params))(case.params)
    case.check("eval", forward.errors_of(ours, recorded), LIMIT)
