"""Roles that break one rule each, to see that the simulation finds it. Each is a part that is cast in a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from actors.pacing import Outstanding
from learner import endings
from learner.checkpoint import State
from learner.claim import Claim
from learner.lead import Lead
from learner.pairs import ReaderState
from learner.settled import SettledState
from streaming.log.protocol import Entry
from streaming.records import FINAL_ENDINGS, Feedback
from tests.simulation.memory_log import MemoryConsumer, MemoryLog
from tests.simulation.parts import FiberTrainer
from tests.simulation.roles import Cast


class HastyConsumer(MemoryConsumer):
    """Commits what it reads before anybody has worked on it."""

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        entries = super().read(max_records=max_records, timeout_s=timeout_s)
        if self.group is not None:
            self.commit({(entry.topic, entry.partition): entry.offset + 1 for entry in entries})
        return entries


class HastyLog(MemoryLog):
    """Commit before append."""

    def subscribe(self, group: str, topics: Sequence[str]) -> MemoryConsumer:
        joined = super().subscribe(group, topics)
        return HastyConsumer(self.store, joined.process, {}, group=joined.group, member=joined.member)


class ForgetfulTrainer(FiberTrainer):
    """Its checkpoints do not say what is settled."""

    def save(self, state: State, still_ours: Callable[[], None]) -> Path:
        forgotten = ReaderState(state.reader.offsets, SettledState())
        return super().save(replace(state, reader=forgotten), still_ours)


class HurriedTrainer(FiberTrainer):
    """Its checkpoints go on behind pairs that were read and not trained."""

    def save(self, state: State, still_ours: Callable[[], None]) -> Path:
        offsets = [(topic, number, offset + 1) for topic, number, offset in state.reader.offsets]
        return super().save(replace(state, reader=ReaderState(offsets, state.reader.settled)), still_ours)


class SameEpochClaim(Claim):
    """Every start of the learner calls itself the first."""

    def __init__(self, root: Path, log: MemoryLog, policy: str, *, at_least: int = 1) -> None:
        super().__init__(root, log, policy, at_least=at_least)
        self.epoch = 1

    def refuse_to_be_second(self) -> None:
        """So that nobody is second."""


class BoldLead(Lead):
    """Calls examples trained before the checkpoint that contains them is durable."""

    def _checkpoint(self) -> None:
        self._feed_back([endings.final(one) for one in self._ended])
        super()._checkpoint()


class LooseOutstanding(Outstanding):
    """Frees a slot for `consumed`, and once more for the final ending."""

    num_extra = 0

    def end(self, feedback: Feedback) -> bool:
        is_freed = super().end(feedback)
        if not is_freed and feedback.ending in FINAL_ENDINGS:
            self.num_extra += 1
        return is_freed

    @property
    def num_train(self) -> int:
        return max(0, super().num_train - self.num_extra)


BROKEN: dict[str, tuple[Cast, str]] = {
    "commits before it appends": (Cast(log=HastyLog), "lost"),
    "forgets what is settled": (Cast(trainer=ForgetfulTrainer), "forgotten"),
    "goes on behind what it has not trained": (Cast(trainer=HurriedTrainer), "balance"),
    "does not raise the epoch": (Cast(claim=SameEpochClaim), "versions"),
    "tells before it is durable": (Cast(lead=BoldLead), "forgotten"),
    "frees a slot twice": (Cast(outstanding=LooseOutstanding), "pacing"),
}
"""What a broken role does -> the cast, and the invariant that it breaks."""
