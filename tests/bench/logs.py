"""A log for a measurement, of either backend: with its topics, empty, gone afterwards."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from streaming.config import KafkaConfig, LogConfig
from streaming.log import open_log
from streaming.log.kafka_topics import create_topics, open_admin, wanted_topics
from streaming.log.protocol import Log
from streaming.topics import all_topics
from tests.kafka_cluster import Cluster, why_not

ONE_BROKER = KafkaConfig(partitions=4, replication_factor=1, min_insync_replicas=1)
"""As many partitions as the embedded log has."""


def backends() -> Iterator[str]:
    """The backends that can be measured here; says why where Kafka is none of them."""
    yield "SQLite"
    reason = None if os.environ.get("KAFKA_BOOTSTRAP") else why_not()
    if reason is None:
        yield "Kafka"
    else:
        print(f"Kafka is not measured: {reason}", flush=True)


class Served(NamedTuple):
    """An empty log."""

    url: str
    pids: list[int]  # of the brokers that were started for it


@contextlib.contextmanager
def served(backend: str) -> Iterator[Served]:
    """In a new folder's file, or on a broker: that of KAFKA_BOOTSTRAP, or one of our own."""
    with tempfile.TemporaryDirectory() as folder:
        if backend == "SQLite":
            yield Served(f"sqlite:///{Path(folder).resolve()}/log.db", [])
        elif own := os.environ.get("KAFKA_BOOTSTRAP"):
            yield Served(f"kafka://{own}", [])
        else:
            with Cluster(Path(folder)) as cluster:
                yield Served(f"kafka://{cluster.bootstrap}", cluster.pids)


def make_topics(url: str, run: str, kafka: KafkaConfig = ONE_BROKER) -> None:
    """Create a run's topics where they are not made by themselves."""
    if not url.startswith("kafka://"):
        return
    config = LogConfig(url=url, kafka=kafka)
    with contextlib.closing(open_admin(config)) as admin:
        create_topics(admin, wanted_topics(all_topics("policy"), run, config))


def opened(url: str, run: str, kafka: KafkaConfig = ONE_BROKER) -> Log:
    """The run's log, as a role opens it."""
    return open_log(url, run=run, kafka=kafka)
