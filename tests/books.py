"""What a run left behind, read once and as a whole: the log's records and the checkpoints, for one policy.

    log (through the protocol, so any backend) + checkpoints -> Books

Off-line: beside a live run it reads what is of no one moment. Knows no process and changes nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from learner import checkpoint
from learner.settled import SettledState
from streaming import topics
from streaming.audit import SUPERSEDED
from streaming.errors import RecordError
from streaming.fencing import Fences, read_issuers
from streaming.frontier import IntervalSet
from streaming.history import entries
from streaming.log.protocol import Entry, Log, Partition
from streaming.records import (
    FINAL_ENDINGS,
    DeadLetter,
    Feedback,
    Group,
    Pair,
    PromptRequest,
    Record,
    ScoredGroup,
    WeightVersion,
    decode,
)

R = TypeVar("R", bound=Record)
Example = tuple[int, int]
"""(request number, index of the example)."""

GROUP_DIGITS = 16
"""A group's id is all of a key, or its end."""

NOTHING_SETTLED = SettledState()


class Placed(NamedTuple):
    """A record and where it lies."""

    entry: Entry
    record: Any

    @property
    def place(self) -> Partition:
        return self.entry.topic, self.entry.partition


@dataclass(frozen=True)
class Lineage:
    """What the newest checkpoint descends from, and what it holds."""

    epoch: int = 0
    last_steps: Mapping[int, int] = field(default_factory=dict)  # epoch -> its last step that the newest one has in it
    settled: SettledState = NOTHING_SETTLED
    offsets: Mapping[Partition, int] = field(default_factory=dict)

    def has(self, epoch: int | None, step: int | None) -> bool:
        """Whether this step is part of the newest checkpoint."""
        return epoch is not None and step is not None and step <= self.last_steps.get(epoch, -1)

    def has_settled(self, example: Example) -> bool:
        number, index = example
        if number in IntervalSet(self.settled.intervals):
            return True
        return any(claim.request_number == number and index in claim.indices for claim in self.settled.claims)


def read_lineage(root: Path) -> Lineage:
    """The newest whole checkpoint below `root`, and where each epoch of its ancestors was left."""
    newest = checkpoint.newest(root)
    if newest is None:
        return Lineage()
    last_steps: dict[int, int] = {}
    name: str | None = str(newest.directory.relative_to(root))
    while name is not None:
        epoch, step = _place_of(name)
        last_steps[epoch] = step
        begun = root / f"epoch-{epoch}" / checkpoint.BEGINNING
        name = msgspec.json.decode(begun.read_bytes(), type=checkpoint.Beginning).origin if begun.exists() else None
    reader = newest.state.reader
    offsets = {(topic, partition): offset for topic, partition, offset in reader.offsets}
    return Lineage(newest.state.version.epoch, last_steps, reader.settled, offsets)


def _place_of(name: str) -> tuple[int, int]:
    """Epoch and step of "epoch-E/step-N" or "epoch-E/step-N.AGAIN"."""
    epoch, step = name.split("/")
    return int(epoch.removeprefix("epoch-")), int(step.removeprefix("step-").split(".")[0])


