import pytest

from actors.pacing import Order, Outstanding, total_requests
from tests.builders import make_feedback, make_prompt


def issued(*numbers: int) -> Outstanding:
    outstanding = Outstanding()
    for number in numbers:
        outstanding.issue(make_prompt(number, ordinal=number))
    return outstanding


def test_nothing_is_ever_further_ahead_than_the_pipeline_is_deep():
    outstanding = issued(0, 1, 2)
    assert outstanding.room(4, None) == 1
    assert outstanding.room(3, None) == 0
    assert outstanding.room(2, None) == 0


@pytest.mark.parametrize("ending", ["consumed", "trained", "dropped", "dead_lettered"])
def test_every_ending_frees_a_slot(ending):
    outstanding = issued(0, 1)
    assert outstanding.end(make_feedback(0, ending=ending))
    assert outstanding.room(2, None) == 1


def test_a_repeated_ending_frees_no_second_slot():
    outstanding = issued(0, 1)
    outstanding.end(make_feedback(0, ending="consumed"))
    assert not outstanding.end(make_feedback(0, ending="trained"))
    assert outstanding.num_train == 1


def test_a_request_has_ended_when_all_its_examples_have():
    outstanding = issued(0)
    assert not outstanding.end(make_feedback(0, index=1, num_examples=2))
    assert not outstanding.end(make_feedback(0, index=1, num_examples=2))
    assert outstanding.end(make_feedback(0, index=0, num_examples=2))


def test_a_second_content_of_a_group_ends_nothing():
    outstanding = issued(0)
    assert not outstanding.end(make_feedback(0, ending="dropped", reason="superseded"))
    assert outstanding.num_train == 1


def test_evaluation_takes_no_slot_and_no_place_in_the_order():
    outstanding = issued(0)
    outstanding.issue(make_prompt(1, purpose="eval", round=0))
    assert (outstanding.free_numbers(1), outstanding.free_ordinals(1)) == ([2], [1])
    assert (outstanding.num_train, outstanding.num_eval) == (1, 1)
    outstanding.end(make_feedback(1, ending="evaluated"))
    assert outstanding.num_eval == 0


def test_issuing_again_in_any_order_rebuilds_the_same_state():
    requests = [make_prompt(n, ordinal=n) for n in range(5)]
    outstanding = Outstanding()
    for request in [*requests[::-1], *requests]:
        outstanding.issue(request)
    for number in (4, 1):
        outstanding.end(make_feedback(number))
    assert (outstanding.free_numbers(1), outstanding.free_ordinals(1), outstanding.num_train) == ([5], [5], 3)


def test_what_was_lost_on_the_way_is_issued_before_anything_new():
    """Numbers 1 and 3 were of training requests, 4 of an evaluation: none of them became durable."""
    outstanding = issued(0, 2)
    outstanding.issue(make_prompt(5, ordinal=4))
    assert (outstanding.free_numbers(4), outstanding.free_ordinals(3)) == ([1, 3, 4, 6], [1, 3, 5])
    assert (outstanding.room(9, 5), outstanding.room(4, 5), outstanding.num_issued) == (2, 1, 3)
    assert not outstanding.is_exhausted(5)


def test_where_nobody_can_say_what_was_issued_nothing_is_issued_again():
    outstanding = issued(3, 5)
    outstanding.leave_no_gaps()
    assert (outstanding.free_numbers(2), outstanding.free_ordinals(2)) == ([6, 7], [6, 7])


def test_what_has_ended_before_retention_takes_no_slot():
    outstanding = issued(0, 1)
    outstanding.issue(make_prompt(2, purpose="eval", round=0))
    for number in (0, 2, 7):
        outstanding.forget(number)
    assert (outstanding.num_train, outstanding.num_eval, outstanding.free_numbers(1)) == (1, 0, [3])


def test_the_data_ends_after_its_total_and_not_before():
    outstanding = issued(0, 1)
    assert outstanding.room(8, 3) == 1
    assert not outstanding.is_exhausted(3)
    assert outstanding.is_exhausted(2)
    assert outstanding.room(8, 2) == 0
    assert not outstanding.is_exhausted(None)


def test_every_pass_holds_every_prompt_once_in_another_order():
    order = Order(num_prompts=50, seed=0, total=None)
    passes = [[order.index(50 * p + i) for i in range(50)] for p in range(3)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_the_order_is_a_function_of_the_seed_and_the_number_alone():
    first = Order(num_prompts=7, seed=3, total=None)
    expected = [first.index(i) for i in range(21)]
    again = Order(num_prompts=7, seed=3, total=None)
    assert [again.index(i) for i in reversed(range(21))] == expected[::-1]
    assert expected[:7] == [6, 3, 4, 1, 5, 0, 2]  # written down: a release that changes it breaks every resume


def test_without_a_seed_the_order_is_the_files():
    order = Order(num_prompts=3, seed=None, total=None)
    assert [order.index(i) for i in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("max_passes", "max_requests", "total"),
    [(None, None, None), (1.0, None, 10), (2.5, None, 25), (0.01, None, 1), (None, 7, 7), (1.0, 7, 7), (0.5, 7, 5)],
)
def test_the_smaller_limit_ends_the_data(max_passes, max_requests, total):
    assert total_requests(10, max_passes, max_requests) == total
