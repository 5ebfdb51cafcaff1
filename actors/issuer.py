"""Which start of the scheduler may issue requests: the newest, by the order in which the starts claim it in the log.

    claimed (an append to `roles`, whose offset is the claim) -> fence noted -> announced (in every beat) -> held
                                                                                      `-> overtaken: refused

A scheduler that stood still may wake between its look for an heir and an append. What it appends then lies behind its
heir's fence, and no reader takes it for a request: `streaming/fencing.py` says how they know.
"""

from collections.abc import Iterable

import msgspec

from streaming import topics
from streaming.errors import SupersededError
from streaming.fencing import CLAIM, Issuers, fence_at_the_end, read_issuers, still_needed
from streaming.heartbeat import Heartbeat, refuse_to_be_second, role_states
from streaming.log.protocol import Log, Output
from streaming.records import Fence, encode


class Issuer:
    """One start's right to issue requests. From the moment it is constructed every older start's are refused."""

    def __init__(self, log: Log, heartbeat: Heartbeat) -> None:
        """Raises SupersededError where a newer start has claimed it meanwhile."""
        self._log = log
        self._heartbeat = heartbeat
        refuse_to_be_second(heartbeat.state, role_states(log))
        claimed = msgspec.structs.replace(heartbeat.state, time_s=0.0)  # never newer than this start's beats
        [(_, self.claim)] = log.append([Output(topics.ROLES.name, CLAIM, encode(claimed))])
        known = read_issuers(log)
        self._refuse_behind(known)
        # After the claim: whoever has read a request that is not before this fence finds the claim, and waits for it.
        fence = fence_at_the_end(log, topics.PROMPTS.name, self.claim)
        fences = still_needed([*_one_a_place([*known.fences, fence])], log, topics.PROMPTS.name)
        self.issuers = Issuers(self.claim, fences)
        heartbeat.tell(at_once=True, fences=fences)

    def refuse_to_be_second(self) -> None:
        """Raises SupersededError where a newer start of the scheduler has taken over."""
        refuse_to_be_second(self._heartbeat.state, role_states(self._log))
        self._refuse_behind(read_issuers(self._log))

    def _refuse_behind(self, known: Issuers) -> None:
        if known.newest is not None and known.newest > self.claim:
            raise SupersededError(
                f"claim {known.newest} to issue requests is newer than this start's, which is {self.claim}",
                where=self._heartbeat.state.role_id,
                do="Nothing: the newer scheduler goes on from the log; what this one issued since is void.",
            )


def _one_a_place(fences: Iterable[Fence]) -> Iterable[Fence]:
    """Of fences at one place the newest says it all: a scheduler that starts again and again leaves one of them."""
    return {tuple(fence.ends): fence for fence in sorted(fences, key=lambda fence: fence.epoch)}.values()
