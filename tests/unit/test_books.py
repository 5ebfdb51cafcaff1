import random
from typing import Any

import pytest

from streaming.audit import Balance, audit_log
from streaming.books import Bookkeeper, carry, newest_carried
from streaming.log.protocol import Log, Output
from streaming.records import Feedback, encode
from tests.builders import make_feedback, make_prompt


def issue(log: Log, *numbers: int) -> None:
    requests = [make_prompt(number, ordinal=number) for number in numbers]
    log.append(Output("prompts", request.prompt_id.encode(), encode(request)) for request in requests)


def tell(log: Log, *feedback: Feedback) -> None:
    log.append(Output("feedback", one.group_id.encode(), encode(one)) for one in feedback)


def balance(log: Log) -> Balance:
    return audit_log(log, policy="policy")


def forget_everything(log: Log) -> None:
    for topic in ("prompts", "feedback"):
        log.trim(log.end_offsets(topic))


def dead(number: int, ending: str = "dead_lettered") -> Feedback:
    return make_feedback(number, ending=ending, stage="scorer", reason="failed")


def numbers_of(found: Balance) -> Any:
    return found[:6]


@pytest.mark.parametrize("kept", [0, 3, 4096])
def test_what_retention_takes_stays_in_the_balance(log: Log, kept: int) -> None:
    issue(log, *range(10))
    tell(log, *(make_feedback(number, step=number) for number in range(6)))
    tell(log, make_feedback(6, ending="dropped", reason="tie"), make_feedback(7, ending="consumed", step=9))
    before = balance(log)
    carry(log, ["policy"], kept=kept)
    forget_everything(log)
    after = balance(log)
    assert numbers_of(after) == numbers_of(before)
    assert after.carried_s is not None and after.is_whole
    tell(log, make_feedback(7, step=9))
    issue(log, 10)
    assert (balance(log).count("trained"), balance(log).not_ended) == (7, [8, 9, 10])


def test_without_a_carried_balance_the_audit_says_that_it_is_not_whole(log: Log) -> None:
    issue(log, 0)
    tell(log, make_feedback(0))
    forget_everything(log)
    assert not balance(log).is_whole


def test_a_balance_that_was_carried_too_long_ago_is_not_whole(log: Log) -> None:
    issue(log, 0)
    carry(log, ["policy"])
    issue(log, *range(1, 20))
    forget_everything(log)
    assert not balance(log).is_whole


def test_what_was_lost_once_stays_lost_however_often_the_balance_is_carried(log: Log) -> None:
    """The next balance had places beyond the hole, and the audit called the books whole again."""
    issue(log, 0)
    carry(log, ["policy"])
    issue(log, *range(1, 20))
    forget_everything(log)
    issue(log, 20)
    for _ in range(2):
        carry(log, ["policy"])
        assert not balance(log).is_whole


def test_while_nothing_is_trimmed_every_ending_is_compared(log: Log) -> None:
    issue(log, *range(10))
    tell(log, *(make_feedback(number, step=1) for number in range(10)))
    carry(log, ["policy"], kept=0)
    tell(log, make_feedback(0, step=2))
    assert balance(log).ended_twice == [0]
    assert balance(log).carried_s is None


def test_a_second_ending_of_a_kept_request_is_found_past_retention(log: Log) -> None:
    issue(log, *range(10))
    tell(log, *(make_feedback(number, step=1) for number in range(10)))
    carry(log, ["policy"], kept=5)
    forget_everything(log)
    tell(log, make_feedback(9, step=2), make_feedback(0, step=1))
    assert (balance(log).ended_twice, balance(log).count("trained")) == ([9], 10)


def test_a_request_that_ended_twice_stays_found(log: Log) -> None:
    issue(log, 0)
    tell(log, make_feedback(0, step=1), make_feedback(0, step=2))
    carry(log, ["policy"], kept=0)
    forget_everything(log)
    assert balance(log).ended_twice == [0]


def test_a_dead_letter_sent_again_after_its_request_was_closed_ends_once_more(log: Log) -> None:
    issue(log, *range(10))
    tell(log, dead(3), *(make_feedback(number) for number in range(10) if number != 3))
    carry(log, ["policy"], kept=0)
    forget_everything(log)
    tell(log, dead(3, "redriven"))
    assert (balance(log).not_ended, balance(log).count("dead_lettered")) == ([3], 0)
    carry(log, ["policy"], kept=0)
    tell(log, make_feedback(3, step=4))
    assert (balance(log).is_balanced, balance(log).count("trained")) == (True, 10)


def test_each_policy_has_a_carried_balance_of_its_own(log: Log) -> None:
    issue(log, 0)
    tell(log, make_feedback(0), make_feedback(0, policy="b", ending="dropped", reason="tie"))
    carry(log, ["policy", "b"])
    forget_everything(log)
    assert balance(log).endings == {("trained", ""): 1}
    assert audit_log(log, policy="b").endings == {("dropped", "tie"): 1}


def test_a_carried_balance_knows_the_next_ordinal(log: Log) -> None:
    issue(log, *range(7))
    carry(log, ["policy"])
    carried = newest_carried(log, "policy")
    assert carried is not None and (carried.next_ordinal, carried.issued) == (7, [(0, 7)])


def test_a_carried_balance_stays_small(log: Log) -> None:
    issue(log, *range(20_000))
    tell(log, *(make_feedback(number, step=number) for number in range(20_000)))
    carry(log, ["policy"])
    carried = newest_carried(log, "policy")
    assert carried is not None and len(encode(carried)) < 300_000


def test_a_carried_balance_that_is_no_record_is_passed_over(log: Log) -> None:
    issue(log, 0)
    log.append([Output("books", b"policy", b"junk")])
    carry(log, ["policy"])
    assert newest_carried(log, "policy") is not None


@pytest.mark.parametrize("seed", range(10))
def test_however_often_it_is_carried_and_trimmed_the_balance_is_that_of_the_whole_log(log: Log, seed: int) -> None:
    """Events in a random order, carried and trimmed at random moments, against one reading of everything."""
    chance = random.Random(seed)
    from streaming.audit import audit

    requests, told = [], []
    for number in range(60):
        requests.append(make_prompt(number, ordinal=number))
        issue(log, number)
        for _ in range(chance.randrange(4)):
            about = chance.randrange(number + 1)
            one = chance.choice([dead(about), dead(about, "redriven"), make_feedback(about, ending="consumed")])
            told.append(one)
            tell(log, one)
        if chance.random() < 0.2:
            carry(log, ["policy"], kept=60)
            if chance.random() < 0.5:
                forget_everything(log)
    assert numbers_of(balance(log)) == numbers_of(audit(requests, told, policy="policy"))


def test_a_bookkeeper_carries_when_it_ends(log: Log) -> None:
    issue(log, 0)
    keeper = Bookkeeper(log, ["policy"])
    tell(log, make_feedback(0))
    keeper.close()
    forget_everything(log)
    assert balance(log).count("trained") == 1
