"""What a cluster says of a run's topics and groups: partitions, offsets, commits. And its one deed: trimming.

One connection for all threads. Names here are the run's own; the cluster's carry the prefix `RUN.`.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import MemberToRemove, OffsetSpec
from kafka.errors import KafkaError, UnknownTopicOrPartitionError, for_code

from streaming.errors import LogError
from streaming.log.kafka_failures import ask, closed, explain, missing_topic, passes, unreachable
from streaming.log.protocol import Offsets, Partition

T = TypeVar("T")

_NEW_TOPIC_S = 2.0
"""How long a topic may be unknown: what was just created is not known to every broker at once."""


_NOW_S = 2.0
"""How long a question waits that has no time."""


class Cluster:
    """A run's view of a cluster. Connects at once: raises NotReadyError where no broker lets it in."""

    def __init__(self, settings: dict[str, Any], *, run: str, connect_timeout_s: float, timeout_s: float) -> None:
        self.servers = ",".join(settings["bootstrap_servers"])
        self._run = run
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._num_partitions: dict[str, int] = {}
        self._is_closed = False
        try:
            self._admin = KafkaAdminClient(bootstrap_timeout_ms=round(connect_timeout_s * 1000), **settings)
        except KafkaError as cause:
            raise unreachable(self.servers, cause) from cause

    @property
    def api_version(self) -> tuple[int, ...]:
        """The protocol the brokers speak: other clients that know it connect without asking."""
        version: tuple[int, ...] = self._admin._manager.broker_version
        return version

    def topic(self, name: str) -> str:
        """The cluster's name of a topic."""
        return f"{self._run}.{name}"

    def group(self, name: str) -> str:
        """The cluster's name of a group."""
        return f"{self._run}.{name}"

    def place(self, partition: Partition) -> TopicPartition:
        """The cluster's name of a partition. Raises LogError where the topic has no such partition."""
        topic, number = partition
        num = self.num_partitions(topic)
        if not 0 <= number < num:
            raise LogError("there is no such partition", where=f"{topic}/{number}", do=f"It has {num}, from 0.")
        return TopicPartition(self.topic(topic), number)

    def partition(self, place: TopicPartition) -> Partition:
        """The run's name of a partition."""
        return place.topic.removeprefix(f"{self._run}."), place.partition

    def num_partitions(self, topic: str) -> int:
        """As many as at the first look: a key's partition never changes while the log is open."""
        with self._lock:
            found = self._num_partitions.get(topic)
        if found is None:
            found = ask(partial(self._look_up, self.topic(topic)), where=topic, timeout_s=_NEW_TOPIC_S)
            with self._lock:
                self._num_partitions[topic] = found
        return found

    def places(self, topics: Sequence[str]) -> list[TopicPartition]:
        """Every partition of these topics."""
        return [self.place((topic, number)) for topic in topics for number in range(self.num_partitions(topic))]

    def begin_offsets(self, places: Sequence[TopicPartition]) -> dict[Partition, int]:
        """The oldest offset that is still there."""
        return self._offsets(places, OffsetSpec.EARLIEST)

    def end_offsets(self, places: Sequence[TopicPartition]) -> dict[Partition, int]:
        """The offset that the next record will get."""
        return self._offsets(places, OffsetSpec.LATEST)

    def end_offsets_now(self, places: Sequence[TopicPartition]) -> dict[TopicPartition, int] | None:
        """The same by the cluster's names; None from a cluster that does not answer at once.

        Not asked by a reader's own connection: there the broker answers nothing while a fetch waits for records.
        """
        try:
            manager, wanted = self._admin._manager, dict.fromkeys(places, OffsetSpec.LATEST)
            # list_partition_offsets, but for its timeout: a broker that hangs holds it up for a whole request.
            asked = manager.call_soon(self._admin._async_list_partition_offsets, wanted)
            answer = manager.run(manager.wait_for, asked, round(_NOW_S * 1000))
        except KafkaError as error:
            if not passes(error):
                raise explain(error, where=self.servers) from error
            return None
        return {place: found.offset for place, found in answer.items()}

    def committed(self, group: str, topics: Sequence[str]) -> dict[Partition, int]:
        """Where a group goes on; the beginning of what it never committed."""
        places, name = self.places(topics), self.group(group)
        answer = self._ask(lambda: self._admin.list_group_offsets({name: places}), f"group {group}")
        found = {self.partition(place): committed.offset for place, committed in answer[name].items()}
        found = {place: offset for place, offset in found.items() if offset >= 0}
        missing = [place for place in places if self.partition(place) not in found]
        return found | (self.begin_offsets(missing) if missing else {})

    def trim(self, offsets: Offsets) -> None:
        """Forget what is before these offsets; an offset beyond the end is the end."""
        places = [self.place(partition) for partition in offsets]
        begins, ends = self.begin_offsets(places), self.end_offsets(places)
        wanted = {
            place: min(offsets[partition], ends[partition])
            for place, partition in zip(places, offsets, strict=True)
            if offsets[partition] > begins[partition]
        }
        if wanted:
            self._ask(lambda: self._admin.delete_records(wanted), f"trim of {list(offsets)}")

    def leave(self, group: str, member: str) -> None:
        """Take a member out of its group. One that is not in it, or a cluster that is away, is none to take out."""
        if not member:
            return
        with suppress(KafkaError):
            self._admin.remove_group_members(self.group(group), [MemberToRemove(member_id=member)])

    def check_open(self) -> None:
        """Raises LogError where it is closed."""
        if self._is_closed:
            raise closed(self.servers)

    def close(self) -> None:
        self._is_closed = True
        self._admin.close()

    def _look_up(self, topic: str) -> int:
        [found] = self._admin.describe_topics([topic])
        error = for_code(found["error_code"])
        if error is UnknownTopicOrPartitionError:
            raise missing_topic(topic)
        if found["error_code"]:
            raise error(topic)
        return len(found["partitions"])

    def _offsets(self, places: Sequence[TopicPartition], spec: OffsetSpec) -> dict[Partition, int]:
        answer = self._ask(
            lambda: self._admin.list_partition_offsets(dict.fromkeys(places, spec)), f"offsets of {len(places)} places"
        )
        return {self.partition(place): found.offset for place, found in answer.items()}

    def _ask(self, question: Callable[[], T], where: str) -> T:
        self.check_open()
        return ask(question, where=f"{self.servers}: {where}", timeout_s=self._timeout_s)
