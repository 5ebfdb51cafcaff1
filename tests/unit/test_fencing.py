from typing import Any

import pytest

from streaming import topics
from streaming.audit import audit_log
from streaming.errors import SupersededError
from streaming.fencing import (
    CLAIM,
    NUM_KEYS,
    Fences,
    Issuers,
    claim_of,
    epoch_key,
    read_fences,
    read_issuers,
    without_claim,
)
from streaming.heartbeat import Heartbeat, refuse_to_be_second, role_states
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import Fence, PromptRequest, RoleState, Version, WeightVersion, decode, encode
from tests.builders import make_entry, make_feedback, make_prompt, make_role, make_weights

HEIR = make_weights(Version(2, 5), fences=[Fence(epoch=2, ends=[(0, 10), (1, 0)])])


def announce(log: Log, *weights: WeightVersion) -> None:
    """As a learner of the version's epoch does."""
    log.append(
        Output(topics.WEIGHTS.name, epoch_key(f"{one.policy}/full", one.version.epoch), encode(one)) for one in weights
    )


def beat(log: Log, state: RoleState) -> None:
    log.append([Output(topics.ROLES.name, epoch_key(state.role_id, state.epoch), encode(state))])


@pytest.mark.parametrize(
    ("partition", "offset", "fields", "is_void"),
    [
        (0, 9, {"epoch": 1}, False),  # told before the heir began
        (0, 10, {"epoch": 1}, True),
        (1, 0, {"epoch": 1}, True),
        (0, 10, {"epoch": 2}, False),  # the heir's own
        (0, 10, {"epoch": 1, "told_by": 2}, False),  # a step of the older epoch, told by its heir
        (0, 10, {"epoch": 1, "told_by": 1}, True),
        (0, 10, {"epoch": 3}, False),
        (0, 10, {}, False),  # of another stage
        (7, 10, {"epoch": 1}, False),  # the topic had no such partition then
        (0, 10, {"epoch": 1, "policy": "other"}, False),
    ],
)
def test_what_an_older_epoch_tells_behind_the_fence_is_void(
    partition: int, offset: int, fields: dict[str, Any], is_void: bool
) -> None:
    entry = make_entry(partition=partition, offset=offset)
    assert Fences([HEIR]).is_void(make_feedback(0, **fields), entry) is is_void


def test_every_older_epoch_has_its_own_fence() -> None:
    fences = Fences([make_weights(Version(3, 0), fences=[*HEIR.fences, Fence(epoch=3, ends=[(0, 20)])])])
    assert fences.is_void(make_feedback(0, epoch=1), make_entry(offset=10))
    assert not fences.is_void(make_feedback(0, epoch=2), make_entry(offset=19))
    assert fences.is_void(make_feedback(0, epoch=2), make_entry(offset=20))


def test_what_a_zombie_announces_replaces_nothing_of_its_heir(log: Log) -> None:
    announce(log, make_weights(Version(1, 7)), HEIR, make_weights(Version(1, 8)))
    assert len(log.newest(topics.WEIGHTS.name)) == 2
    assert read_fences(log).is_void(make_feedback(0, epoch=1), make_entry(offset=10))


def test_keys_stay_few_however_often_a_role_starts() -> None:
    assert len({epoch_key("learner-0", epoch) for epoch in range(1000)}) == NUM_KEYS


def test_a_zombie_in_the_books_changes_nothing(log: Log) -> None:
    """The same example was told as trained by the zombie and by its heir, at different steps."""
    feedback = topics.FEEDBACK.name
    log.append([Output(topics.PROMPTS.name, b"p", encode(make_prompt(0)))])
    ends = [(number, end) for (_, number), end in log.end_offsets(feedback).items()]
    log.append([Output(feedback, b"g", encode(make_feedback(0, epoch=1, step=9)))])
    log.append([Output(feedback, b"g", encode(make_feedback(0, epoch=2, step=4)))])
    assert audit_log(log, policy="policy").ended_twice == [0]
    announce(log, make_weights(Version(2, 0), fences=[Fence(epoch=2, ends=ends)]))
    assert audit_log(log, policy="policy").is_balanced


def test_the_state_of_a_role_is_that_of_its_newest_start_whoever_beats_last(log: Log) -> None:
    beat(log, make_role("learner", epoch=2, health="stopped", time_s=1.0))
    beat(log, make_role("learner", epoch=1, health="ready", time_s=99.0))
    assert role_states(log)["learner-0"].health == "stopped"


