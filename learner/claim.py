"""Which start of the learner speaks for a policy. Every start claims an epoch that nobody had; the newest one is right.

    claimed (a directory of its own) -> fence noted -> origin found (the newest checkpoint) -> written down -> held
                                                                                           `-> overtaken: refused

A learner that stood still for minutes may wake in the middle of anything, when its heir has started from a checkpoint.
Before everything that others can see it looks for a newer epoch, on disk and in the log, and stops. One act may still
slip through, where it stood still between the look and the act: the claim of the heir makes it void. A checkpoint that
is not among the heir's ancestors is never restored, and feedback behind its fence counts for nobody.
"""

import threading
from pathlib import Path

from learner import checkpoint
from learner.checkpoint import Checkpoint
from learner.pairs import ReaderState
from streaming import topics
from streaming.errors import NotReadyError, SupersededError
from streaming.fencing import fence_at_the_end, still_needed
from streaming.log.protocol import Log
from streaming.readable import readable
from streaming.records import WeightVersion

_MAX_RECORDS = 256
"""Announcements read at once; a learner publishes about one a step."""


class Claim:
    """One start's right to speak for a policy, and what it starts from. May be asked from several threads."""

    def __init__(self, root: Path, log: Log, policy: str, *, at_least: int = 1) -> None:
        """Claim the next epoch of the checkpoints in `root`: newer than every start that left anything anywhere.

        From now on every older epoch is refused. Of several that start at once each gets its own, and the newest wins.
        """
        self._root = root
        self._policy = policy
        self._lock = threading.Lock()
        self._announced = log.assign(log.end_offsets(topics.WEIGHTS.name))  # before the look: nothing may fall between
        published = newest_version(log, policy)
        self._newest_announced = published.version.epoch if published else 0
        self.epoch = checkpoint.claim_epoch(root, at_least=max(at_least, self._newest_announced + 1))
        fence = fence_at_the_end(log, topics.FEEDBACK.name, self.epoch)
        self.origin: Checkpoint | None = checkpoint.newest(root)  # after the fence: it holds all that counts before it
        self._refuse_another_log()
        known = [*(published.fences if published else []), *checkpoint.fences(root), fence]
        self.fences = still_needed(known, log, topics.FEEDBACK.name)
        checkpoint.write_beginning(root, self.epoch, self.origin, self.fences)

    def refuse_to_be_second(self) -> None:
        """Raises SupersededError where a newer start of this policy's learner has taken over."""
        newest = max(checkpoint.newest_epoch(self._root), self._newest_in_log())
        if newest > self.epoch:
            raise SupersededError(
                f"epoch {newest} of this policy is running, this is epoch {self.epoch}",
                where=f"policy {self._policy}",
                do="Nothing: the newer learner goes on from the newest checkpoint; what this one did since is void.",
            )

    @property
    def reader(self) -> ReaderState | None:
        """Where to read on, and what is settled for ever. Offsets of a log that is lost mean nothing."""
        if self.origin is None:
            return None
        state = self.origin.state
        is_of_this_log = state.version.epoch >= checkpoint.log_began(self._root)
        return state.reader if is_of_this_log else ReaderState([], state.reader.settled)

    def _refuse_another_log(self) -> None:
        """Every epoch announces a version before its first checkpoint, and the newest announcement stays for ever."""
        if self.origin is None:
            return
        of = self.origin.state.version.epoch
        if of >= checkpoint.log_began(self._root) and self._newest_announced < of:
            raise NotReadyError(
                f"the log knows nothing of epoch {of}, which the newest checkpoint is of: it is another log",
                where=str(self.origin.directory),
                do="Put the log back in its place. If it is lost: `streamdpo recover` starts a new one from the "
                "checkpoint, and then the same run goes on.",
            )

    def close(self) -> None:
        self._announced.close()

    def _newest_in_log(self) -> int:
        with self._lock:
            for weights in readable(WeightVersion, self._announced.read(max_records=_MAX_RECORDS, timeout_s=0)):
                if weights.policy == self._policy:
                    self._newest_announced = max(self._newest_announced, weights.version.epoch)
            return self._newest_announced


def newest_version(log: Log, policy: str) -> WeightVersion | None:
    """The newest announced version of a policy; None before the first."""
    return newest_versions(log).get(policy)


def newest_versions(log: Log) -> dict[str, WeightVersion]:
    """The newest announced version of every policy that has one."""
    found = readable(WeightVersion, log.newest(topics.WEIGHTS.name).values())
    return {one.policy: one for one in sorted(found, key=lambda one: one.version)}
