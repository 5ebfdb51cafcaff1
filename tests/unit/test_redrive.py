from collections.abc import Sequence

import pytest

from actors.pacing import Outstanding
from actors.reading import PromptReader
from deploy.redrive import Planned, Wanted, carry_out, parse_reason, parse_since, plan
from streaming import topics
from streaming.audit import audit_log
from streaming.config import SelectionConfig
from streaming.errors import ConfigError
from streaming.fencing import fence_at_the_end
from streaming.heartbeat import Heartbeat
from streaming.history import entries
from streaming.log.protocol import Entry, Log, Output
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Feedback, Group, PromptRequest, ScoredGroup, decode, encode
from streaming.selector import Selector
from streaming.stage import dead_letter
from tests.builders import broken, make_feedback, make_group, make_prompt, make_role
from tests.fakes import Crash, CrashingLog
from tests.recorded import append, record_scored
from tests.unit.test_asking import CountingReference
from tests.unit.test_scorer import records, run_until_settled, scoring

EVERYTHING = Wanted()


class Moody(CountingReference):
    """Fails on every group until it is in a better mood."""

    is_bad = True

    def price(self, groups: Sequence[Group]) -> list[list[float]]:
        if self.is_bad:
            raise MemoryError("too much for me")
        return super().price(groups)


def ask(log: Log, number: int = 0, **fields: object) -> Group:
    """A request and its group, on the way to the scorer."""
    request = make_prompt(number, **fields)
    append(log, "prompts", request.prompt_id, request)
    group = make_group(["a", "bb"], request=request)
    append(log, "candidates", group.group_id, group)
    return group


def die(log: Log, topic: str, key: bytes, value: bytes, *, request: PromptRequest | None = None, **where: str) -> Entry:
    """Bytes in a topic, and what a stage writes that gives them up."""
    stage, reason = where.get("stage", "scorer"), where.get("reason", "RecordError: not a Group")
    [(partition, offset)] = log.append([Output(topic, key, value)])
    entry = Entry(topic, partition, offset, key, value, 0.0)
    log.append([dead_letter(entry, reason, stage)])
    if request is not None:
        ended = make_feedback(request.number, ending="dead_lettered", stage=stage, reason="record")
        append(log, "feedback", request.group_id, ended)
    return entry


def done(log: Log, *groups: str) -> None:
    """Commit everything for these consumer groups."""
    read = {"generators": "prompts", "scorer": "candidates", "selector.policy": "scored"}
    for group in groups or read:
        with log.subscribe(group, [read[group]]) as consumer:
            consumer.commit(log.end_offsets(read[group]))


def planned(log: Log, wanted: Wanted = EVERYTHING) -> list[Planned]:
    return plan(log, ["policy"], wanted)


def test_a_redriven_group_is_scored_by_the_scorer_that_gave_it_up(log: Log) -> None:
    """A group that comes again is a duplicate, and would be dropped without an ending."""
    reference = Moody()
    group = ask(log)
    with scoring(log, reference=reference) as rig:
        rig.until("dead-letter", 1)
        while log.committed("scorer", ["candidates"]) != log.end_offsets("candidates"):
            rig.stop.wait(0.01)
        balance = audit_log(log, policy="policy")
        assert (balance.is_balanced, balance.count("dead_lettered")) == (True, 1)
        reference.is_bad = False
        assert carry_out(log, planned(log)) == 1
        balance = audit_log(log, policy="policy")
        assert (balance.not_ended, balance.ended_twice) == ([0], [])
        rig.until("scored", 1)
        rig.finish()
    [scored] = records(log, ScoredGroup, "scored")
    assert scored.group == group
    append(log, "feedback", group.group_id, make_feedback(0, ending="trained", step=1))
    balance = audit_log(log, policy="policy")
    assert balance.is_balanced
    assert balance.endings == {("trained", ""): 1}


def test_a_redriven_group_is_scored_after_a_restart_too(log: Log) -> None:
    reference = Moody()
    ask(log)
    run_until_settled(log, reference=reference)
    reference.is_bad = False
    assert carry_out(log, planned(log)) == 1
    run_until_settled(log, reference=reference)
    assert len(records(log, ScoredGroup, "scored")) == 1


def test_a_group_that_dies_again_is_a_new_letter_and_one_ending(log: Log) -> None:
    reference = Moody()
    ask(log)
    for _ in range(3):
        run_until_settled(log, reference=reference)
        assert audit_log(log, policy="policy").endings == {("dead_lettered", "failed"): 1}
        assert carry_out(log, planned(log)) == 1
    assert audit_log(log, policy="policy").ended_twice == []


def test_a_selector_takes_a_redriven_group_up_again(log: Log) -> None:
    record_scored(log, 0, [1.0, 0.0])
    [scored] = list(entries(log, "scored"))
    log.append([dead_letter(scored, "it was full moon", "selector")])
    append(log, "feedback", make_prompt(0).group_id, make_feedback(0, ending="dead_lettered", stage="selector"))
    done(log)
    assert carry_out(log, planned(log)) == 1
    metrics = Metrics("selector")
    heartbeat = Heartbeat(log, metrics, role="selector", interval_s=3600)
    stage = Selector(log, metrics, heartbeat, config=SelectionConfig(), policy="policy").stage()
    with log.subscribe("selector.policy", ["scored"]) as consumer:
        assert stage.run_once(consumer, timeout_s=0) == 1
    heartbeat.close()
    assert metrics.value("duplicates_total", topic="scored") == 0
    assert len(list(entries(log, "pairs.policy"))) == 1


