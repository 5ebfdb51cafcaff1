"""How old a pair is for a learner that another policy's samples feed. Reads the log's newest versions, nothing else.

The learner's own versions say nothing about such a pair: what counts is how far the policy that sampled it has moved
on since. So the age of a pair is the number of versions that its sampler has published after the oldest token.
"""

import time
from collections.abc import Callable

from learner.claim import newest_versions
from learner.staleness import pair_staleness
from streaming import topics
from streaming.log.protocol import Log
from streaming.records import Pair, WeightVersion

LOOK_S = 1.0
"""Between two looks at the sampler's versions: an age may lag behind by what is published in a second."""


class Samplers:
    """The newest version of every other policy that samples for this learner."""

    def __init__(self, log: Log, *, now: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._now = now
        self._newest: dict[str, WeightVersion] = {}
        self._looked_s: float | None = None

    def age(self, pair: Pair) -> int | None:
        """Versions that the sampler is ahead of the pair's oldest token; None where no bound holds."""
        assert pair.sampled_by is not None, "a pair of the own policy is as old as the learner's own versions say"
        if self._looked_s is None or self._now() - self._looked_s >= LOOK_S or not self._knows(pair):
            self._look()
        newest = self._newest.get(pair.sampled_by)
        return None if newest is None else pair_staleness(pair, newest.version, newest.lineage)

    def _knows(self, pair: Pair) -> bool:
        """Whether no token comes from a version that was published after the last look."""
        newest = self._newest.get(pair.sampled_by or "")
        spans = [*pair.chosen.spans, *(pair.rejected.spans if pair.rejected else [])]
        return newest is not None and all(span.version <= newest.version for span in spans)

    def _look(self) -> None:
        self._looked_s = self._now()
        self._newest = newest_versions(self._log)


def has_selected_all(log: Log, policy: str) -> bool:
    """Whether the policy's selectors have settled every group that is scored by now."""
    ends = log.end_offsets(topics.SCORED.name)
    committed = log.committed(topics.selectors(policy), [topics.SCORED.name])
    return all(committed.get(place, 0) >= end for place, end in ends.items())
