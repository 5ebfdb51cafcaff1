"""Bytes that are no record in the topics that every role reads: whoever reads on takes them for nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from learner.claim import newest_version
from streaming import topics
from streaming.fencing import CLAIM, epoch_key, read_fences, read_issuers
from streaming.heartbeat import role_states
from streaming.log.protocol import Log, Output
from streaming.readable import readable
from streaming.records import Fence, RoleState, Version, encode
from tests.builders import make_entry, make_role, make_weights

JUNK = (b"", b"\xc1", b"\x80", b"\x81\xa6policy\x05")

READERS: dict[str, Callable[[Log], Any]] = {
    "states": role_states,
    "issuers": lambda log: vars(read_issuers(log)),
    "fences": lambda log: vars(read_fences(log)),
    "version": lambda log: newest_version(log, "policy"),
}


def beat(role: str, epoch: int, key: bytes | None = None, **fields: Any) -> Output:
    state = make_role(role, epoch=epoch, **fields)
    return Output(topics.ROLES.name, key or epoch_key(state.role_id, epoch), encode(state))


def announce(version: Version) -> Output:
    weights = make_weights(version, fences=[Fence(epoch=version.epoch, ends=[(0, 3)])])
    return Output(topics.WEIGHTS.name, epoch_key("policy/full", version.epoch), encode(weights))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_record_stops_nobody_and_hides_nothing(log: Log, read: Callable[[Log], Any], junk: bytes) -> None:
    """It stopped every role at its start: under a key of its own, and where it had taken a record's place."""
    fences = [Fence(epoch=2, ends=[(0, 7)])]
    log.append([beat("learner", 1), beat("scheduler", 4, fences=fences), beat("scheduler", 4, CLAIM)])
    log.append([announce(Version(1, 5)), announce(Version(2, 0))])
    found = read(log)
    for topic in (topics.ROLES.name, topics.WEIGHTS.name):
        keys = [b"another", b"scheduler-0/another", *log.newest(topic)]
        log.append([Output(topic, key, junk) for key in keys])
    assert read(log) == found


def test_junk_where_no_scheduler_has_claimed_anything_is_no_claim(log: Log) -> None:
    """Every generator would wait for what that claim announces."""
    log.append([Output(topics.ROLES.name, CLAIM, b"junk")])
    assert read_issuers(log).newest is None


def test_what_is_passed_over_is_told_once_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    entries = [
        make_entry(make_role("scorer"), topic="roles", offset=46_340),
        make_entry(b"junk", topic="roles", offset=46_341),
        make_entry(make_role("learner"), topic="roles", offset=46_342),
    ]
    for _ in range(2):
        assert [state.role for state in readable(RoleState, entries)] == ["scorer", "learner"]
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith("roles/0@46341 is passed over: not a RoleState")
