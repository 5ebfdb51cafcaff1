import random

import pytest

from streaming.selection import roles
from streaming.selection.roles import Rule
from tests.builders import make_candidate


def target(rewards: list[float], rule: Rule, quantile: float = 0.023) -> float:
    return roles.target(rewards, rule, num_sigmas=2.0, quantile=quantile)


def rejected(rewards: list[float], rule: Rule) -> int | None:
    table = dict(enumerate(rewards))
    return roles.reject(table, roles.choose(table, set()), target(rewards, rule))


def test_max_min_rejects_the_worst() -> None:
    assert rejected([0.3, 0.9, 0.1, 0.5], "max_min") == 2


def test_sweet_spot_aims_two_standard_deviations_below_the_mean_of_the_group() -> None:
    assert target([1.0, 3.0], "sweet_spot") == 0.0  # mu 2, sigma 1


def test_sweet_spot_rejects_the_nearest_and_not_the_worst() -> None:
    rewards = [*[10.0] * 18, 9.0, 7.0, -3.0]  # mu 9.2, sigma 2.8: the target is 3.5
    assert target(rewards, "sweet_spot") == pytest.approx(3.5, abs=0.1)
    assert rejected(rewards, "sweet_spot") == 19
    assert rejected(rewards, "max_min") == 20


@pytest.mark.parametrize("num_candidates", [2, 4, 8])
def test_up_to_eight_normal_rewards_all_rules_reject_the_worst(num_candidates: int) -> None:
    draw = random.Random(0)
    for _ in range(200):
        rewards = [draw.gauss(0, 1) for _ in range(num_candidates)]
        assert {rejected(rewards, rule) for rule in ("max_min", "sweet_spot", "quantile")} == {
            rewards.index(min(rewards))
        }


def test_sweet_spot_differs_from_the_worst_as_often_as_the_literature_says() -> None:
    draw = random.Random(0)
    groups = [[draw.gauss(0, 1) for _ in range(64)] for _ in range(400)]
    same = sum(rejected(rewards, "sweet_spot") == rewards.index(min(rewards)) for rewards in groups)
    assert same / 400 == pytest.approx(0.27, abs=0.06)


def test_a_quantile_lies_between_its_neighbours() -> None:
    assert roles.quantile_of([3.0, 1.0, 2.0], 0.25) == 1.5
    assert roles.quantile_of([3.0, 1.0, 2.0], 0.0) == 1.0
    assert roles.quantile_of([4.0], 0.5) == 4.0


def test_few_wrong_answers_are_still_found_although_right_ones_are_nearer_to_the_target() -> None:
    rewards = [*[1.0] * 63, 0.0]  # mu - 2 sigma is 0.74
    assert rejected(rewards, "sweet_spot") == 63


def test_among_equally_good_candidates_one_that_ended_by_itself_is_chosen() -> None:
    assert roles.choose({0: 1.0, 1: 1.0, 2: 1.0}, ended={1, 2}) == 1
    assert roles.choose({0: 1.0, 1: 1.0}, ended=set()) == 0
    assert roles.choose({0: 1.0, 1: 0.5}, ended={1}) == 0


def test_the_chosen_candidate_is_never_the_rejected_one() -> None:
    assert roles.reject({4: 1.0}, 4, aim=0.0) is None
    assert roles.reject({4: 1.0, 6: 1.0}, 4, aim=0.0) == 6


def test_of_equal_texts_the_first_stays() -> None:
    candidates = [make_candidate(text) for text in ("a", "b", "a", "c", "b")]
    assert roles.distinct(candidates, range(5)) == [0, 1, 3]
    assert roles.distinct(candidates, [2, 4]) == [2, 4]


def test_of_equal_texts_one_that_ended_by_itself_stays() -> None:
    candidates = [make_candidate("a", has_eos=False), make_candidate("b"), make_candidate("a"), make_candidate("a")]
    assert roles.distinct(candidates, range(4)) == [1, 2]
