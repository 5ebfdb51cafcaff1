from collections.abc import Callable, Iterator

import pytest

from actors.issuer import Issuer
from streaming import topics
from streaming.errors import SupersededError
from streaming.fencing import read_issuers
from streaming.heartbeat import Heartbeat
from streaming.log.protocol import Entry, Log, Output
from streaming.metrics import Metrics
from streaming.records import encode
from tests.builders import make_prompt
from tests.fakes import CrashingLog

Start = Callable[[], Issuer]


@pytest.fixture
def start(log: Log) -> Iterator[Start]:
    """Starts the scheduler once more, as its process does."""
    heartbeats: list[Heartbeat] = []

    def begin() -> Issuer:
        heartbeats.append(Heartbeat(log, Metrics("scheduler"), role="scheduler", interval_s=60))
        return Issuer(log, heartbeats[-1])

    yield begin
    for heartbeat in heartbeats:
        heartbeat.close()


class BlindLog(CrashingLog):
    """A real log that shows no role's state."""

    def newest(self, topic: str) -> dict[bytes, Entry]:
        return {}


def issue(log: Log, *numbers: int) -> None:
    requests = [make_prompt(number) for number in numbers]
    log.append([Output(topics.PROMPTS.name, one.prompt_id.encode(), encode(one)) for one in requests])


def test_a_newer_start_refuses_every_older_one(start: Start) -> None:
    first = start()
    first.refuse_to_be_second()
    second = start()
    second.refuse_to_be_second()
    assert second.claim > first.claim
    with pytest.raises(SupersededError, match="start 2 of this role is running, this is start 1"):
        first.refuse_to_be_second()


def test_of_two_starts_that_take_themselves_for_the_same_the_later_claim_is_right(log: Log, start: Start) -> None:
    """Both looked for the newest epoch before either had beaten: they have one epoch, and one key for their beats."""
    first = start()
    beats = Heartbeat(BlindLog(log), Metrics("scheduler"), role="scheduler", interval_s=60)
    assert beats.state.epoch == 1
    second = Issuer(log, beats)
    second.refuse_to_be_second()
    beats.close()
    with pytest.raises(SupersededError, match=f"claim {second.claim} to issue .* this start's, which is {first.claim}"):
        first.refuse_to_be_second()


def test_a_start_that_was_overtaken_before_it_claimed_claims_nothing(log: Log, start: Start) -> None:
    slow = Heartbeat(log, Metrics("scheduler"), role="scheduler", interval_s=60)
    heir = start()
    with pytest.raises(SupersededError):
        Issuer(log, slow)
    slow.close()
    heir.refuse_to_be_second()


def test_every_start_knows_the_fences_of_those_before(log: Log, start: Start) -> None:
    claims = []
    for number in range(3):
        claims.append(start().claim)
        issue(log, number)
    assert [fence.epoch for fence in read_issuers(log).fences] == claims


def test_starts_that_issue_nothing_leave_one_fence(log: Log, start: Start) -> None:
    issue(log, 0)
    newest = [start().claim for _ in range(20)][-1]
    assert [fence.epoch for fence in read_issuers(log).fences] == [newest]


def test_fences_that_retention_has_passed_are_forgotten(log: Log, start: Start) -> None:
    start()
    issue(log, *range(40))
    log.trim(log.end_offsets(topics.PROMPTS.name))
    issue(log, *range(40))
    second = start()
    assert [fence.epoch for fence in read_issuers(log).fences] == [second.claim]
