"""Appending to Kafka: within a byte budget, acknowledged by every replica, by a producer that is replaced if it wedges.

    waiting for budget -> sent -> acknowledged by all in-sync replicas -> budget given back

kafka-python's idempotent producer sends again by itself, without loss, copy or change of order, for as long as
`delivery_timeout_s`. What is left for us: a batch that was in flight while the producer's epoch was raised fails
although nothing is wrong with it, and a producer that never answers. Both are sent again, with everything of the same
call and partition behind it, so that the order stays; the records may then lie in the log twice.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from kafka import KafkaProducer
from kafka.errors import KafkaError

from streaming.config import KafkaConfig
from streaming.errors import LogError
from streaming.log.kafka_failures import closed, explain, is_forbidden, is_too_large, passes
from streaming.metrics import Metrics

_OVERHEAD_BYTES = 96
"""Of a record beside its key and value: header, headers' count, batch's share."""

_GRACE_S = 5.0
"""Beyond the delivery timeout, before an unresolved future means a wedge: kafka-python resolves them a little late."""

_FIRST_PAUSE_S = 0.05
"""Before a failed part is sent again; each further pause is twice as long,"""

_LAST_PAUSE_S = 2.0
"""up to this."""


class Placed(NamedTuple):
    """A record and where it goes."""

    topic: str  # the cluster's name
    partition: int
    key: bytes
    value: bytes


class _WedgedError(KafkaError):  # type: ignore[misc]
    """A future was not resolved although kafka-python's own time for it is long over."""


class Budget:
    """Bytes that may be on their way at once, over all threads: kafka-python's own buffer has no bound."""

    def __init__(self, max_bytes: int, metrics: Metrics | None) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._held_bytes = 0
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until `num_bytes` fit, and keep them inside the block. What is larger than all goes alone."""
        with self._freed:
            self._freed.wait_for(lambda: not self._held_bytes or self._held_bytes + num_bytes <= self._max_bytes)
            self._change(num_bytes)
        try:
            yield
        finally:
            with self._freed:
                self._change(-num_bytes)
                self._freed.notify_all()

    def _change(self, num_bytes: int) -> None:
        self._held_bytes += num_bytes
        if self._metrics is not None:
            self._metrics.set("log_in_flight_bytes", self._held_bytes)


class Appender:
    """Sends records and waits until they are durable. Safe to use from several threads; connects when first used."""

    def __init__(
        self,
        make: Callable[[], KafkaProducer],
        config: KafkaConfig,
        *,
        servers: str,
        metrics: Metrics | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make` connects a new producer; its KafkaErrors are ours to explain."""
        self._clock = clock
        self._make = make
        self._timeout_s = config.delivery_timeout_s
        self._servers = servers
        self._metrics = metrics
        self._budget = Budget(config.max_in_flight_bytes, metrics)
        self._lock = threading.Lock()
        self._producer: KafkaProducer | None = None
        self._is_closed = False

    def append(self, records: Sequence[Placed]) -> list[int]:
        """The offset of each record, all of them durable.

        Raises LogError where the cluster did not take them within the delivery timeout: what was sent may or may not
        lie in the log. Raises TooLargeError where a broker refused a record for its size.
        """
        num_bytes = sum(len(record.key) + len(record.value) + _OVERHEAD_BYTES for record in records)
        with self._budget.hold(num_bytes):
            offsets: dict[int, int] = {}
            left = list(range(len(records)))
            deadline_s = self._clock() + self._timeout_s
            pause_s = _FIRST_PAUSE_S
            was_wedged = False
            while left:
                error = self._attempt(records, left, offsets)
                left = _unsettled(records, offsets)
                if isinstance(error, _WedgedError) and not was_wedged:
                    was_wedged, deadline_s = True, self._clock() + self._timeout_s  # the time was not the cluster's
                elif error is not None:
                    self._give_up_unless_it_passes(error, deadline_s, records[left[0]] if left else records[0])
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            return [offsets[i] for i in range(len(records))]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            producer, self._producer = self._producer, None
        if producer is not None:
            _close(producer, timeout_s=_GRACE_S)

    def _attempt(self, records: Sequence[Placed], left: list[int], offsets: dict[int, int]) -> KafkaError | None:
        """Send what is left and wait. Fills in `offsets`; returns the first failure."""
        try:
            producer = self._current()
            futures = {i: _send(producer, records[i]) for i in left}
        except KafkaError as error:
            return error
        first: KafkaError | None = None
        deadline_s = self._clock() + self._timeout_s + _GRACE_S
        for i, future in futures.items():
            try:
                offsets[i] = future.get(timeout=max(0.0, deadline_s - self._clock())).offset
            except KafkaError as error:
                first = first or error
                if not future.is_done:  # the library has long given up on it, or should have: this is the wedge
                    self._replace(producer)
                    return _WedgedError(f"the producer never answered: {error}")
                if not passes(error):
                    self._replace(producer)
        return first

    def _give_up_unless_it_passes(self, error: KafkaError, deadline_s: float, record: Placed) -> None:
        where = f"{self._servers}: {record.topic}/{record.partition}"
        if self._is_closed or is_forbidden(error) or is_too_large(error):
            raise explain(error, where=where) from error
        if self._clock() > deadline_s:
            raise LogError(
                f"not acknowledged within {self._timeout_s:g} s: {type(error).__name__}: {error}",
                where=where,
                do="It is unknown whether the records lie in the log; nothing that they were made from is committed, "
                "so they are made again. Bring the brokers back, or raise log.kafka.delivery_timeout_s.",
            ) from error

    def _current(self) -> KafkaProducer:
        with self._lock:
            if self._is_closed:
                raise closed(self._servers)
            if self._producer is None:
                self._producer = self._make()
            return self._producer

    def _replace(self, broken: KafkaProducer) -> None:
        """Take a new producer next time. Only the first of several threads that say so does it."""
        with self._lock:
            if self._producer is not broken:
                return
            self._producer = None
        if self._metrics is not None:
            self._metrics.count("log_producer_restarts_total")
        _close(broken, timeout_s=0)


def _send(producer: KafkaProducer, record: Placed) -> Any:
    return producer.send(record.topic, key=record.key, value=record.value, partition=record.partition)


def _unsettled(records: Sequence[Placed], offsets: dict[int, int]) -> list[int]:
    """What has to be sent again: what failed, and what lies behind it in the same partition, to keep the order."""
    broken: set[tuple[str, int]] = set()
    left = []
    for i, record in enumerate(records):
        place = record.topic, record.partition
        # A duplicate that the broker recognises without remembering its offset is acknowledged with offset -1.
        if place in broken or offsets.get(i, -1) < 0:
            broken.add(place)
            left.append(i)
    return left


def _close(producer: KafkaProducer, *, timeout_s: float) -> None:
    """A wedged producer cannot be closed in order: kafka-python raises, and its daemon thread is told to end."""
    with suppress(KafkaError):
        producer.close(timeout=timeout_s)
    producer._sender.force_close()
