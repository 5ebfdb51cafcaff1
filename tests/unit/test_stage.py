"""The stage runner over a real log: what survives a crash, what is dropped, what becomes a dead letter."""

import threading
from collections.abc import Sequence

import pytest

from streaming.errors import LeaseLostError, RecordError, StreamDPOError
from streaming.log.protocol import Entry, Log, Offsets, Output
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Feedback, decode
from streaming.stage import Reason, Stage, dead_letter
from tests.builders import make_entry, make_feedback
from tests.fakes import Crash, CrashingConsumer, CrashingLog


def shout(entry: Entry) -> list[Output]:
    """One output an entry; b"" is no record, b"bug" a bug and b"big" more than the log takes."""
    if entry.value == b"":
        raise RecordError("it is empty", where=entry.where, do="Write something.")
    if entry.value == b"bug":
        raise ZeroDivisionError
    value = b"x" * (2**20 + 1) if entry.value == b"big" else entry.value.upper()
    return [Output("out", entry.key, value)]


def value_of(entry: Entry) -> str:
    return entry.value.decode()


def explain(entry: Entry, reason: Reason) -> Feedback | None:
    return make_feedback(7, ending="dead_lettered", reason=reason) if entry.value else None


def fill(log: Log, *values: bytes) -> None:
    log.append([Output("in", b"key", value) for value in values])


def make_stage(log: Log, process=shout, *, metrics: Metrics | None = None, **options) -> Stage:  # type: ignore[no-untyped-def]
    """Unless told otherwise no entry is another's copy, and no dead letter ends a request."""
    options = {"topics": ["in"], "identify": lambda entry: entry.where, "explain": lambda entry, reason: None} | options
    return Stage(log, metrics or Metrics("test"), process, name="shouter", group="g", **options)


def work(log: Log, stage: Stage | None = None) -> int:
    """One batch of a member that joins and leaves."""
    stage = stage or make_stage(log)
    with log.subscribe("g", ["in"]) as consumer:
        return stage.run_once(consumer, timeout_s=0)


def values(log: Log, topic: str = "out") -> list[bytes]:
    with log.assign(log.begin_offsets(topic)) as reader:
        return [entry.value for entry in reader.read(max_records=1000, timeout_s=0)]


def letters(log: Log) -> list[DeadLetter]:
    return [decode(DeadLetter, value) for value in values(log, "dead-letter")]


def test_a_batch_is_processed_in_order_and_committed(log: Log) -> None:
    fill(log, b"a", b"b", b"c")
    assert work(log) == 3
    assert values(log) == [b"A", b"B", b"C"]
    assert log.committed("g", ["in"]) == log.end_offsets("in")
    assert work(log) == 0


@pytest.mark.parametrize(
    ("crash", "written"),
    [
        ({"before_append": 1}, [b"A", b"B"]),
        ({"after_append": 1}, [b"A", b"B", b"A", b"B"]),
        ({"before_commit": 1}, [b"A", b"B", b"A", b"B"]),
        ({"after_commit": 1}, [b"A", b"B"]),
    ],
)
def test_a_crash_anywhere_loses_nothing_and_repeats_what_was_not_committed(log: Log, crash, written) -> None:  # type: ignore[no-untyped-def]
    fill(log, b"a", b"b")
    crashing = CrashingLog(log, **crash)
    with pytest.raises(Crash):
        work(crashing)
    work(crashing)
    assert values(log) == written
    assert work(crashing) == 0


@pytest.mark.fault("poison", backend="sqlite")
def test_what_is_no_record_is_a_dead_letter_and_the_rest_goes_on(log: Log) -> None:
    metrics = Metrics("test")
    fill(log, b"a", b"", b"b")
    work(log, make_stage(log, metrics=metrics))
    assert values(log) == [b"A", b"B"]
    [letter] = letters(log)
    assert (letter.stage, letter.key, letter.value, letter.attempts) == ("shouter", b"key", b"", 1)
    assert (letter.source.topic, letter.source.partition, letter.source.offset) == ("in", 0, 1)
    assert "it is empty" in letter.reason
    assert metrics.value("dead_letters_total", stage="shouter") == 1
    assert work(log) == 0


