from typing import Any

import msgspec
import pytest

from deploy.balance import told
from streaming.audit import Balance, audit, audit_log
from streaming.dead_letters import MARK
from streaming.keys import pair_key
from streaming.log.protocol import Log, Output
from streaming.records import DeadLetter, Feedback, decode, encode
from streaming.stage import dead_letter
from tests.builders import make_entry, make_feedback, make_pair, make_prompt


def balance(num_requests: int, *feedback: Feedback) -> Balance:
    return audit([make_prompt(number) for number in range(num_requests)], feedback, policy="policy")


def dropped(number: int, reason: str, **fields: Any) -> Feedback:
    return make_feedback(number, ending="dropped", reason=reason, **fields)


def test_every_request_with_one_ending_balances() -> None:
    found = balance(4, make_feedback(0), dropped(1, "tie"), dropped(2, "tie"), make_feedback(3, ending="evaluated"))
    assert found.is_balanced
    assert found.endings == {("trained", ""): 1, ("dropped", "tie"): 2, ("evaluated", ""): 1}
    assert found.count("dropped") == 2


def test_a_request_without_feedback_has_not_ended() -> None:
    found = balance(2, make_feedback(1))
    assert (found.is_balanced, found.not_ended) == (False, [0])


def test_a_consumed_request_has_not_ended() -> None:
    found = balance(1, make_feedback(0, ending="consumed", epoch=1, step=3))
    assert (found.not_ended, found.consumed) == ([0], [0])


def test_training_at_two_steps_is_found() -> None:
    found = balance(1, make_feedback(0, epoch=1, step=3), make_feedback(0, epoch=2, step=4))
    assert found.ended_twice == [0]
    assert not found.is_balanced


def test_the_same_ending_written_again_after_a_crash_counts_once() -> None:
    found = balance(1, make_feedback(0, epoch=1, step=3), make_feedback(0, epoch=2, step=3))
    assert found.is_balanced
    assert found.endings == {("trained", ""): 1}


def test_two_different_endings_of_one_example_are_found() -> None:
    assert balance(1, dropped(0, "tie"), make_feedback(0)).ended_twice == [0]


def test_a_superseded_second_content_ends_nothing() -> None:
    assert balance(1, dropped(0, "superseded")).not_ended == [0]
    assert balance(1, make_feedback(0), dropped(0, "superseded")).is_balanced


LATE_DROP = dropped(0, "tie", stage="selector", content_hash="second")
"""Of a copy that was sampled again and came so late that nobody remembered the first."""


@pytest.mark.parametrize("first", [make_feedback(0, step=3, content_hash="first"), dropped(0, "no_spread")])
def test_a_late_second_content_that_is_dropped_ends_nothing(first: Feedback) -> None:
    """It counted as a second ending of its request."""
    first = msgspec.structs.replace(first, content_hash="first")
    found = balance(1, first, LATE_DROP)
    assert (found.is_balanced, found.endings) == (True, {(first.ending, first.reason): 1})


def test_a_second_content_that_is_dropped_before_the_first_is_trained_ends_nothing() -> None:
    found = balance(1, LATE_DROP, make_feedback(0, step=3, content_hash="first"), LATE_DROP)
    assert (found.is_balanced, found.endings) == (True, {("trained", ""): 1})


def test_what_the_learner_settled_ends_once_whatever_its_content() -> None:
    trained = make_feedback(0, stage="learner", step=3, content_hash="first")
    assert balance(1, trained, msgspec.structs.replace(trained, content_hash="second", step=4)).ended_twice == [0]
    stale = dropped(0, "stale", stage="learner", step=4, content_hash="second")
    assert balance(1, trained, stale).ended_twice == [0]
    assert balance(1, trained, dropped(0, "tie", content_hash="first")).ended_twice == [0]


def test_a_prompt_that_is_forgotten_after_its_request_has_ended_does_not_end_it_again() -> None:
    """A generator that was killed before it committed finds the prompt gone, and drops a request long trained on."""
    trained, forgotten = make_feedback(0, step=3, content_hash="first"), dropped(0, "forgotten", stage="generator")
    for feedback in ((trained, forgotten), (forgotten, trained)):
        assert balance(1, *feedback).endings == {("trained", ""): 1}
        assert balance(1, *feedback).is_balanced
    assert balance(1, forgotten).endings == {("dropped", "forgotten"): 1}


