import pytest

from actors.rounds import MAX_REPEATS, Rounds
from streaming.records import Version
from tests.builders import make_feedback, make_prompt

V = Version


def issue(rounds: Rounds, version: Version, *numbers: int) -> None:
    number = rounds.next_number
    for request in numbers:
        rounds.issue(make_prompt(request, purpose="eval", round=number, round_size=len(numbers), min_version=version))


def end(rounds: Rounds, request: int, version: Version | None, reward: float | None = 1.0, *, round: int = 0) -> None:
    fields = {"round": round, "round_size": 2, "version": version, "mean_reward": reward}
    rounds.end(make_feedback(request, ending="evaluated", **fields))


def measured(version: Version, reward: float = 1.0) -> Rounds:
    """Rounds with one measurement of this version."""
    rounds = Rounds()
    rounds.publish(version)
    issue(rounds, version, 0, 1)
    end(rounds, 0, version, reward)
    end(rounds, 1, version, reward)
    return rounds


def due(rounds: Rounds, *, is_final: bool = False) -> Version | None:
    return rounds.due(eval_every=8, is_final=is_final)


def test_the_first_published_version_is_measured_at_once():
    rounds = Rounds()
    assert due(rounds) is None
    rounds.publish(V(1, 0))
    assert due(rounds) == V(1, 0)


def test_a_round_is_due_when_the_number_has_grown_by_eval_every():
    rounds = measured(V(1, 0))
    rounds.publish(V(1, 7))
    assert due(rounds) is None
    rounds.publish(V(1, 8))
    assert due(rounds) == V(1, 8)


def test_one_round_at_a_time():
    rounds = Rounds()
    rounds.publish(V(1, 0))
    issue(rounds, V(1, 0), 0, 1)
    rounds.publish(V(1, 50))
    end(rounds, 0, V(1, 0))
    assert due(rounds, is_final=True) is None
    end(rounds, 1, V(1, 0))
    assert due(rounds) == V(1, 50)


def test_the_final_version_is_measured_once_even_if_it_is_near():
    rounds = measured(V(1, 0))
    assert due(rounds, is_final=True) is None
    rounds.publish(V(1, 1))
    assert due(rounds, is_final=True) == V(1, 1)


def test_the_version_that_was_sampled_counts_not_the_one_asked_for():
    rounds = Rounds()
    rounds.publish(V(1, 0))
    issue(rounds, V(1, 0), 0, 1)
    rounds.publish(V(1, 3))
    end(rounds, 0, V(1, 3))
    end(rounds, 1, V(1, 3))
    assert rounds.newest is not None and rounds.newest.version == V(1, 3)
    rounds.publish(V(1, 10))
    assert due(rounds) is None


def test_a_restarted_learner_is_measured_when_its_number_has_grown_beyond_the_last_measured_one():
    rounds = measured(V(1, 20))
    rounds.publish(V(2, 16))
    assert due(rounds) is None
    rounds.publish(V(2, 28))
    assert due(rounds) == V(2, 28)


@pytest.mark.parametrize("second", [(V(1, 1), 1.0), (None, 1.0), (V(1, 0), None)])
def test_a_round_that_is_not_one_versions_whole_measurement_is_repeated(second):
    rounds = Rounds()
    rounds.publish(V(1, 0))
    issue(rounds, V(1, 0), 0, 1)
    end(rounds, 0, V(1, 0))
    end(rounds, 1, *second)
    assert rounds.newest is None
    assert due(rounds) == V(1, 0)


def test_a_dropped_request_breaks_its_round_and_does_not_hold_it_up():
    rounds = Rounds()
    rounds.publish(V(1, 0))
    issue(rounds, V(1, 0), 0, 1)
    end(rounds, 0, V(1, 0))
    rounds.end(make_feedback(1, ending="dropped", reason="reward_missing"))
    assert not rounds.in_flight
    assert due(rounds) == V(1, 0)


def test_rounds_that_break_again_and_again_wait_for_their_turn_and_do_not_hold_up_the_end():
    rounds = Rounds()
    rounds.publish(V(1, 0))
    for number in range(MAX_REPEATS + 1):
        assert due(rounds) == V(1, 0)
        issue(rounds, V(1, 0), number)
        rounds.end(make_feedback(number, ending="dead_lettered"))
    assert due(rounds) is None
    assert due(rounds, is_final=True) is None
    rounds.publish(V(1, 8))
    assert due(rounds) == V(1, 8)


def test_a_prompt_sampled_again_after_a_crash_can_complete_the_newer_versions_measurement():
    rounds = Rounds()
    rounds.publish(V(1, 0))
    issue(rounds, V(1, 0), 0, 1)
    end(rounds, 0, V(1, 0), 0.0)
    end(rounds, 1, V(1, 2), 0.5)
    end(rounds, 0, V(1, 2), 0.7)
    assert rounds.newest is not None
    assert (rounds.newest.version, rounds.newest.mean) == (V(1, 2), 0.6)


def test_a_torn_append_breaks_its_round_and_the_next_one_goes_ahead():
    rounds = Rounds()
    rounds.publish(V(1, 0))
    rounds.issue(make_prompt(0, purpose="eval", round=0, round_size=2, min_version=V(1, 0)))
    end(rounds, 0, V(1, 0))
    assert rounds.newest is None
    assert due(rounds) == V(1, 0)


def test_the_best_is_the_highest_and_of_equals_the_earliest():
    rounds = measured(V(1, 0), 0.5)
    for round, (version, reward) in enumerate([(V(1, 8), 0.9), (V(1, 16), 0.7), (V(1, 24), 0.9)], start=1):
        rounds.publish(version)
        issue(rounds, version, 2 * round, 2 * round + 1)
        end(rounds, 2 * round, version, reward, round=round)
        end(rounds, 2 * round + 1, version, reward, round=round)
    assert rounds.best is not None and rounds.best.version == V(1, 8)
    assert rounds.newest is not None and rounds.newest.version == V(1, 24)


def test_every_version_that_a_round_might_measure_is_leased_until_it_is_over():
    rounds = measured(V(1, 0))
    rounds.publish(V(1, 8))
    assert rounds.leases() == [V(1, 0)]
    issue(rounds, V(1, 8), 2, 3)
    rounds.publish(V(1, 9))
    assert rounds.leases() == [V(1, 0), V(1, 8), V(1, 9)]
    end(rounds, 2, V(1, 9), 2.0, round=1)
    end(rounds, 3, V(1, 9), 2.0, round=1)
    assert rounds.leases() == [V(1, 9)]


def test_the_order_in_which_a_restart_hears_of_rounds_does_not_matter():
    rounds = Rounds()
    for request, round in [(3, 1), (0, 0), (2, 1), (1, 0)]:
        rounds.issue(make_prompt(request, purpose="eval", round=round, round_size=2, min_version=V(1, 8 * round)))
    for request in (3, 2, 1, 0):
        end(rounds, request, V(1, 8 * (request // 2)), round=request // 2)
    assert rounds.next_number == 2
    assert rounds.newest is not None and rounds.newest.version == V(1, 8)
    assert rounds.best is not None and rounds.best.version == V(1, 0)
    rounds.publish(V(1, 9))
    assert due(rounds) is None


def test_a_version_that_an_overtaken_learner_announces_late_is_not_measured():
    rounds = measured(V(2, 0))
    rounds.publish(V(2, 9))
    rounds.publish(V(1, 99))
    assert due(rounds) == V(2, 9)
