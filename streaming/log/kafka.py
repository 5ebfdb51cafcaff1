"""The log on a Kafka cluster: many machines, every record on several of them. `protocol.py` says what it promises.

    append: within the byte budget -> every in-sync replica has it -> acknowledged

No transactions: a record may lie in the log twice, and readers recognise it by its deterministic id. Topics are never
made here: `streamdpo check --create-topics` does. A cluster that is away for a while is no error: appends, commits and
questions wait for `delivery_timeout_s`, reads are empty.
"""

import threading
from collections.abc import Iterable, Sequence

from kafka import KafkaConsumer, KafkaProducer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError

from streaming import topics as table
from streaming.config import KafkaConfig
from streaming.errors import LogError
from streaming.log.kafka_client import client_settings
from streaming.log.kafka_cluster import Cluster
from streaming.log.kafka_consumer import Deleted, LogConsumer
from streaming.log.kafka_failures import unreachable
from streaming.log.kafka_group import steady
from streaming.log.kafka_newest import Newest
from streaming.log.kafka_producer import Appender, Placed
from streaming.log.placing import ENVELOPE_BYTES, partition_of, refuse_too_large
from streaming.log.protocol import Entry, Log, Offsets, Output, Partition
from streaming.metrics import Metrics

_HEARTBEAT_S = 0.5
"""Between two heartbeats of a group member at most: by them it learns that others have joined or left."""

_HEARTBEATS = 4
"""That may get lost in a session, at least."""

_FETCH_WAIT_S = 0.2
"""How long a broker holds an empty fetch back: new records come at once, but a seek waits for it."""

_METADATA_S = 10.0
"""A topic or partition that a broker did not know of yet is found this soon; kafka-python's own limit is 5 minutes."""

_FETCHES = 4
"""Partitions' worth of `fetch_bytes` that one request brings: what a reader's memory is bounded by, about twice."""


class KafkaLog(Log):
    """A run's topics on a cluster. Safe to use from several threads; each reader belongs to one."""

    def __init__(
        self, url: str, *, run: str, max_record_bytes: int, config: KafkaConfig, metrics: Metrics | None = None
    ) -> None:
        """Connects: raises NotReadyError where no broker lets it in within `connect_timeout_s`."""
        self._config = config
        self._max_record_bytes = max_record_bytes
        settings = client_settings(url, config)
        self._cluster = Cluster(
            settings, run=run, connect_timeout_s=config.connect_timeout_s, timeout_s=config.delivery_timeout_s
        )
        # Known from the first connection; the others need not ask again, and do not fail where a broker is down.
        self._settings = settings | {"api_version": self._cluster.api_version, "metrics_enabled": False}
        self._appender = Appender(self._make_producer, config, servers=self._cluster.servers, metrics=metrics)
        self._lock = threading.Lock()
        self._newest: dict[str, Newest] = {}
        self._consumers: set[LogConsumer] = set()
        self._is_closed = False

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        placed = [self._place(output) for output in outputs]
        if not placed:
            return []
        offsets = self._appender.append(placed)
        return [(record.partition, offset) for record, offset in zip(placed, offsets, strict=True)]

    def subscribe(self, group: str, topics: Sequence[str]) -> LogConsumer:
        for topic in topics:
            self._cluster.num_partitions(topic)  # a missing topic is an error here, and not a wait without end
        consumer = self._open_consumer(group)
        consumer.subscribe(topics)
        return consumer

    def assign(self, offsets: Offsets) -> LogConsumer:
        return self.follow(offsets, None)

    def follow(self, offsets: Offsets, deleted: Deleted | None) -> LogConsumer:
        """As `assign`; and `deleted` hears of tombstones, which are no entries."""
        for place in offsets:
            self._cluster.place(place)
        consumer = self._open_consumer(None, deleted)
        consumer.assign(offsets)
        return consumer

    def begin_offsets(self, topic: str) -> dict[Partition, int]:
        return self._cluster.begin_offsets(self._cluster.places([topic]))

    def end_offsets(self, topic: str) -> dict[Partition, int]:
        return self._cluster.end_offsets(self._cluster.places([topic]))

    def committed(self, group: str, topics: Sequence[str]) -> dict[Partition, int]:
        return self._cluster.committed(group, topics)

    def newest(self, topic: str) -> dict[bytes, Entry]:
        row = table.find(topic)
        if row is None or not row.compacted:
            raise LogError("it keeps no newest record per key", where=topic, do="Ask this of a compacted topic.")
        with self._lock:
            found = self._newest.setdefault(topic, Newest(self, topic))
        return found.look()

    def trim(self, offsets: Offsets) -> None:
        self._cluster.trim(offsets)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            consumers = list(self._consumers)
        for consumer in consumers:
            consumer.close()
        self._appender.close()
        self._cluster.close()

    def _place(self, output: Output) -> Placed:
        refuse_too_large(output, self._max_record_bytes, setting="log.max_record_bytes")
        number = partition_of(output.key, self._cluster.num_partitions(output.topic))
        return Placed(self._cluster.topic(output.topic), number, output.key, output.value)

    def _make_producer(self) -> KafkaProducer:
        config = self._config
        return KafkaProducer(
            **self._settings,
            acks="all",
            enable_idempotence=True,
            allow_auto_create_topics=False,
            compression_type=None if config.compression == "none" else config.compression,
            linger_ms=round(config.linger_s * 1000),
            batch_size=config.batch_bytes,
            max_request_size=self._max_record_bytes + 2 * ENVELOPE_BYTES,
            delivery_timeout_ms=round(config.delivery_timeout_s * 1000),
            max_block_ms=round(config.delivery_timeout_s * 1000),
        )

    def _open_consumer(self, group: str | None, deleted: Deleted | None = None) -> LogConsumer:
        config = self._config
        self._cluster.check_open()
        try:
            client = KafkaConsumer(
                **self._settings,
                group_id=None if group is None else self._cluster.group(group),
                enable_auto_commit=False,
                auto_offset_reset="none",
                allow_auto_create_topics=False,
                partition_assignment_strategy=(CooperativeStickyAssignor,),
                session_timeout_ms=round(config.session_timeout_s * 1000),
                heartbeat_interval_ms=round(min(_HEARTBEAT_S, config.session_timeout_s / _HEARTBEATS) * 1000),
                max_poll_interval_ms=round(config.max_poll_interval_s * 1000),
                metadata_max_age_ms=round(_METADATA_S * 1000),
                max_partition_fetch_bytes=config.fetch_bytes,
                fetch_max_wait_ms=round(_FETCH_WAIT_S * 1000),
                fetch_max_bytes=_FETCHES * config.fetch_bytes,
            )
        except KafkaError as cause:
            raise unreachable(self._cluster.servers, cause) from cause
        consumer = LogConsumer(
            client if group is None else steady(client),
            self._cluster,
            group=group,
            timeout_s=config.delivery_timeout_s,
            closed=self._forget,
            deleted=deleted,
        )
        with self._lock:
            self._consumers.add(consumer)
        return consumer

    def _forget(self, consumer: LogConsumer) -> None:
        with self._lock:
            self._consumers.discard(consumer)