def test_a_dead_letter_ends_its_request_where_it_is_known(log: Log) -> None:
    metrics = Metrics("test")
    fill(log, b"", b"big")
    work(log, make_stage(log, metrics=metrics, explain=explain))
    [feedback] = [decode(Feedback, value) for value in values(log, "feedback")]
    assert (feedback.ending, feedback.reason, feedback.request_number) == ("dead_lettered", "too_large", 7)
    assert metrics.value("endings_total", ending="dead_lettered", reason="too_large") == 1
    assert metrics.value("endings_total", ending="dead_lettered", reason="record") == 0


def test_outputs_above_the_size_limit_make_a_dead_letter_and_the_rest_goes_on(log: Log) -> None:
    fill(log, b"a", b"big", b"b")
    assert work(log) == 3
    assert values(log) == [b"A", b"B"]
    assert [letter.value for letter in letters(log)] == [b"big"]


def test_a_record_of_the_largest_size_still_fits_into_a_dead_letter(log: Log) -> None:
    largest = b"x" * 2**20
    log.append([dead_letter(make_entry(largest), "a long story " * 10_000, "test")])
    assert letters(log)[0].value == largest


def test_a_bug_ends_the_stage_and_writes_nothing(log: Log) -> None:
    fill(log, b"a", b"bug")
    with pytest.raises(ZeroDivisionError):
        work(log)
    assert values(log) == []
    assert log.committed("g", ["in"]) == {("in", 0): 0}


@pytest.mark.parametrize("batch", [1, 64])
def test_a_duplicate_is_dropped_in_the_same_batch_and_in_a_later_one(log: Log, batch: int) -> None:
    metrics = Metrics("test")
    stage = make_stage(log, metrics=metrics, identify=value_of, max_records=batch)
    fill(log, b"a", b"a", b"b")
    while work(log, stage):
        pass
    assert values(log) == [b"A", b"B"]
    assert metrics.value("duplicates_total", topic="in") == 1


def test_a_duplicate_is_recognised_after_a_restart(log: Log) -> None:
    fill(log, b"a", b"", b"b")
    work(log, make_stage(log, identify=value_of))
    fill(log, b"b", b"c")
    work(log, make_stage(log, identify=value_of))
    assert values(log) == [b"A", b"B", b"C"]


def test_an_id_counts_as_seen_only_when_its_outputs_are_durable(log: Log) -> None:
    fill(log, b"a")
    crashing = CrashingLog(log, before_append=1)
    stage = make_stage(crashing, identify=value_of)
    with pytest.raises(Crash):
        work(crashing, stage)
    work(crashing, stage)
    assert values(log) == [b"A"]


def test_a_lost_lease_drops_the_batch_and_the_stage_goes_on(log: Log) -> None:
    """The second member joins in the middle of the first one's batch and takes a partition once it is given up."""
    log.append([Output("prompts", str(i).encode(), str(i).encode()) for i in range(20)])
    metrics = Metrics("test")
    joined = []

    def process(entry: Entry) -> list[Output]:
        if not joined:
            joined.append(log.subscribe("g", ["prompts"]))
            consumer.read(max_records=1, timeout_s=0)  # gives up the newcomer's share
        return shout(entry)

    stage = make_stage(log, process, metrics=metrics, topics=["prompts"])
    with log.subscribe("g", ["prompts"]) as consumer:
        assert stage.run_once(consumer, timeout_s=0) == 20
        assert metrics.value("retries_total", stage="shouter") == 1
        assert set(log.committed("g", ["prompts"]).values()) == {0}
        again = joined[0].read(max_records=99, timeout_s=0)
        assert {entry.partition for entry in again} == {place[1] for place in joined[0].positions()} != set()
        fill_one = next(entry.key for entry in again)
        log.append([Output("prompts", fill_one, b"new")])
        assert stage.run_once(consumer, timeout_s=0) == 0


