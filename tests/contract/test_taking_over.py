"""What a group has answered it answers no second time, whichever member holds the partition: on either backend."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming import topics
from streaming.config import KafkaConfig, LogConfig
from streaming.history import entries
from streaming.log import open_log
from streaming.log.kafka_topics import differences, wanted_topics
from streaming.log.protocol import Consumer, Entry, Log, Output
from streaming.metrics import Metrics
from streaming.stage import Stage
from tests.kafka_cluster import Address

NUM = 40
IN, OUT = topics.SCORED.name, topics.FEEDBACK.name


@pytest.fixture(params=["sqlite", "kafka"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    run = f"over-{uuid.uuid4().hex[:8]}"
    url, settings = f"sqlite:///{tmp_path}/log.db", KafkaConfig(replication_factor=1, min_insync_replicas=1)
    if request.param == "kafka":
        address: Address = request.getfixturevalue("kafka")
        url = f"kafka://{address.bootstrap}"
        cluster = LogConfig(url=url, kafka=settings)
        differences(
            cluster, wanted_topics([topics.SCORED, topics.FEEDBACK, topics.DEAD_LETTER], run, cluster), create=True
        )
    with open_log(url, run=run, max_record_bytes=2**20, max_bytes=2**30, kafka=settings) as opened:
        yield opened


class Member:
    """A stage of group "g" that says in its output who it is."""

    def __init__(self, log: Log, name: str) -> None:
        self._log = log
        self.consumer: Consumer = log.subscribe("g", [IN])
        self._stage = Stage(
            log, Metrics(name), lambda entry: [Output(OUT, entry.key, name.encode())], name=name, group="g",
            topics=[IN], identify=lambda entry: entry.key.decode(), explain=lambda entry, reason: None,
        )  # fmt: skip

    def work(self) -> None:
        self._stage.run_once(self.consumer, timeout_s=0.05)


def ask(log: Log) -> None:
    log.append([Output(IN, b"%d" % i, b"whatever") for i in range(NUM)])


def work_off(log: Log, *members: Member) -> list[Entry]:
    while log.committed("g", [IN]) != log.end_offsets(IN):
        for member in members:
            member.work()
    return list(entries(log, OUT))


def test_a_member_that_gains_partitions_knows_what_their_earlier_holder_answered(log: Log) -> None:
    """It used to know only what lay before its own start, and answered the others' once more."""
    stays, leaves = Member(log, "stays"), Member(log, "leaves")
    while not (stays.consumer.positions() and leaves.consumer.positions()):
        stays.work()
        leaves.work()
    ask(log)
    answered = work_off(log, stays, leaves)
    assert {entry.value for entry in answered} == {b"stays", b"leaves"}
    leaves.consumer.close()
    ask(log)
    assert work_off(log, stays) == answered
    stays.consumer.close()
