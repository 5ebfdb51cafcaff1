from typing import Any

from streaming.evaluation import Measurement, best_of, measurements, newest_of
from streaming.records import Feedback, Version
from tests.builders import make_feedback

OLD, NEW = Version(1, 4), Version(2, 3)


def evaluated(number: int, reward: float, *, version: Version | None = OLD, round: int = 0, **fields: Any) -> Feedback:
    return make_feedback(
        number, ending="evaluated", mean_reward=reward, round=round, round_size=2, version=version, **fields
    )


def test_a_round_is_complete_when_every_prompt_was_measured() -> None:
    assert measurements([evaluated(0, 1.0), evaluated(1, 0.5)]) == [Measurement(0, OLD, 0.75, 2, 2, True)]


def test_versions_are_never_mixed_in_a_measurement() -> None:
    found = measurements([evaluated(1, 0.5, version=NEW), evaluated(0, 1.0)])
    assert found == [Measurement(0, OLD, 1.0, 1, 2, False), Measurement(0, NEW, 0.5, 1, 2, False)]


def test_an_answer_that_spans_an_update_belongs_to_no_measurement() -> None:
    assert measurements([evaluated(0, 1.0, version=None)]) == []


def test_repeated_feedback_counts_once() -> None:
    found = measurements([evaluated(0, 1.0), evaluated(0, 0.0), evaluated(1, 1.0)])
    assert found == [Measurement(0, OLD, 1.0, 2, 2, True)]


def test_other_endings_measure_nothing() -> None:
    assert measurements([make_feedback(0), make_feedback(1, ending="dropped", round=0)]) == []


def measured(round: int, mean: float, *, count: int = 2) -> Measurement:
    return Measurement(round, Version(1, 8 * round), mean, count, 2, count == 2)


def test_the_best_is_the_highest_whole_measurement_and_the_earliest_of_equals() -> None:
    rounds = [measured(0, 0.1), measured(1, 0.5), measured(2, 0.5), measured(3, 0.9, count=1)]
    assert best_of(rounds) == rounds[1]
    assert newest_of(rounds) == rounds[2]
    assert best_of([]) is None
    assert newest_of(rounds[3:]) is None
