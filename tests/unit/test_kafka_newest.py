"""A look at the newest records while the cluster does not answer. With a real one: contract/test_log.py."""

from typing import cast

import pytest

from streaming.errors import LogError
from streaming.log.kafka import KafkaLog
from streaming.log.kafka_newest import Newest
from streaming.log.protocol import Entry, Offsets, Partition

PLACE = ("roles", 0)
FIRST, SECOND = (Entry(*PLACE, offset, b"key%d" % offset, b"value", 0.0) for offset in range(2))


class AwayAtTimes:
    """A Kafka log with two records in "roles", and its own reader: a read is empty while no broker answers."""

    def __init__(self, reads: list[list[Entry]], *, num_answers: int = 99) -> None:
        self._reads = reads
        self._num_answers = num_answers
        self._position = 0

    def begin_offsets(self, topic: str) -> Offsets:
        return {PLACE: 0}

    def end_offsets(self, topic: str) -> Offsets:
        if self._num_answers == 0:
            raise LogError("the cluster did not answer", where=topic, do="Bring the brokers back.")
        self._num_answers -= 1
        return {PLACE: 2}

    def follow(self, offsets: Offsets, deleted: object) -> "AwayAtTimes":
        return self

    def positions(self) -> dict[Partition, int]:
        return {PLACE: self._position}

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        entries = self._reads.pop(0)
        self._position += len(entries)
        return entries


def newest(log: AwayAtTimes) -> Newest:
    return Newest(cast(KafkaLog, log), "roles")


@pytest.mark.parametrize("reads", [[[], [FIRST, SECOND]], [[FIRST], [], [], [SECOND]]], ids=["first", "between"])
def test_an_empty_read_does_not_pass_for_the_end(reads: list[list[Entry]]) -> None:
    """A claimant found no weights and called the log another's; a scheduler found no balance and began a new one."""
    assert newest(AwayAtTimes(reads)).look() == {b"key0": FIRST, b"key1": SECOND}


def test_a_cluster_that_stays_away_is_an_error_and_not_an_empty_answer() -> None:
    with pytest.raises(LogError, match="did not answer"):
        newest(AwayAtTimes([[FIRST], []], num_answers=1)).look()
