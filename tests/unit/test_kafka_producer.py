"""What the appender adds to kafka-python's producer: a budget, order after a failure, and a way out of a wedge."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    NotEnoughReplicasError,
    OutOfOrderSequenceNumberError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)

from streaming.config import KafkaConfig
from streaming.errors import LogError, TooLargeError
from streaming.log.kafka_producer import Appender, Budget, Placed
from streaming.metrics import Metrics
from tests.fakes import Clock

WEDGED = "wedged"
Fate = KafkaError | str | None
CONFIG = KafkaConfig(delivery_timeout_s=5, request_timeout_s=1)


class Metadata(NamedTuple):
    """What an acknowledgement says."""

    offset: int


class ScriptedFuture:
    """Acknowledged, failed, or never resolved."""

    def __init__(self, fate: Fate, offset: int, clock: Clock) -> None:
        self._fate = fate
        self._offset = offset
        self._clock = clock
        self.is_done = fate != WEDGED

    def get(self, timeout: float) -> Metadata:
        if self._fate == WEDGED:
            self._clock.advance(timeout)
            raise KafkaTimeoutError(f"Timeout after waiting for {timeout} secs.")
        if isinstance(self._fate, KafkaError):
            raise self._fate
        return Metadata(self._offset)


class ScriptedProducer:
    """A producer whose sends meet one fate after the other, and then succeed. It stands for kafka-python's."""

    def __init__(self, fates: Sequence[Fate] = ()) -> None:
        self._fates = list(fates)
        self.sent: list[bytes] = []
        self.is_closed = False
        self.clock = Clock()
        self._sender = self

    def send(self, topic: str, *, key: bytes, value: bytes, partition: int) -> ScriptedFuture:
        self.sent.append(value)
        return ScriptedFuture(self._fates.pop(0) if self._fates else None, len(self.sent) - 1, self.clock)

    def close(self, timeout: float) -> None:
        self.is_closed = True
        raise KafkaTimeoutError("a wedged producer does not flush")

    def force_close(self) -> None:
        assert self.is_closed


def make(producers: Sequence[ScriptedProducer], metrics: Metrics | None = None) -> Appender:
    left: list[Any] = list(producers)
    clock = Clock()
    for producer in producers:
        producer.clock = clock
    return Appender(lambda: left.pop(0), CONFIG, servers="a:9092", metrics=metrics, clock=clock)


def records(*values: bytes, partition: int = 0) -> list[Placed]:
    return [Placed("run.in", partition, b"k", value) for value in values]


def test_every_record_gets_its_offset() -> None:
    assert make([ScriptedProducer()]).append(records(b"a", b"b")) == [0, 1]


def test_what_failed_is_sent_again_with_all_that_lies_behind_it() -> None:
    producer = ScriptedProducer([None, NotEnoughReplicasError(), None])
    assert make([producer]).append(records(b"a", b"b", b"c")) == [0, 3, 4]
    assert producer.sent == [b"a", b"b", b"c", b"b", b"c"]


def test_another_partition_is_not_sent_again() -> None:
    producer = ScriptedProducer([NotEnoughReplicasError(), None])
    make([producer]).append(records(b"a") + records(b"b", partition=1))
    assert producer.sent == [b"a", b"b", b"a"]


def test_an_acknowledgement_without_an_offset_is_asked_for_again() -> None:
    class Forgetful(ScriptedProducer):
        def send(self, topic: str, *, key: bytes, value: bytes, partition: int) -> ScriptedFuture:
            super().send(topic, key=key, value=value, partition=partition)
            return ScriptedFuture(None, -1 if len(self.sent) == 1 else 7, self.clock)

    assert make([Forgetful()]).append(records(b"a")) == [7]


def test_a_producer_that_never_answers_is_replaced_and_counted() -> None:
    metrics = Metrics("test")
    wedged, fresh = ScriptedProducer([WEDGED, WEDGED]), ScriptedProducer()
    assert make([wedged, fresh], metrics).append(records(b"a", b"b")) == [0, 1]
    assert wedged.is_closed
    assert fresh.sent == [b"a", b"b"]
    assert metrics.value("log_producer_restarts_total") == 1


def test_a_second_wedge_in_a_row_fails_and_says_that_the_outcome_is_unknown() -> None:
    appender = make([ScriptedProducer([WEDGED]), ScriptedProducer([WEDGED])])
    with pytest.raises(LogError, match="unknown whether"):
        appender.append(records(b"a"))


def test_a_producer_whose_sequence_broke_is_replaced() -> None:
    broken, fresh = ScriptedProducer([OutOfOrderSequenceNumberError()]), ScriptedProducer()
    assert make([broken, fresh]).append(records(b"a")) == [0]
    assert broken.is_closed


def test_a_record_that_a_broker_finds_too_large_is_refused_and_not_tried_again() -> None:
    producer = ScriptedProducer([RecordListTooLargeError()])
    with pytest.raises(TooLargeError, match=r"max\.message\.bytes"):
        make([producer]).append(records(b"a"))
    assert producer.sent == [b"a"]


@pytest.mark.parametrize(
    "error",
    [
        TopicAuthorizationFailedError("run.in"),
        KafkaError("Unexpected error in InitProducerIdResponse: [Error 31] ClusterAuthorizationFailedError"),
    ],
)
def test_a_missing_right_is_told_and_not_tried_again(error: KafkaError) -> None:
    """A refused producer id used to be tried again for the whole delivery timeout."""
    producer = ScriptedProducer([error])
    with pytest.raises(LogError, match="Grant this user the right"):
        make([producer]).append(records(b"a"))
    assert producer.sent == [b"a"]


def test_a_closed_appender_takes_nothing_more() -> None:
    appender = make([ScriptedProducer()])
    appender.close()
    with pytest.raises(LogError, match="closed"):
        appender.append(records(b"a"))


def test_the_budget_keeps_the_second_waiting_until_the_first_is_done() -> None:
    metrics = Metrics("test")
    budget = Budget(100, metrics)
    waiting, entered = threading.Event(), threading.Event()

    def second() -> None:
        waiting.set()
        with budget.hold(60):
            entered.set()

    with budget.hold(60):
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        assert not entered.wait(0.05)
        assert metrics.value("log_in_flight_bytes") == 60
    thread.join()
    assert entered.is_set()
    assert metrics.value("log_in_flight_bytes") == 0


def test_what_is_larger_than_the_budget_goes_alone() -> None:
    budget = Budget(100, None)
    with budget.hold(1000):
        pass
