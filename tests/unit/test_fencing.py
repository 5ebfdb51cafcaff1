from typing import Any

import pytest

from streaming import topics
from streaming.audit import audit_log
from streaming.errors import SupersededError
from streaming.fencing import NUM_KEYS, Fences, epoch_key, read_fences
from streaming.heartbeat import Heartbeat, refuse_to_be_second, role_states
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import Fence, RoleState, Version, WeightVersion, encode
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
