import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.tiny_model import save_tiny_model
from streaming.asking import Reference
from streaming.config import ScoringConfig
from streaming.heartbeat import Heartbeat
from streaming.history import entries
from streaming.log import open_log
from streaming.log.protocol import Entry, Log, Output
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Feedback, Group, R, ScoredGroup, Version, decode, encode
from streaming.reference import ReferenceModel
from streaming.rewards import WeightedSource
from streaming.rewards.function import FunctionSource
from streaming.scorer import Scorer
from streaming.scoring import Pricing
from tests.builders import make_group, make_prompt
from tests.fakes import Crash, CrashingConsumer, CrashingLog
from tests.unit.test_asking import CountingReference

WAIT_S = 60.0


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


class SlowReward:
    """1 for everything; the answer "slow" waits until it is released."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        if completions[0] == "slow":
            self.release.wait(WAIT_S)
        return [1.0] * len(completions)


class Rig:
    """A scorer in a thread, over a log; stopped and looked at from the test."""

    def __init__(
        self,
        log: Log,
        function: Callable[..., Any] = lengths,
        *,
        timeout_s: float = WAIT_S,
        reference: Reference | None = None,
        max_groups: int = 64,
        **settings: Any,
    ) -> None:
        self.log = log
        self.metrics = Metrics("scorer")
        self.stop = threading.Event()
        self.error: BaseException | None = None
        heartbeat = Heartbeat(getattr(log, "log", log), self.metrics, role="scorer", interval_s=3600)
        source = WeightedSource(FunctionSource(function, name="length", version="1", timeout_s=timeout_s), 1.0)
        self.heartbeat = heartbeat
        self.scorer = Scorer(
            log,
            self.metrics,
            heartbeat,
            sources=[source],
            pricing=[Pricing(reference or CountingReference())],
            config=ScoringConfig(max_groups=max_groups),
            policy="policy",
            **settings,
        )
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.scorer.run(self.stop)
        except BaseException as error:
            self.error = error

    def until(self, topic: str, count: int) -> list[Any]:
        """Wait until a topic has so many records."""
        with self.log.assign(self.log.begin_offsets(topic)) as reader:
            found: list[Any] = []
            while len(found) < count:
                new = reader.read(max_records=count, timeout_s=WAIT_S)
                assert new, f"{topic} has {len(found)} of {count} records; {self.error!r}"
                found += new
        return found

    def finish(self) -> None:
        """Wait until everything that was read is committed, then stop."""
        ends = self.log.end_offsets("candidates")
        wait_until(lambda: not self.thread.is_alive() or self.log.committed("scorer", ["candidates"]) == ends)
        self.close()

    def close(self) -> None:
        self.stop.set()
        self.thread.join(WAIT_S)
        self.heartbeat.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen"
        threading.Event().wait(0.01)


def num_read(rig: Rig) -> float:
    return rig.metrics.value("records_read_total", topic="candidates")


@contextmanager
def scoring(log: Log, *args: Any, **settings: Any) -> Iterator[Rig]:
    rig = Rig(log, *args, **settings)
    rig.thread.start()
    try:
        yield rig
    finally:
        rig.close()


def send(log: Log, *groups: Group) -> None:
    log.append(Output("candidates", group.group_id.encode(), encode(group)) for group in groups)


def records(log: Log, kind: type[R], topic: str) -> list[R]:
    return [decode(kind, entry.value) for entry in entries(log, topic)]


def run_until_settled(log: Log, *args: Any, **settings: Any) -> Rig:
    with scoring(log, *args, **settings) as rig:
        rig.finish()
    return rig


def test_a_group_comes_out_scored_and_priced_under_its_key(log: Log) -> None:
    group = make_group(["a", "bb"])
    send(log, group)
    rig = run_until_settled(log)
    [entry] = entries(log, "scored")
    [scored] = records(log, ScoredGroup, "scored")
    assert entry.key == group.group_id.encode()
    assert scored.group == group
    assert [source.values for source in scored.rewards] == [[1.0, 2.0]]
    assert (scored.reference_logprobs, scored.reference_version) == ([-2.0, -3.0], "counting")
    assert scored.source is not None and scored.source.topic == "candidates"
    assert rig.metrics.value("records_written_total", topic="scored") == 1
    assert rig.metrics.value("reference_tokens_total") == 5


def test_what_the_reference_itself_would_sample_has_an_implicit_reward_of_zero(log: Log, tmp_path: Path) -> None:
    reference = ReferenceModel(save_tiny_model(tmp_path / "model"), batch_tokens=64)
    group = make_group(["12", "a longer answer"])
    logprobs = [reference.logprobs([(group.prompt_tokens, one.tokens)])[0] for one in group.candidates]
    candidates = [
        msgspec.structs.replace(one, logprobs=[total / len(one.tokens)] * len(one.tokens))
        for one, total in zip(group.candidates, logprobs, strict=True)
    ]
    send(log, msgspec.structs.replace(group, candidates=candidates))
    run_until_settled(log, reference=reference)
    [scored] = records(log, ScoredGroup, "scored")
    assert scored.implicit[0].h == pytest.approx([0.0, 0.0], abs=1e-4)
    assert scored.reference_version == reference.version


def test_an_evaluation_ends_here_and_is_not_passed_on(log: Log) -> None:
    request = make_prompt(purpose="eval", round=2, round_size=5)
    send(log, make_group(["a", "bbb"], request=request, version=Version(3, 1)))
    run_until_settled(log)
    [feedback] = records(log, Feedback, "feedback")
    assert (feedback.ending, feedback.mean_reward, feedback.version) == ("evaluated", 2.0, Version(3, 1))
    assert (feedback.round, feedback.round_size) == (2, 5)
    assert records(log, ScoredGroup, "scored") == []


def test_a_slow_group_holds_up_no_other(log: Log) -> None:
    reward = SlowReward()
    send(log, make_group(["slow"]), *(make_group([str(number)], number=number) for number in range(1, 30)))
    with scoring(log, reward) as rig:
        rig.until("scored", 29)
        assert not any(scored.group.request.number == 0 for scored in records(log, ScoredGroup, "scored"))
        reward.release.set()
        rig.until("scored", 30)


def test_a_missing_reward_is_told_once_in_the_log_file(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    """Timeouts used to be counted only, and the warning pointed at an empty file."""
    reward = SlowReward()
    send(log, make_group(["slow"]), make_group(["slow"], number=1))
    run_until_settled(log, reward, timeout_s=0.05)
    reward.release.set()
    assert [record.message for record in caplog.records if "timeout" in record.message] == [
        "reward source length gave no reward: timeout. Later ones are counted, not shown."
    ]


@pytest.mark.fault("reward source hangs", backend="sqlite")
def test_a_source_that_misses_its_deadline_leaves_a_reason_and_no_reward(log: Log) -> None:
    reward = SlowReward()
    send(log, make_group(["slow"]))
    rig = run_until_settled(log, reward, timeout_s=0.05)
    reward.release.set()
    [scored] = records(log, ScoredGroup, "scored")
    assert (scored.rewards[0].values, scored.rewards[0].reasons) == ([None], ["timeout"])
    assert rig.metrics.value("rewards_missing_total", source="length", reason="timeout") == 1


@pytest.mark.fault("poison", backend="sqlite")
def test_bytes_that_are_no_group_go_to_the_dead_letters_and_the_rest_goes_on(log: Log) -> None:
    log.append([Output("candidates", b"k", b"junk"), Output("candidates", b"k", b"more junk")])
    send(log, make_group())
    rig = run_until_settled(log)
    letters = records(log, DeadLetter, "dead-letter")
    assert [(letter.key, letter.value, letter.stage) for letter in letters] == [
        (b"k", b"junk", "scorer"), (b"k", b"more junk", "scorer"),
    ]  # fmt: skip
    assert len(records(log, ScoredGroup, "scored")) == 1
    assert records(log, Feedback, "feedback") == []
    assert rig.metrics.value("dead_letters_total", stage="scorer") == 2


def test_a_broken_group_whose_request_can_be_read_ends_it(log: Log) -> None:
    broken = msgspec.msgpack.decode(encode(make_group(number=7)))
    broken["candidates"] = "lost"
    log.append([Output("candidates", b"k", msgspec.msgpack.encode(broken))])
    run_until_settled(log)
    [feedback] = records(log, Feedback, "feedback")
    assert (feedback.ending, feedback.request_number, feedback.reason) == ("dead_lettered", 7, "record")
    assert len(records(log, DeadLetter, "dead-letter")) == 1


def test_a_group_that_the_reference_cannot_price_is_a_dead_letter_with_an_ending(log: Log) -> None:
    send(log, make_group(["bad"], number=1), make_group(["good"], number=2))
    run_until_settled(log)
    [letter] = records(log, DeadLetter, "dead-letter")
    assert "too much for me" in letter.reason
    [feedback] = records(log, Feedback, "feedback")
    assert (feedback.ending, feedback.request_number) == ("dead_lettered", 1)
    assert [scored.group.request.number for scored in records(log, ScoredGroup, "scored")] == [2]


def test_of_two_samplings_of_one_request_the_first_wins(log: Log) -> None:
    first, second = make_group(["a", "b"]), make_group(["c", "d"])
    send(log, first, first, second, make_group(number=1))
    rig = run_until_settled(log)
    assert [
        scored.group.content_hash for scored in records(log, ScoredGroup, "scored") if scored.group.request.number == 0
    ] == [first.content_hash]
    assert len(records(log, ScoredGroup, "scored")) == 2
    assert rig.metrics.value("duplicates_total", topic="candidates") == 2


def test_the_first_sampling_is_still_known_after_a_restart(log: Log) -> None:
    send(log, make_group(["a", "b"]))
    run_until_settled(log)
    send(log, make_group(["c", "d"]))
    run_until_settled(log)
    assert len(records(log, ScoredGroup, "scored")) == 1


@pytest.mark.parametrize("crash", ["before_append", "after_append", "before_commit", "after_commit"])
def test_wherever_it_crashes_every_group_is_scored(log: Log, crash: str) -> None:
    groups = [make_group(number=number) for number in range(10)]
    send(log, *groups)
    crashing: Any = CrashingLog(log, **{crash: 1})
    with scoring(crashing, max_groups=4) as rig:
        rig.thread.join(WAIT_S)
    assert isinstance(rig.error, Crash)
    run_until_settled(log, max_groups=4)
    scored = {one.group.request.number for one in records(log, ScoredGroup, "scored")}
    assert scored == set(range(10))


def test_nothing_is_committed_beyond_a_group_that_is_still_open(log: Log) -> None:
    reward = SlowReward()
    slow, quick = make_group(["slow"], number=0), make_group(["quick"], number=1)
    log.append([Output("candidates", b"same partition", encode(group)) for group in (slow, quick)])
    with scoring(log, reward) as rig:
        rig.until("scored", 1)
        wait_until(lambda: rig.metrics.value("lag_records", topic="candidates") == 2)
    reward.release.set()
    assert sum(log.committed("scorer", ["candidates"]).values()) == 0


def test_two_scorers_share_the_work_and_lose_none(log: Log) -> None:
    send(log, *(make_group(number=number) for number in range(40)))
    with scoring(log) as one, scoring(log) as other:
        one.until("scored", 40)
        other.close()
        one.close()
    assert {scored.group.request.number for scored in records(log, ScoredGroup, "scored")} == set(range(40))


def test_a_scorer_that_hands_partitions_over_hands_over_what_is_under_way_there(log: Log) -> None:
    """It kept at it, and where that took five seconds it left its group and scored all that was under way again."""
    reward = SlowReward()
    send(log, *(make_group(["slow"], number=number) for number in range(16)))
    with scoring(log, reward, away_s=0.0) as stays:
        wait_until(lambda: num_read(stays) == 16)
        with scoring(log, reward) as leaves_again:
            wait_until(lambda: num_read(leaves_again) > 0)
        wait_until(lambda: num_read(stays) > 16)  # it has back what nobody answered
        with scoring(log) as comes:
            wait_until(lambda: num_read(comes) > 0)
            reward.release.set()
            comes.finish()
        send(log, *(make_group(["again"], number=number) for number in range(16)))
        stays.finish()  # knows what was answered of what it had handed over
    assert sorted(one.group.request.number for one in records(log, ScoredGroup, "scored")) == list(range(16))
    assert stays.metrics.value("retries_total", stage="scorer") == 0


def test_a_scorer_that_takes_partitions_over_knows_the_groups_that_the_one_before_has_scored(log: Log) -> None:
    """It used to know what lay before its own start only, and scored the second sampling of the others."""
    with scoring(log) as one, scoring(log) as other:
        number = 0
        for rig in (other, one):  # in this order: both have taken up what they hold by then
            before = rig.metrics.value("records_read_total", topic="candidates")
            while rig.metrics.value("records_read_total", topic="candidates") == before:
                send(log, make_group(number=number))
                number += 1
                rig.until("scored", number)
        other.finish()
        send(log, *(make_group(["c", "d"], number=again) for again in range(number)))
        one.finish()
    assert len(records(log, ScoredGroup, "scored")) == number
    assert one.metrics.value("duplicates_total", topic="candidates") == number


class JumpingConsumer(CrashingConsumer):
    """A real consumer that reads one entry, and then loses its partition and wins it back: two are settled by then."""

    num_reads = 0

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        self.num_reads += 1
        if self.num_reads == 2:
            places = {place: offset + 1 for place, offset in self.positions().items() if offset}
            self.commit(places)
            self.seek(places)
        return super().read(max_records=1, timeout_s=timeout_s)


class JumpingLog(CrashingLog):
    def subscribe(self, group: str, topics: Sequence[str]) -> JumpingConsumer:
        return JumpingConsumer(self, self.log.subscribe(group, topics))


def test_what_another_scorer_has_settled_in_between_is_given_up(log: Log) -> None:
    """It used to be scored once more, and the group went back to where it began."""
    reward = SlowReward()
    groups = [make_group([text], number=number) for number, text in enumerate(["slow", "settled", "quick"])]
    log.append([Output("candidates", b"same partition", encode(group)) for group in groups])
    with scoring(JumpingLog(log), reward) as rig:
        rig.until("scored", 1)
        reward.release.set()
        rig.finish()
    assert [scored.group.request.number for scored in records(log, ScoredGroup, "scored")] == [2]


def test_a_scored_group_that_the_log_does_not_take_ends_its_request(tmp_path: Any) -> None:
    with open_log(f"sqlite:///{tmp_path}/log.db", run="test", max_record_bytes=65536, max_blob_bytes=0) as log:
        # The group just fits; with its rewards it does not.
        group = make_group(generator="g" * (65500 - len(encode(make_group(generator="")))))
        send(log, group, make_group(number=1))
        rig = run_until_settled(log)
        assert rig.error is None
        [feedback] = records(log, Feedback, "feedback")
        assert (feedback.ending, feedback.reason) == ("dead_lettered", "too_large")
        assert [scored.group.request.number for scored in records(log, ScoredGroup, "scored")] == [1]


def test_a_broken_reference_ends_the_role_and_loses_nothing(log: Log) -> None:
    send(log, make_group())
    reference = CountingReference()
    reference.is_broken = True
    with scoring(log, reference=reference) as rig:
        rig.thread.join(WAIT_S)
    assert isinstance(rig.error, MemoryError)
    assert sum(log.committed("scorer", ["candidates"]).values()) == 0


def test_time_without_groups_is_waiting(log: Log) -> None:
    send(log, make_group())
    rig = run_until_settled(log)
    seconds = rig.metrics.time.seconds()
    assert seconds["waiting"] > 0
    assert seconds["blocked"] == seconds["updating"] == 0