def test_a_broken_request_that_says_which_it_is_is_taken_back_before_it_goes_again(log: Log) -> None:
    """It ended when it was given up: without that it would end twice."""
    request = make_prompt(4)
    die(log, "prompts", b"p4", broken(request, num_candidates="two"), request=request, stage="generator")
    done(log)
    assert carry_out(log, planned(log)) == 1
    balance = audit_log(log, policy="policy")
    assert (balance.not_ended, balance.ended_twice, balance.unknown) == ([4], [], [])


def test_the_original_bytes_go_under_their_key_and_once(log: Log) -> None:
    die(log, "candidates", b"\xffkey", b"junk")
    done(log)
    assert [one.left for one in planned(log)] == [None]
    assert carry_out(log, planned(log)) == 1
    assert [(entry.key, entry.value) for entry in entries(log, "candidates")] == [(b"\xffkey", b"junk")] * 2
    assert [one.left for one in planned(log)] == ["it went before"]
    assert carry_out(log, planned(log)) == 0


def test_a_letter_that_a_crash_wrote_twice_goes_once(log: Log) -> None:
    entry = die(log, "candidates", b"k", b"junk")
    log.append([dead_letter(entry, "again", "scorer")])
    done(log)
    assert carry_out(log, planned(log)) == 1


@pytest.mark.parametrize("appends", [1, 2])
def test_a_crash_marks_nothing_that_did_not_go_and_reopens_once(log: Log, appends: int) -> None:
    request = make_prompt(0)
    append(log, "prompts", "p0", request)
    die(log, "candidates", request.group_id.encode(), encode(make_group(request=request)), request=request)
    done(log)
    crashing = CrashingLog(log, after_append=appends)
    with pytest.raises(Crash):
        carry_out(crashing, planned(log))
    assert carry_out(log, planned(log)) == 1
    assert [one.ending for one in records(log, Feedback, "feedback")] == ["dead_lettered", "redriven"]
    assert audit_log(log, policy="policy").not_ended == [0]


def test_a_request_that_has_ended_otherwise_since_is_left_alone(log: Log) -> None:
    request = make_prompt(0)
    value = encode(make_group(request=request))
    die(log, "candidates", request.group_id.encode(), value)
    append(log, "feedback", request.group_id, make_feedback(0, ending="trained", step=1))
    done(log)
    assert [one.left for one in planned(log)] == ["its request has ended since: trained"]


async def test_a_request_is_sampled_when_it_is_sent_again_under_a_later_scheduler(log: Log) -> None:
    """It lies behind that one's fence, and the scheduler that issued it is gone."""
    value = encode(make_prompt(0, claim=3))
    entry = die(log, "prompts", b"p0", value, stage="generator", reason="prompt_too_long")
    fence = fence_at_the_end(log, "prompts", 4)
    append(log, "roles", "scheduler-0/2", make_role("scheduler", epoch=2, fences=[fence]))
    done(log)
    assert carry_out(log, planned(log)) == 1
    reader = PromptReader(log)
    [again] = await reader.read(max_records=9)
    assert again.offset > entry.offset and decode(PromptRequest, again.value) == make_prompt(0)
    await reader.close()


def test_an_evaluation_is_left_alone(log: Log) -> None:
    request = make_prompt(0, purpose="eval", round=0, round_size=1)
    die(log, "candidates", b"k", encode(make_group(request=request)), request=request)
    done(log)
    assert [one.left for one in planned(log)] == ["an evaluation: its round is measured again by itself"]


def test_what_its_stage_may_read_again_by_itself_is_left_for_now(log: Log) -> None:
    die(log, "candidates", b"k", b"junk")
    assert [one.left for one in planned(log)] == ["its stage is not done with it yet: try again in a moment"]


def test_letters_are_chosen_by_stage_reason_time_and_number(log: Log) -> None:
    die(log, "prompts", b"a", b"junk", stage="generator", reason="prompt_too_long")
    die(log, "candidates", b"b", b"junk", reason="MemoryError: full")
    die(log, "candidates", b"c", b"junk", reason="RecordError: bad")
    done(log)
    times = [decode(DeadLetter, entry.value).time_s for entry in entries(log, "dead-letter")]

    def reasons(wanted: Wanted) -> list[str]:
        return [one.reason for one in planned(log, wanted)]

    assert reasons(Wanted(stage="generator")) == ["prompt_too_long"]
    assert reasons(Wanted(reason=parse_reason("Memory|long"))) == ["prompt_too_long", "MemoryError: full"]
    assert reasons(Wanted(since_s=max(times))) == ["RecordError: bad"]
    assert reasons(Wanted(limit=2)) == ["prompt_too_long", "MemoryError: full"]


def test_times_and_reasons_that_say_nothing_are_refused() -> None:
    assert parse_since("2h", 10_000.0) == 2_800.0
    with pytest.raises(ConfigError, match="no length of time"):
        parse_since("yesterday", 0.0)
    with pytest.raises(ConfigError, match="no regular expression"):
        parse_reason("(")


def test_a_plan_changes_nothing(log: Log) -> None:
    die(log, "candidates", b"k", b"junk")
    names = [topic.name for topic in topics.all_topics("policy")]
    before = [log.end_offsets(name) for name in names]
    planned(log)
    assert [log.end_offsets(name) for name in names] == before


def test_a_redriven_request_is_outstanding_until_it_ends_again() -> None:
    outstanding = Outstanding()
    outstanding.issue(make_prompt(0, ordinal=0))
    outstanding.end(make_feedback(0, ending="dead_lettered"))
    assert not outstanding.end(make_feedback(0, ending="redriven"))
    assert outstanding.num_train == 1
    assert outstanding.end(make_feedback(0, ending="consumed"))
    assert outstanding.num_train == 0
