"""Zombies: a process that stood still for minutes, while a newer start of its role took over, and goes on.

It looks for its heir before everything that others can see, and stops. Where it stood still between the look and the
act, what it wrote is void:

    key of each epoch's own   a zombie's beat or weight version does not replace its heir's newer one
    fence of each epoch       feedback that an older epoch appends behind it counts for nobody
    fence of each claim       a request that an older claim appends behind it is never sampled

Other generators, scorers and selectors need no fence: another member of their group has their partitions by then.

Feedback is only counted, so its readers may learn of a fence later. A request is acted upon at once, so its reader
looks for the newest claim after it has read it, and waits where that one's fence is not announced yet:

    claimed (an append to `roles`, whose offset is the claim) -> fence noted (the ends of `prompts`) -> announced
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from streaming import topics
from streaming.errors import RecordError
from streaming.log.protocol import Entry, Log
from streaming.readable import readable
from streaming.records import Feedback, Fence, Outline, RoleState, WeightVersion, decode

NUM_KEYS = 8
"""Epochs that have a key of their own in a compacted topic, so that its keys stay few: only a zombie that is exactly
so many starts old writes over its heir's record, and that one must have passed its own look for an heir too."""


AWAY_S = 5.0
"""A member of a group that has not spoken with the log for so long asks whether it still holds its partitions before
it appends: half of the embedded log's lease, and less than a Kafka session."""

_SCHEDULER = b"scheduler-0/"

CLAIM = _SCHEDULER + b"claim"
"""Key of the schedulers' claims in `roles`: of two starts the one whose append came later is the newer."""


Verdict = Literal["counts", "void", "open"]


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
        self._ends.setdefault(weights.policy, {}).update(_by_epoch(weights.fences))

    def is_void(self, feedback: Feedback, entry: Entry) -> bool:
        """Whether this was written by a learner of which a newer start had taken over by then."""
        writer = feedback.epoch if feedback.told_by is None else feedback.told_by
        return _is_behind(entry, writer, self._ends.get(feedback.policy, {}))


def read_fences(log: Log) -> Fences:
    """The fences that the log knows of: those of every learner that has announced a version."""
    return Fences(readable(WeightVersion, log.newest(topics.WEIGHTS.name).values()))


class Issuers:
    """Which requests count: where each scheduler took over, as the newest one that has announced it says."""

    def __init__(self, newest: int | None = None, fences: Iterable[Fence] = ()) -> None:
        """`newest` is the newest claim; None where there was never one."""
        self.newest = newest
        self.fences = list(fences)
        self._ends = _by_epoch(self.fences)

    def verdict(self, claim: int | None, entry: Entry) -> Verdict:
        """Of a request that this claim wrote; "open" where a newer one is about to say where it has taken over."""
        if self.is_void(claim, entry):
            return "void"
        if claim is None or self.newest is None or claim >= self.newest or self.newest in self._ends:
            return "counts"
        return "open"

    def is_void(self, claim: int | None, entry: Entry) -> bool:
        """Whether this request was written by a scheduler of which a newer start had taken over by then."""
        return _is_behind(entry, claim, self._ends)


class _Issued(Outline, frozen=True, kw_only=True):
    claim: int | None = None


def claim_of(entry: Entry) -> int | None:
    """Who issued the request in this entry of `prompts`; None where it does not say so, or is no record."""
    try:
        return decode(_Issued, entry.value, where=entry.where).claim
    except RecordError:
        return None


def without_claim(value: bytes) -> bytes:
    """A request's bytes for when a person sends them once more: no fence is about them. Other bytes as they are."""
    try:
        said = msgspec.msgpack.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return value
    if not isinstance(said, dict) or said.pop("claim", None) is None:
        return value
    return msgspec.msgpack.encode(said)


def read_issuers(log: Log) -> Issuers:
    """The issuers as the log knows them now."""
    newest = log.newest(topics.ROLES.name)
    ours = readable(RoleState, (entry for key, entry in newest.items() if key.startswith(_SCHEDULER)))
    fences = max((state.fences for state in ours if state.fences), key=_newest_of, default=[])
    claims = [entry.offset for entry in newest.values() if entry.key == CLAIM and readable(RoleState, [entry])]
    return Issuers(max(claims, default=None), fences)


def still_needed(fences: Iterable[Fence], log: Log, topic: str) -> list[Fence]:
    """By epoch, without those that retention has passed in every partition: nothing that they void can be read."""
    begins = {number: begin for (_, number), begin in log.begin_offsets(topic).items()}
    by_epoch = {fence.epoch: fence for fence in fences}
    newest = max(by_epoch)
    return [
        fence
        for epoch, fence in sorted(by_epoch.items())
        if epoch == newest or any(end >= begins.get(number, 0) for number, end in fence.ends)
    ]


def fence_at_the_end(log: Log, topic: str, epoch: int) -> Fence:
    """Void is what older epochs append to the topic from now on."""
    return Fence(epoch=epoch, ends=sorted((number, end) for (_, number), end in log.end_offsets(topic).items()))


def _newest_of(fences: Iterable[Fence]) -> int:
    return max(fence.epoch for fence in fences)


def _by_epoch(fences: Iterable[Fence]) -> dict[int, dict[int, int]]:
    return {fence.epoch: dict(fence.ends) for fence in fences}


def _is_behind(entry: Entry, writer: int | None, ends: Mapping[int, Mapping[int, int]]) -> bool:
    """Whether this lies behind the fence of an epoch that is newer than its writer."""
    if writer is None:
        return False
    return any(
        epoch > writer and entry.offset >= places.get(entry.partition, entry.offset + 1)
        for epoch, places in ends.items()
    )
