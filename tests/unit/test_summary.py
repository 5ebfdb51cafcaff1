"""What a run came to: every aggregate against the same thing computed plainly."""

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.summary import (
    MAX_REASONS,
    OTHER,
    Ends,
    Histogram,
    Line,
    Mean,
    Rounds,
    Routed,
    RunSummary,
    Settled,
    add_feedback,
    add_pair,
    add_scored,
    add_weights,
    routed,
)
from streaming.evaluation import measurements
from streaming.records import Feedback, Margins, Span, Version
from tests.builders import (
    make_candidate,
    make_feedback,
    make_group,
    make_pair,
    make_scored,
    make_weights,
)

FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=2), st.lists(FINITE, min_size=1))
def test_a_mean_is_the_mean_of_all_values_however_they_were_put_together(left: list[float], right: list[float]) -> None:
    mean, other = Mean(), Mean()
    for value in left:
        mean.add(value)
    for value in right:
        other.add(value)
    mean.merge(other)
    every = left + right
    assert mean.count == len(every)
    assert mean.value == pytest.approx(statistics.fmean(every), abs=1e-6)
    assert mean.standard_error == pytest.approx(statistics.stdev(every) / len(every) ** 0.5, abs=1e-4)


def test_one_value_has_no_standard_error() -> None:
    mean = Mean()
    mean.add(1.0)
    assert mean.standard_error is None


def test_a_line_has_a_point_per_step_while_it_is_short() -> None:
    line = Line(max_points=4)
    for step, value in ((3, 1.0), (1, 5.0), (3, 2.0)):
        line.add(step, value)
    assert [(point.x, point.mean, point.num_values) for point in line.points()] == [(1, 5.0, 1), (3, 1.5, 2)]


def test_a_long_line_keeps_few_points_and_every_value() -> None:
    line = Line(max_points=10)
    for step in random.Random(0).sample(range(1000), 1000):
        line.add(step, 2.0 * step)
    points = line.points()
    assert len(points) <= 10
    assert sum(point.num_values for point in points) == 1000
    assert all(point.mean == pytest.approx(2 * point.x) for point in points)
    assert all(left.x < right.x for left, right in pairwise(points))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_no_line_and_no_histogram(value: float) -> None:
    line, histogram = Line(), Histogram()
    line.add(0, value)
    histogram.add(value)
    assert line.points() == []
    assert histogram.values() == []


def test_a_histogram_counts_whole_numbers_exactly() -> None:
    histogram = Histogram()
    for value in (0, 3, 3, -2, 1 - 1e-9, 1 + 1e-9):
        histogram.add(value)
    assert histogram.values() == [(-2, 1), (0, 1), (1, 2), (3, 2)]


def test_a_histogram_of_many_different_values_stays_small_and_loses_none() -> None:
    rng = random.Random(0)
    histogram = Histogram(max_bins=64)
    values = sorted(rng.gauss(0, 10) for _ in range(2000))
    for value in values:
        histogram.add(value)
    found = histogram.values()
    assert len(found) <= 64
    assert sum(count for _, count in found) == 2000
    middle = next(value for value, _ in found if sum(count for place, count in found if place <= value) >= 1000)
    assert middle == pytest.approx(statistics.median(values), abs=5)


def test_the_ends_are_the_least_and_the_greatest_in_any_order_and_once() -> None:
    numbers = list(range(20)) * 2
    random.Random(1).shuffle(numbers)
    ends = Ends[int](num_first=2, num_last=3)
    for number in numbers:
        ends.keep((number,), lambda number=number: number)  # type: ignore[misc]
    assert (ends.first, ends.last) == ([0, 1], [17, 18, 19])


def test_what_fits_among_the_first_is_not_among_the_last() -> None:
    ends = Ends[str](num_first=2, num_last=3)
    for name in "ecd":
        ends.keep((ord(name),), name.upper)
    assert (ends.first, ends.last) == (["C", "D"], ["E"])


def test_what_is_kept_at_an_end_was_kept_from_its_first_record_on() -> None:
    numbers = [number for number in range(30) for _ in range(7)]
    random.Random(2).shuffle(numbers)
    ends = Ends[Mean](num_first=2, num_last=3)
    for number in numbers:
        if (mean := ends.keep((number,), Mean)) is not None:
            mean.add(number)
    assert [(mean.value, mean.count) for mean in ends.first + ends.last] == [(n, 7) for n in (0, 1, 27, 28, 29)]


def evaluated(number: int, *, round: int = 0, size: int = 3, reward: float = 1.0, version: int = 0) -> Feedback:
    return make_feedback(
        number, ending="evaluated", round=round, round_size=size, mean_reward=reward, version=Version(1, version)
    )


def test_a_round_counts_when_every_prompt_has_answered_under_one_version() -> None:
    rounds = Rounds()
    for feedback in [evaluated(0, reward=1.0), evaluated(1, reward=0.0), evaluated(1, reward=1.0)]:
        rounds.add(feedback)
    assert rounds.complete() == []
    assert [one.measured.count for one in rounds.incomplete()] == [2]
    rounds.add(evaluated(2, reward=0.5))
    (found,) = rounds.complete()
    assert (found.measured.mean, found.measured.count) == (0.5, 3)
    assert found.standard_error == pytest.approx(statistics.stdev([1, 0, 0.5]) / 3**0.5)
    assert rounds.incomplete() == []


