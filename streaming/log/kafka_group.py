"""A member of a group that may be busy while the group is shared out anew.

kafka-python 3.0.12 drives a rebalance inside `poll` only. Where a poll ends before the rebalance does, and the member
then works on its batch, two things go wrong: no heartbeat is sent, so that the member is soon taken for dead, and the
next poll throws the finished join away and begins another, which disturbs everybody again.
"""

from typing import Any

from kafka import KafkaConsumer
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.structs import MemberState


class _Joined:
    """A join that counts as under way until a poll has taken its result."""

    is_done = False

    def __init__(self, future: Any) -> None:
        self.future = future

    def __getattr__(self, name: str) -> Any:
        return getattr(self.future, name)


class SteadyCoordinator(ConsumerCoordinator):  # type: ignore[misc]
    """Keeps a finished join for the next poll, and the member alive until then."""

    @property
    def _join_task(self) -> _Joined | None:
        joined: _Joined | None = self.__dict__.get("_joined")
        return joined

    @_join_task.setter
    def _join_task(self, future: Any) -> None:
        self.__dict__["_joined"] = None if future is None else _Joined(future)

    async def _do_join_and_sync_async(self) -> Any:
        assignment = await super()._do_join_and_sync_async()
        with self._lock:
            self.state = MemberState.STABLE
            self._enable_heartbeat()
        return assignment

    def reset_generation(self, *arguments: Any, **options: Any) -> None:
        """This member fell out of the group: a join that nobody took is void, and what it holds is lost."""
        super().reset_generation(*arguments, **options)
        if self._join_task is not None and self._join_task.future.is_done:
            self._join_task = None
            self.rejoining = False


def steady(client: KafkaConsumer) -> KafkaConsumer:
    """The same client with a steady coordinator. Before its first poll: kafka-python takes no class for it."""
    assert client._coordinator._join_task is None, "it has not joined yet"
    client._coordinator.__class__ = SteadyCoordinator
    return client


def is_rebalancing(client: KafkaConsumer) -> bool:
    """Whether others are being waited for, or what this member holds is not known yet."""
    return client._coordinator._join_task is not None or client.group_metadata().state is not MemberState.STABLE
