"""The weight of the entropy bonus under control, by hand."""

import math

import pytest

from grpo.config import Objective
from grpo.objectives import EntropyControl

MOST = math.log(16384)


def control(**settings):
    objective = {"entropy_weight": 2.2e-3, "entropy_target": 0.78, "entropy_dead_band": 0.015, "entropy_gain": 3.0}
    return EntropyControl(Objective(**{**objective, **settings}), vocab_size=16384)


def test_the_weight_follows_what_the_entropy_lacks_beyond_the_dead_band():
    steered = control()
    for share, factor in [
        (0.78, 1.0),
        (0.766, 1.0),  # within .015
        (0.70, math.exp(3 * (0.08 - 0.015))),
        (0.80, math.exp(-3 * (0.02 - 0.015))),
        (math.nan, 1.0),
    ]:
        before = steered.weight
        steered.update(share * MOST)
        assert steered.weight / before == pytest.approx(factor, rel=1e-12)
    again = control()
    again.load_state_dict(steered.state_dict())
    assert again.weight == steered.weight


def test_the_weight_stays_near_its_start_and_without_a_target_where_it_is():
    steered, free = control(), control(entropy_target=None)
    for _ in range(1000):
        steered.update(0.0)
        free.update(0.0)
    assert steered.weight == pytest.approx(0.22)
    assert (free.weight, free.steers) == (2.2e-3, False)
    strong = control(entropy_gain=1e6)
    for entropy, weight in [(0.0, 0.22), (MOST, 2.2e-5), (0.0, 0.22)]:
        strong.update(entropy)
        assert strong.weight == pytest.approx(weight)


@pytest.mark.parametrize(("weight", "loaded"), [(5e-3, 5e-3), (-1.0, 2.2e-5), (1e9, 0.22)])
def test_a_restored_weight_is_within_its_bounds(weight, loaded):
    steered = control()
    steered.load_state_dict({"weight": weight})
    assert steered.weight == pytest.approx(loaded)
    for wrong in (math.nan, math.inf, "x", None, 10**400):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            steered.load_state_dict({"weight": wrong})
    assert steered.weight == pytest.approx(loaded)