def test_a_start_that_follows_a_zombies_beat_is_newer_than_the_heir(log: Log) -> None:
    beat(log, make_role("scorer", epoch=4))
    beat(log, make_role("scorer", epoch=3))
    heartbeat = Heartbeat(log, Metrics("scorer"), role="scorer")
    assert heartbeat.state.epoch == 5
    heartbeat.close()


def test_a_state_under_the_key_of_an_older_release_is_read(log: Log) -> None:
    log.append([Output(topics.ROLES.name, b"scorer-0", encode(make_role("scorer", epoch=7)))])
    assert role_states(log)["scorer-0"].epoch == 7


def test_a_role_sees_that_a_newer_start_of_it_runs() -> None:
    own = make_role("scheduler", epoch=1)
    refuse_to_be_second(own, {})
    refuse_to_be_second(own, {"scheduler-0": own, "learner-0": make_role("learner", epoch=9)})
    with pytest.raises(SupersededError, match="start 2 of this role is running, this is start 1"):
        refuse_to_be_second(own, {"scheduler-0": make_role("scheduler", epoch=2)})


@pytest.mark.parametrize(
    ("claim", "offset", "newest", "verdict"),
    [
        (4, 9, 8, "counts"),  # issued before the heir took over
        (4, 10, 8, "void"),
        (8, 10, 8, "counts"),  # the heir's own
        (None, 99, 9, "counts"),  # an older release's, or sent by a person
        (8, 99, 9, "open"),  # a third start has claimed, and not said where it took over
        (4, 99, 9, "void"),  # which is of no matter to what is void already
        (9, 99, 9, "counts"),
    ],
)
def test_a_request_of_an_older_claim_counts_before_the_fence_only(
    claim: int | None, offset: int, newest: int, verdict: str
) -> None:
    issuers = Issuers(newest, [Fence(epoch=8, ends=[(0, 10)])])
    assert issuers.verdict(claim, make_entry(offset=offset)) == verdict


def test_before_the_first_claim_every_request_counts() -> None:
    assert Issuers().verdict(None, make_entry()) == Issuers().verdict(7, make_entry()) == "counts"


def test_the_newest_claims_fences_are_right_whoever_beats_last(log: Log) -> None:
    """A scheduler that woke up when its heir had announced tells its own fence late: nobody has ever kept to it."""
    claims = [
        offset for _, offset in (log.append([Output(topics.ROLES.name, CLAIM, encode(make_role()))])[0] for _ in "ab")
    ]
    fences = [Fence(epoch=claim, ends=[(0, 10 * claim)]) for claim in claims]
    beat(log, make_role("scheduler", epoch=2, fences=fences[1:]))
    beat(log, make_role("scheduler", epoch=1, fences=fences[:1]))
    found = read_issuers(log)
    assert (found.newest, found.fences) == (claims[1], fences[1:])


def test_a_zombies_requests_in_the_books_change_nothing(log: Log) -> None:
    """It has given the number of its heir's request to another one."""
    prompts = topics.PROMPTS.name
    [(_, claim)] = log.append([Output(topics.ROLES.name, CLAIM, encode(make_role("scheduler")))])
    ends = [(number, end) for (_, number), end in log.end_offsets(prompts).items()]
    beat(log, make_role("scheduler", fences=[Fence(epoch=claim, ends=ends)]))
    for number, claimed in ((0, claim), (1, claim - 1), (2, None)):
        log.append([Output(prompts, b"p", encode(make_prompt(number, claim=claimed)))])
    assert audit_log(log, policy="policy").not_ended == [0, 2]


@pytest.mark.parametrize("value", [b"", b"junk", b"\xc1", b"\x93\x01\x02\x03", encode(make_prompt(1))])
def test_bytes_that_name_no_claim_are_sent_again_as_they_are(value: bytes) -> None:
    assert without_claim(value) == value
    assert claim_of(make_entry(value=value)) is None


def test_a_request_that_a_person_sends_again_is_the_same_without_its_claim() -> None:
    request = make_prompt(1, claim=7)
    assert claim_of(make_entry(value=encode(request))) == 7
    assert decode(PromptRequest, without_claim(encode(request))) == make_prompt(1)