@pytest.mark.parametrize(("indices", "has_ended"), [([0], False), ([1, 1], False), ([0, 1], True)])
def test_a_request_has_ended_when_all_its_examples_have(indices: list[int], has_ended: bool) -> None:
    found = balance(1, *(make_feedback(0, index=index, num_examples=2) for index in indices))
    assert found.is_balanced is has_ended
    assert found.ended_twice == []


def test_a_request_written_twice_counts_once() -> None:
    assert audit([make_prompt(0), make_prompt(0)], [make_feedback(0)], policy="policy").num_requests == 1


def test_a_redriven_dead_letter_ends_once_more_and_nothing_else_is_taken_back() -> None:
    dead, again = make_feedback(0, ending="dead_lettered"), make_feedback(0, ending="redriven")
    assert balance(1, dead, again).not_ended == [0]
    assert balance(1, dead, again, make_feedback(0, step=1)).endings == {("trained", ""): 1}
    assert balance(1, dead, again, dead).is_balanced
    assert balance(1, make_feedback(0, step=1), again).endings == {("trained", ""): 1}
    assert balance(1, make_feedback(0, step=1), again, make_feedback(0, step=2)).ended_twice == [0]
    assert balance(1, dead, make_feedback(0, step=1)).ended_twice == [0]


def test_another_policy_has_its_own_books() -> None:
    found = balance(1, make_feedback(0, policy="other"))
    assert found.not_ended == [0]
    assert found.unknown == []


def test_feedback_about_a_request_that_is_not_there_is_shown() -> None:
    assert balance(1, make_feedback(0), make_feedback(7)).unknown == [7]


def test_a_log_is_audited_as_it_lies_there(log: Log) -> None:
    log.append(Output("prompts", b"%d" % number, encode(make_prompt(number))) for number in range(50))
    log.append(Output("feedback", b"%d" % number, encode(dropped(number, "tie"))) for number in range(1, 50))
    found = audit_log(log, policy="policy")
    assert (found.num_requests, found.count("dropped"), found.not_ended) == (50, 49, [0])


def test_an_empty_log_balances(log: Log) -> None:
    assert audit_log(log, policy="policy").is_balanced


def test_bytes_in_the_books_that_are_no_record_are_named(log: Log) -> None:
    log.append([Output("feedback", b"k", b"junk"), Output("prompts", b"k", encode(make_prompt(0)))])
    found = audit_log(log, policy="policy")
    assert found.not_ended == [0]
    assert [place.split("/")[0] for place in found.unreadable] == ["feedback"]


@pytest.mark.parametrize("topic", ["candidates", "scored", "pairs.policy", "feedback"])
def test_what_has_not_ended_and_is_a_dead_letter_is_named_as_one(log: Log, topic: str) -> None:
    """It was called lost, as if nobody knew where it is."""
    log.append([Output("prompts", b"p", encode(make_prompt(number))) for number in range(3)])
    key = pair_key(make_pair(1)) if topic.startswith("pairs") else make_pair(1).group_id.encode()
    letter = dead_letter(make_entry(b"junk", topic=topic, key=key), "it is no record", "stage")
    log.append([letter])
    found = audit_log(log, policy="policy")
    assert (found.not_ended, found.dead, found.nameless) == ([0, 1, 2], [1], [])
    assert "of these, dead letters whose end nobody told: 1 (requests 1)" in told(found, final=True)
    log.append([dead_letter(make_entry(b"junk", topic=topic, key=b"?", offset=7), "it is no record", "stage")])
    assert audit_log(log, policy="policy").nameless == [f"{topic}/0@7"]
    mark = msgspec.structs.replace(decode(DeadLetter, letter.value), stage=MARK, value=b"")
    log.append([letter._replace(value=encode(mark))])
    assert audit_log(log, policy="policy").dead == []


def test_what_ends_before_the_selectors_ends_for_every_policy_and_what_a_learner_ends_for_its_own() -> None:
    feedback = [
        make_feedback(0, ending="dead_lettered", stage="generator"),
        make_feedback(1, ending="evaluated", stage="scorer"),
        make_feedback(2, stage="learner"),
    ]
    found = audit([make_prompt(number) for number in range(3)], feedback, policy="b")
    assert found.not_ended == [2]
    assert found.endings == {("dead_lettered", ""): 1, ("evaluated", ""): 1}
