import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.gap_scale import NUM_NEWEST, GapScale

GAPS = st.lists(st.none() | st.floats(-1e3, 1e3))


def test_the_scale_is_the_root_mean_square_and_is_not_centred():
    assert GapScale().after([3.0, 5.0]).value == pytest.approx(math.sqrt(17), rel=1e-3)
    assert GapScale().after([4.0] * 5000).value == pytest.approx(4)
    assert GapScale().after([-4.0]).value == 4


def test_without_a_gap_the_scale_is_one():
    assert GapScale().value == GapScale().after([None, 0.0]).value == 1


def test_a_missing_gap_and_one_beyond_all_measure_change_nothing():
    seen = GapScale().after([2.0])
    assert seen.after([None, math.nan, math.inf, 1e300]) == seen


def test_old_gaps_are_forgotten():
    assert GapScale().after([1000.0] * 100 + [2.0] * 30 * NUM_NEWEST).value == pytest.approx(2, rel=1e-3)
    assert GapScale().after([1.0] * NUM_NEWEST + [100.0]).value == pytest.approx(4.1, abs=0.1)


@given(GAPS, GAPS)
def test_a_scale_that_was_stored_goes_on_as_one_that_never_was(before, later):
    stored = msgspec.msgpack.encode(GapScale().after(before))
    assert msgspec.msgpack.decode(stored, type=GapScale).after(later) == GapScale().after(before + later)