def test_a_running_stage_counts_and_stops_soon(log: Log) -> None:
    metrics, stop = Metrics("test"), threading.Event()

    def process(entry: Entry) -> list[Output]:
        if entry.value == b"last":
            stop.set()
        return shout(entry)

    fill(log, b"a", b"last")
    make_stage(log, process, metrics=metrics).run(stop)
    assert metrics.value("records_read_total", topic="in") == 2
    assert metrics.value("records_written_total", topic="out") == 2
    assert metrics.value("lag_records", topic="in") == 0
    assert metrics.time.seconds()["busy"] > 0


def test_lag_is_what_the_group_has_not_read(log: Log) -> None:
    metrics = Metrics("test")
    fill(log, b"a", b"b", b"c")
    work(log, make_stage(log, metrics=metrics, max_records=1))
    assert metrics.value("lag_records", topic="in") == 2


class HalfTakenConsumer(CrashingConsumer):
    """A real consumer that has lost its first partition, and does not know it."""

    def commit(self, offsets: Offsets) -> None:
        if ("prompts", 0) in offsets:
            raise LeaseLostError("taken over", where="test", do="Join anew.")
        self._consumer.commit(offsets)


def test_of_a_batch_that_took_long_only_what_another_member_took_over_is_left_to_it(log: Log) -> None:
    """The rest used to be passed over: neither written now nor read again."""
    log.append([Output("prompts", b"%d" % i, b"%d" % i) for i in range(20)])
    stage = make_stage(log, topics=["prompts"], away_s=0.0)
    with log.subscribe("g", ["prompts"]) as consumer:
        stage.run_once(HalfTakenConsumer(CrashingLog(log), consumer), timeout_s=0)
    ends = log.end_offsets("prompts")
    assert log.committed("g", ["prompts"]) == {**ends, ("prompts", 0): 0}
    assert len(values(log)) == sum(ends.values()) - ends["prompts", 0]


def test_an_error_of_ours_that_is_no_record_error_ends_the_stage(log: Log) -> None:
    def broken(entry: Entry) -> list[Output]:
        raise StreamDPOError("broken", where="here", do="Mend it.")

    fill(log, b"a")
    with pytest.raises(StreamDPOError):
        work(log, make_stage(log, broken))


class TakenConsumer(CrashingConsumer):
    """A real consumer whose partitions are another's before it commits."""

    def commit(self, offsets: Offsets) -> None:
        raise LeaseLostError("taken over", where="test", do="Join anew.")


class TakenLog(CrashingLog):
    def subscribe(self, group: str, topics: Sequence[str]) -> TakenConsumer:
        return TakenConsumer(self, self.log.subscribe(group, topics))


def test_a_batch_that_took_long_is_not_written_where_another_member_does_it_by_now(log: Log) -> None:
    fill(log, b"a", b"b")
    work(TakenLog(log), make_stage(log, away_s=0.0))
    assert values(log) == []


AWAY_S = 0.1


class FrozenConsumer(TakenConsumer):
    """One that stands still with the entries in its hands, for longer than `AWAY_S`."""

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        entries = super().read(max_records=max_records, timeout_s=timeout_s)
        threading.Event().wait(1.5 * AWAY_S)  # the length of this is the fault itself
        return entries


def test_a_stage_that_stood_still_inside_a_read_was_away(log: Log) -> None:
    """The time was taken behind the read, so it wrote late what another member had done by then."""
    fill(log, b"a", b"b")
    with log.subscribe("g", ["in"]) as consumer:
        stage = make_stage(log, away_s=AWAY_S)
        stage.run_once(FrozenConsumer(CrashingLog(log), consumer), timeout_s=0)
    assert values(log) == []


def test_a_batch_that_took_long_is_written_where_nobody_took_it_over(log: Log) -> None:
    fill(log, b"a", b"b")
    work(log, make_stage(log, away_s=0.0))
    assert values(log) == [b"A", b"B"]
    assert log.committed("g", ["in"]) == log.end_offsets("in")
