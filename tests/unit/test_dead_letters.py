"""What died ends its request once: copies of it are passed over, until `streamdpo redrive` sends it again."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.redrive import Wanted, carry_out, plan
from streaming.audit import audit_log
from streaming.config import SelectionConfig
from streaming.dead_letters import DeadLetters, request_under, unsent
from streaming.heartbeat import Heartbeat
from streaming.keys import group_under, pair_key
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import Feedback, Fence, Group, ScoredGroup, Version, encode
from streaming.selector import Selector
from streaming.stage import Stage
from tests.builders import make_feedback, make_group, make_pair, make_prompt, make_scored, make_weights
from tests.fakes import Crash, CrashingLog
from tests.recorded import append
from tests.unit.test_redrive import Moody
from tests.unit.test_scorer import records, run_until_settled, scoring, send

JUNK = b"\xffjunk"


def sample(*texts: str, number: int = 0) -> Group:
    return make_group(texts, request=make_prompt(number))


def issue(log: Log) -> None:
    append(log, "prompts", "p0", make_prompt(0))


def redrive(log: Log) -> int:
    return carry_out(log, plan(log, ["policy"], Wanted()))


def finals(log: Log) -> list[str]:
    return [one.ending for one in records(log, Feedback, "feedback")]


@contextmanager
def selecting(log: Log) -> Iterator[Stage]:
    metrics = Metrics("selector")
    heartbeat = Heartbeat(getattr(log, "log", log), metrics, role="selector", interval_s=3600)
    yield Selector(log, metrics, heartbeat, config=SelectionConfig(), policy="policy").stage()
    heartbeat.close()


def select(log: Log, stage: Stage) -> None:
    with log.subscribe("selector.policy", ["scored"]) as consumer:
        while stage.run_once(consumer, timeout_s=0):
            pass


# The scorer


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("value", [JUNK, None], ids=["unreadable", "unpriced"])
def test_a_group_that_is_sampled_again_after_its_dead_letter_is_not_scored(
    log: Log, value: bytes | None, is_restarted: bool
) -> None:
    """It was, and its request ended a second time. Only what is sent again is to be done."""
    issue(log)
    first, again = sample("a", "bb"), sample("c", "dd")
    reference = Moody()
    log.append([Output("candidates", first.group_id.encode(), value or encode(first))])
    with scoring(log, reference=reference) as rig:
        rig.until("feedback", 1)
        reference.is_bad = False
        if is_restarted:
            rig.finish()
        else:
            send(log, again)
            rig.finish()
    if is_restarted:
        send(log, again)
        run_until_settled(log, reference=reference)
    assert (finals(log), records(log, ScoredGroup, "scored")) == (["dead_lettered"], [])
    assert redrive(log) == 1
    send(log, again)
    run_until_settled(log, reference=reference)
    assert [scored.group for scored in records(log, ScoredGroup, "scored")] == ([] if value else [first])
    assert finals(log) == ["dead_lettered", "redriven", *(["dead_lettered"] if value else [])]


def test_bytes_that_are_no_group_end_the_request_that_their_key_names(log: Log) -> None:
    """There was a dead letter and no ending, and the run never came to its end."""
    issue(log)
    log.append([Output("candidates", sample("a").group_id.encode(), JUNK)])
    run_until_settled(log)
    assert audit_log(log, policy="policy").endings == {("dead_lettered", "record"): 1}


def test_a_copy_that_nobody_can_read_of_a_scored_group_ends_nothing(log: Log) -> None:
    issue(log)
    send(log, sample("a", "bb"))
    log.append([Output("candidates", sample("a").group_id.encode(), JUNK)])
    run_until_settled(log)
    log.append([Output("candidates", sample("a").group_id.encode(), JUNK)])
    run_until_settled(log)
    assert (finals(log), len(unsent(log)), len(records(log, ScoredGroup, "scored"))) == ([], 2, 1)


@pytest.mark.parametrize("crash", [{"before_commit": 1}, {"after_append": 1}, {"after_append": 2}])
def test_a_dead_letter_that_was_not_committed_is_not_scored_by_the_next_start(log: Log, crash: dict[str, int]) -> None:
    """Behind the first append lies the letter alone: it decides, and the next start tells the end."""
    issue(log)
    send(log, sample("a", "bb"))
    reference = Moody()
    with scoring(CrashingLog(log, **crash), reference=reference) as rig, pytest.raises(Crash):
        rig.finish()
        raise rig.error or AssertionError("it did not crash")
    reference.is_bad = False
    run_until_settled(log, reference=reference)
    assert (finals(log), records(log, ScoredGroup, "scored")) == (["dead_lettered"], [])
    assert len(unsent(log)) == 1


def test_a_scored_group_that_was_not_committed_does_not_die_at_the_next_start(log: Log) -> None:
    """It was scored again, and where that failed its request ended as a dead letter, and was trained on."""
    issue(log)
    send(log, sample("a", "bb"))
    with scoring(CrashingLog(log, before_commit=1)) as rig, pytest.raises(Crash):
        rig.finish()
        raise rig.error or AssertionError("it did not crash")
    run_until_settled(log, reference=Moody())
    assert (finals(log), len(records(log, ScoredGroup, "scored"))) == ([], 1)


# The selector


def test_a_selector_ends_the_request_of_bytes_that_are_no_scored_group_once(log: Log) -> None:
    issue(log)
    key = make_scored().group.group_id.encode()
    log.append([Output("scored", key, JUNK), Output("scored", key, encode(make_scored()))])
    with selecting(log) as stage:
        select(log, stage)
    log.append([Output("scored", key, JUNK), Output("scored", key, encode(make_scored()))])
    with selecting(log) as stage:
        select(log, stage)
    assert (finals(log), log.end_offsets("pairs.policy")) == (["dead_lettered"], log.begin_offsets("pairs.policy"))
    assert redrive(log) == 2
    with selecting(log) as stage:
        select(log, stage)
    assert finals(log) == ["dead_lettered", "redriven", "redriven", "dead_lettered"]


def test_a_selection_that_was_not_committed_is_not_made_anew_with_other_settings(log: Log) -> None:
    issue(log)
    log.append([Output("scored", make_scored().group.group_id.encode(), encode(make_scored()))])
    crashing = CrashingLog(log, before_commit=1)
    with selecting(crashing) as stage, pytest.raises(Crash):
        select(crashing, stage)
    with selecting(log) as stage:
        select(log, stage)
    assert sum(log.end_offsets("pairs.policy").values()) == 1


# What is known of dead letters


def test_a_stage_hears_of_its_own_dead_letters_of_its_policy(log: Log) -> None:
    def tell(ending: str, **fields: object) -> None:
        one = make_feedback(0, ending=ending, **{"stage": "selector", **fields})
        append(log, "feedback", one.group_id, one)

    group_id = make_prompt(0).group_id
    dead = DeadLetters(log, stage="selector", policy="policy")
    tell("dead_lettered", policy="other")
    tell("dead_lettered", stage="scorer")
    tell("dropped")
    assert not dead.has_ended(group_id)
    tell("dead_lettered")
    assert dead.has_ended(group_id)
    tell("redriven")
    assert not dead.has_ended(group_id)
    tell("consumed", stage="learner")
    assert dead.has_ended(group_id)
    assert [one.ending for one in dead.told(group_id)] == ["dead_lettered", "redriven"]


def test_what_a_learner_told_behind_its_heirs_fence_is_not_heard(log: Log) -> None:
    dead = DeadLetters(log, stage="learner", policy="policy")
    weights = make_weights(Version(2, 0), fences=[Fence(epoch=2, ends=[(number, 0) for number in range(4)])])
    append(log, "weights", "policy/full/2", weights)
    one = make_feedback(0, ending="dead_lettered", stage="learner", epoch=1)
    append(log, "feedback", one.group_id, one)
    assert not dead.told(one.group_id)


def test_a_key_names_a_group_and_its_request(log: Log) -> None:
    issue(log)
    group_id = make_prompt(0).group_id
    assert group_under(pair_key(make_pair(0))) == group_under(group_id.encode()) == group_id
    assert [group_under(key) for key in (b"", b"key", b"\xff" * 16, b"0" * 17)] == [None] * 4
    assert request_under(log, pair_key(make_pair(0))) == make_prompt(0)
    assert request_under(log, pair_key(make_pair(1))) is None
