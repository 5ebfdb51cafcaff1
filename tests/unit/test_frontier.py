"""The frontier and the interval set against their plain meanings: a scan over everything, a set of numbers."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.frontier import Frontier, IntervalSet

NUMBERS = st.lists(st.integers(0, 40))
INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)))
PLACE = ("in", 0)


def numbers_in(intervals: list[tuple[int, int]]) -> set[int]:
    return {number for first, end in intervals for number in range(first, end)}


@given(INTERVALS, NUMBERS)
def test_an_interval_set_holds_what_a_plain_set_holds(intervals: list[tuple[int, int]], numbers: list[int]) -> None:
    found, plain = IntervalSet(intervals), numbers_in(intervals) | set(numbers)
    for number in numbers:
        found.add(number)
    assert list(found) == sorted(plain)
    assert len(found) == len(plain)
    assert {number for number in range(-1, 43) if number in found} == plain


@given(INTERVALS, NUMBERS)
def test_intervals_are_as_few_as_possible(intervals: list[tuple[int, int]], numbers: list[int]) -> None:
    found = IntervalSet(intervals)
    for number in numbers:
        found.add(number)
    gaps = zip(found.intervals, found.intervals[1:], strict=False)
    assert all(end < first for (_, end), (first, _) in gaps)
    assert all(first < end for first, end in found.intervals)


@given(st.sets(st.integers(0, 30)))
def test_what_is_missing_is_what_is_not_in_it_from_0_on(numbers: set[int]) -> None:
    found = IntervalSet((number, number + 1) for number in numbers)
    assert list(islice(found.missing(), 40)) == [number for number in range(80) if number not in numbers][:40]


def test_consecutive_numbers_stay_one_interval() -> None:
    found = IntervalSet()
    for number in range(100_000):
        found.add(number)
    assert found.intervals == [(0, 100_000)]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3)), max_size=30), st.randoms(use_true_random=False))
def test_everything_below_the_frontier_is_settled_and_the_frontier_is_not(reads: list[tuple[int, int]], random) -> None:  # type: ignore[no-untyped-def]
    frontier = Frontier()
    nexts, opened = {0: 0, 1: 0}, []
    for partition, step in reads:  # steps over 1 are the gaps of a compacted topic
        offset = nexts[partition] + step - 1
        nexts[partition] = offset + 1
        frontier.read(("in", partition), offset)
        opened.append((partition, offset))
    still = list(opened)
    random.shuffle(still)
    while still:
        partition, offset = still.pop()
        frontier.settle(("in", partition), offset)
        for one in {partition for partition, _ in opened}:
            expected = min((o for p, o in still if p == one), default=nexts[one])
            assert frontier.offsets()["in", one] == expected
        assert frontier.pending == len(still)


def test_a_partition_that_nothing_was_read_from_has_no_frontier() -> None:
    assert Frontier().offsets() == {}
    assert Frontier().pending == 0


def test_an_entry_settles_once() -> None:
    frontier = Frontier()
    frontier.read(PLACE, 5)
    frontier.settle(PLACE, 5)
    with pytest.raises(KeyError):
        frontier.settle(PLACE, 5)
