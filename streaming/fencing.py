"""Zombies: a process that stood still for minutes, while a newer start of its role took over, and goes on.

It looks for its heir before everything that others can see, and stops. Where it stood still between the look and the
act, what it wrote is void:

    key of each epoch's own   a zombie's beat or weight version does not replace its heir's newer one
    fence of each epoch       feedback that an older epoch appends behind it counts for nobody

Generators, scorers and selectors have no epoch to claim: another member of their group has their partitions by then.
"""

from collections.abc import Iterable

from streaming import topics
from streaming.log.protocol import Entry, Log
from streaming.records import Feedback, WeightVersion, decode

NUM_KEYS = 8
"""Epochs that have a key of their own in a compacted topic, so that its keys stay few: only a zombie that is exactly
so many starts old writes over its heir's record, and that one must have passed its own look for an heir too."""


AWAY_S = 5.0
"""A member of a group that has not spoken with the log for so long asks whether it still holds its partitions before
it appends: half of the embedded log's lease, and less than a Kafka session."""


def epoch_key(key: str, epoch: int) -> bytes:
    """The key of what one start of a role writes into a compacted topic."""
    return f"{key}/{epoch % NUM_KEYS}".encode()


class Fences:
    """Where each learner took over, by policy."""

    def __init__(self, weights: Iterable[WeightVersion] = ()) -> None:
        self._ends: dict[str, dict[int, dict[int, int]]] = {}  # policy -> epoch -> partition -> offset
        for one in weights:
            self.add(one)

    def add(self, weights: WeightVersion) -> None:
        """A version was announced; every one names its epoch's fence and those before."""
        known = self._ends.setdefault(weights.policy, {})
        known |= {fence.epoch: dict(fence.ends) for fence in weights.fences}

    def is_void(self, feedback: Feedback, entry: Entry) -> bool:
        """Whether this was written by a learner of which a newer start had taken over by then."""
        writer = feedback.epoch if feedback.told_by is None else feedback.told_by
        if writer is None:
            return False
        return any(
            epoch > writer and entry.offset >= ends.get(entry.partition, entry.offset + 1)
            for epoch, ends in self._ends.get(feedback.policy, {}).items()
        )


def read_fences(log: Log) -> Fences:
    """The fences that the log knows of: those of every learner that has announced a version."""
    newest = log.newest(topics.WEIGHTS.name).values()
    return Fences(decode(WeightVersion, entry.value, where=entry.where) for entry in newest)
