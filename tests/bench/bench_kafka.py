"""The Kafka log against bare kafka-python: the same records on the same broker, turn by turn in one run.

The peer is what one would write without a log: an idempotent producer that sends a batch and waits for every
acknowledgement, and a consumer that polls; compression, batch and fetch sizes are the log's. The log adds partitions by
key, a size check, the byte budget, fair reading, and positions. `make bench ONLY=kafka` starts a broker;
KAFKA_BOOTSTRAP names another.
"""

import contextlib
import itertools
import os
import random
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from streaming.config import KafkaConfig
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import Output
from tests.bench import bench_log
from tests.kafka_cluster import Cluster, why_not

GOAL = 0.8
"""At least four fifths of bare kafka-python's rate."""

NUM_BYTES = 4096
"""About a group of eight short candidates."""

BATCH = 64
NUM_PARTITIONS = 4
TOPIC = "candidates"
READ_BATCHES = 40
"""Appended for the readers: a turn reads them all, again and again."""

# Half noise: compressible about as well as msgpack of tokens and log-probs.
VALUE = random.Random(0).randbytes(NUM_BYTES // 2) + bytes(NUM_BYTES // 2)
CONFIG = KafkaConfig()


class Ours:
    """The log, through its public functions."""

    def __init__(self, bootstrap: str, run: str) -> None:
        self.log = KafkaLog(f"kafka://{bootstrap}", run=run, max_record_bytes=2**20, config=CONFIG)
        self._num = itertools.count()

    def append(self, num: int) -> int:
        self.log.append([Output(TOPIC, b"%016x" % next(self._num), VALUE) for _ in range(num)])
        return num

    def read_all(self) -> int:
        num = 0
        ends = sum(self.log.end_offsets(TOPIC).values())
        with self.log.assign(self.log.begin_offsets(TOPIC)) as reader:
            while num < ends:
                num += len(reader.read(max_records=BATCH, timeout_s=10))
        return num

    def close(self) -> None:
        self.log.close()


class Peer:
    """Bare kafka-python."""

    def __init__(self, bootstrap: str, run: str) -> None:
        self._bootstrap = bootstrap
        self._topic = f"{run}.{TOPIC}"
        self._num = itertools.count()
        self._producer = KafkaProducer(
            bootstrap_servers=bootstrap,
            acks="all",
            enable_idempotence=True,
            compression_type=CONFIG.compression,
            batch_size=CONFIG.batch_bytes,
            linger_ms=round(CONFIG.linger_s * 1000),
        )

    def append(self, num: int) -> int:
        keys = [b"%016x" % next(self._num) for _ in range(num)]
        futures = [
            self._producer.send(self._topic, VALUE, key, partition=zlib.crc32(key) % NUM_PARTITIONS) for key in keys
        ]
        for future in futures:
            future.get(60)
        return num

    def read_all(self) -> int:
        num = 0
        consumer = KafkaConsumer(
            bootstrap_servers=self._bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            max_partition_fetch_bytes=CONFIG.fetch_bytes,
        )
        places = [TopicPartition(self._topic, number) for number in range(NUM_PARTITIONS)]
        consumer.assign(places)
        ends = sum(consumer.end_offsets(places).values())
        while num < ends:
            num += sum(map(len, consumer.poll(timeout_ms=10_000, max_records=BATCH).values()))
        consumer.close()
        return num

    def close(self) -> None:
        self._producer.close()


def run() -> list[dict[str, Any]]:
    """Measure everything; takes about half a minute, and the broker's start. Nothing where no broker can be started."""
    if not os.environ.get("KAFKA_BOOTSTRAP") and (reason := why_not()) is not None:
        print(f"Kafka is not measured: {reason}")
        return []
    with broker() as bootstrap:
        written, read = f"bench-{os.getpid()}-written", f"bench-{os.getpid()}-read"
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            made = {f"{name}.{TOPIC}": {"num_partitions": NUM_PARTITIONS} for name in (written, read)}
            admin.create_topics(made)
            admin.wait_for_topics(list(made))
        rows = [*measure_appends(bootstrap, written), measure_reads(bootstrap, read)]
    return rows


def measure_appends(bootstrap: str, run: str) -> list[dict[str, Any]]:
    with contextlib.closing(Ours(bootstrap, run)) as ours, contextlib.closing(Peer(bootstrap, run)) as peer:
        return [
            _compare(f"Kafka log: append, {num} records a call", partial(ours.append, num), partial(peer.append, num))
            for num in (1, BATCH, 8 * BATCH)
        ]


def measure_reads(bootstrap: str, run: str) -> dict[str, Any]:
    with contextlib.closing(Ours(bootstrap, run)) as ours, contextlib.closing(Peer(bootstrap, run)) as peer:
        for _ in range(READ_BATCHES):
            ours.append(BATCH)
        return _compare(f"Kafka log: read, {BATCH} records a call", ours.read_all, peer.read_all)


def _compare(name: str, ours: Any, peer: Any) -> dict[str, Any]:
    row = bench_log.compare(name, ours, peer)
    return row | {"goal": f"> {GOAL}", "holds": row["ratio"] > GOAL}


@contextlib.contextmanager
def broker() -> Iterator[str]:
    """Where to connect."""
    if own := os.environ.get("KAFKA_BOOTSTRAP"):
        yield own
        return
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        yield cluster.bootstrap