def test_the_rounds_are_those_of_the_scheduler() -> None:
    rng = random.Random(0)
    feedback = [
        evaluated(number, round=number // 4, size=4, reward=rng.random(), version=rng.choice([0, 0, 0, 1]))
        for number in range(40)
    ] * 2
    rng.shuffle(feedback)
    rounds = Rounds()
    for one in feedback:
        rounds.add(one)
    ours = {(one.measured.round, one.measured.version): one.measured for one in rounds.complete() + rounds.incomplete()}
    assert ours == {(one.round, one.version): one for one in measurements(feedback)}


def test_the_best_round_is_the_highest_and_of_equals_the_earliest() -> None:
    rounds = Rounds()
    for round, reward in ((0, 0.1), (1, 0.9), (2, 0.9), (3, 0.3)):
        rounds.add(evaluated(round, round=round, size=1, reward=reward))
    assert rounds.best is not None and rounds.best.measured.round == 1


def test_training_reward_belongs_to_the_version_that_sampled_it() -> None:
    summary = RunSummary("policy")
    mixed = make_candidate(
        "12", spans=[Span(version=Version(1, 3), start=0, end=1), Span(version=Version(1, 4), start=1, end=3)]
    )
    group = make_group(candidates=[make_candidate("1", version=Version(1, 3)), mixed])
    add_scored(summary, make_scored([0.25, 0.75], group=group))
    assert [(point.x, point.mean) for point in summary.training[1].points()] == [(3, 0.25)]
    assert [(point.x, point.mean) for point in summary.mixed[1].points()] == [(3, 0.75)]
    assert (summary.num_candidates, summary.num_mixed) == (2, 1)
    assert [(one.version, one.rewards.value) for one in summary.versions.first] == [(Version(1, 3), 0.25)]


def test_a_missing_reward_is_counted_and_is_no_zero() -> None:
    summary = RunSummary("policy")
    add_scored(summary, make_scored([1.0, None]))
    assert [point.mean for point in summary.training[1].points()] == [1.0]
    assert summary.num_unrewarded == 1


def test_a_restarted_learner_begins_a_new_line() -> None:
    summary = RunSummary("policy")
    for epoch, number in ((1, 5), (2, 3)):
        add_scored(summary, make_scored(group=make_group(version=Version(epoch, number))))
    assert {epoch: [point.x for point in line.points()] for epoch, line in summary.training.items()} == {1: [5], 2: [3]}


def consumed(number: int = 0, **fields: object) -> Feedback:
    defaults = {"epoch": 1, "step": 1, "route": "dpo", "staleness": 0, "stage": "learner"}
    return make_feedback(number, ending="consumed", **{**defaults, **fields})


def test_the_newest_version_is_that_of_the_newest_epoch() -> None:
    summary = RunSummary("policy")
    for version in (Version(2, 3), Version(1, 9)):
        add_weights(summary, make_weights(version))
    assert summary.newest is not None and summary.newest.version == Version(2, 3)


def test_losses_of_the_two_routes_are_kept_apart() -> None:
    summary = RunSummary("policy")
    add_feedback(summary, consumed(loss=0.5, chosen_logprob=-1.0, rejected_logprob=-2.0))
    add_feedback(summary, consumed(loss=3.0, chosen_logprob=-9.0, route="sft"))
    assert [point.mean for point in summary.dpo_loss[1].points()] == [0.5]
    assert [point.mean for point in summary.sft_loss[1].points()] == [3.0]
    assert [point.mean for point in summary.chosen[1].points()] == [-1.0]
    assert [point.mean for point in summary.rejected[1].points()] == [-2.0]


def test_what_the_learner_dropped_is_no_step_and_its_staleness_stands_apart() -> None:
    summary = RunSummary("policy")
    add_feedback(summary, consumed(staleness=20, reason="stale", loss=9.0))
    add_feedback(summary, consumed(staleness=2, loss=1.0))
    assert summary.dropped_staleness.values() == [(20, 1)]
    assert summary.trained_staleness.values() == [(2, 1)]
    assert [point.mean for point in summary.dpo_loss[1].points()] == [1.0]


def test_margins_and_routes_come_from_the_pairs() -> None:
    summary = RunSummary("policy")
    add_pair(summary, make_pair(0, margins=Margins(external=0.5, implicit=-1.0)))
    add_pair(summary, make_pair(1, rejected=None, margins=Margins()))
    assert summary.external.values() == [(0.5, 1)]
    assert summary.implicit.values() == [(-1.0, 1)]
    assert [(row.route, row.num_groups) for row in routed(summary)] == [("dpo", 1), ("sft", 1)]


def test_the_selectors_drops_are_routes_and_the_learners_are_not() -> None:
    summary = RunSummary("policy")
    add_feedback(summary, make_feedback(0, ending="dropped", stage="selector", route="drop", reason="tie"))
    add_feedback(summary, make_feedback(1, ending="dropped", stage="learner", route="dpo", reason="stale"))
    assert routed(summary) == [Routed("drop", "tie", 1)]
    assert summary.endings[Settled("dropped", "learner", "dpo", "stale")] == 1


def test_reasons_that_are_always_different_do_not_fill_the_table() -> None:
    summary = RunSummary("policy")
    for number in range(2 * MAX_REASONS):
        add_feedback(summary, make_feedback(number, ending="dead_lettered", reason=f"byte {number}"))
    assert len(summary.endings) == MAX_REASONS + 1
    assert summary.endings[Settled("dead_lettered", "test", "", OTHER)] == MAX_REASONS


def test_another_policys_records_are_left_out() -> None:
    summary = RunSummary("policy")
    add_feedback(summary, make_feedback(policy="other"))
    add_weights(summary, make_weights(policy="other"))
    add_scored(summary, make_scored(group=make_group(policy="other")))
    assert (len(summary.endings), summary.newest, summary.num_candidates) == (0, None, 0)