class Books:
    """All of a run that one policy's promises are about."""

    def __init__(self, log: Log, *, policy: str, checkpoints: Path | None = None, max_staleness: int | None = None):
        self.policy = policy
        self.max_staleness = max_staleness
        self.broken: list[Entry] = []  # bytes that are no record of their topic
        self.weights = [one for one in self._read(log, topics.WEIGHTS, WeightVersion) if one.record.policy == policy]
        issuers = read_issuers(log)
        asked = self._read(log, topics.PROMPTS, PromptRequest)
        counting = [one for one in asked if not issuers.is_void(one.record.claim, one.entry)]
        self.requests = {one.record.number: one for one in counting}
        self.groups = self._read(log, topics.CANDIDATES, Group)
        self.scored = self._read(log, topics.SCORED, ScoredGroup)
        self.pairs = self._read(log, topics.pairs(policy), Pair)
        self.letters = [one.record for one in self._read(log, topics.DEAD_LETTER, DeadLetter)]
        fences = Fences(one.record for one in self.weights)
        told = self._read(log, topics.FEEDBACK, Feedback)
        self.feedback: list[Feedback] = [
            one.record for one in told if one.record.ends_for(policy) and not fences.is_void(one.record, one.entry)
        ]
        self.lineage = read_lineage(checkpoints) if checkpoints else Lineage()
        self.committed = {
            **log.committed("generators", [topics.PROMPTS.name]),
            **log.committed("scorer", [topics.CANDIDATES.name]),
            **log.committed(topics.selectors(policy), [topics.SCORED.name]),
            **log.begin_offsets(topics.pairs(policy).name),
            **self.lineage.offsets,
        }
        self.begins = {place: begin for topic in topics.all_topics(policy) for place, begin in _begins(log, topic)}
        self.group_numbers = {one.record.group_id: number for number, one in self.requests.items()}

    def final_endings(self) -> dict[Example, list[Feedback]]:
        """How each example ended; a dead letter that was sent again has not."""
        found: dict[Example, list[Feedback]] = defaultdict(list)
        for one in self.feedback:
            example = (one.request_number, one.index)
            if one.ending == "redriven":
                found[example] = [ending for ending in found[example] if ending.ending != "dead_lettered"]
            elif one.ending in FINAL_ENDINGS and not (one.ending == "dropped" and one.reason == SUPERSEDED):
                found[example].append(one)
        return found

    def ended(self) -> set[int]:
        """Requests of which every example has ended."""
        indices: dict[int, set[int]] = defaultdict(set)
        num_examples: dict[int, int] = {}
        for (number, index), told in self.final_endings().items():
            if told:
                indices[number].add(index)
                num_examples[number] = max(one.num_examples for one in told)
        return {number for number, found in indices.items() if len(found) >= num_examples[number]}

    def waiting(self, records: Iterable[Placed]) -> list[Any]:
        """Those that the stage behind them has not settled yet: it reads them again after a restart."""
        return [one.record for one in records if one.entry.offset >= self.committed.get(one.place, 0)]

    def backlog(self) -> set[int]:
        """Requests that lie in front of some stage."""
        waiting = [*self.waiting(self.groups), *(one.group for one in self.waiting(self.scored))]
        numbers = {group.request.number for group in waiting} | {one.number for one in self.waiting(self._requests())}
        return numbers | {number for number, _ in self.backlog_examples()}

    def backlog_examples(self) -> set[Example]:
        """Examples that the learner will read again."""
        found = {(pair.request_number, pair.index) for pair in self.waiting(self.pairs)}
        return {example for example in found if not self.lineage.has_settled(example)}

    def unreadable(self, topic: topics.Topic) -> set[int]:
        """Requests whose record of this topic is no record any more, as its key says."""
        keys = {
            entry.key.decode(errors="replace")[-GROUP_DIGITS:] for entry in self.broken if entry.topic == topic.name
        }
        return {number for group_id, number in self.group_numbers.items() if group_id in keys}

    def in_steps(self) -> list[Feedback]:
        """Examples in a gradient step that the newest checkpoint has in it."""
        steps = [one for one in self.feedback if one.ending == "consumed" and one.stage == "learner" and not one.reason]
        return [one for one in steps if self.lineage.has(one.epoch, one.step)]

    def is_trimmed(self, topic: str) -> bool:
        """Whether retention has taken something of it."""
        return any(begin > 0 for place, begin in self.begins.items() if place[0] == topic)

    def _requests(self) -> Iterable[Placed]:
        return self.requests.values()

    def _read(self, log: Log, topic: topics.Topic, kind: type[R]) -> list[Placed]:
        found = []
        for entry in entries(log, topic.name):
            try:
                found.append(Placed(entry, decode(kind, entry.value, where=entry.where)))
            except RecordError:
                self.broken.append(entry)
        return found


def _begins(log: Log, topic: topics.Topic) -> Iterable[tuple[Partition, int]]:
    return log.begin_offsets(topic.name).items()
