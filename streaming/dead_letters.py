"""What has become of a stage's dead letters: which have ended their request, and which were sent again since.

    died -> told: dead_lettered (the request has ended) -> told: redriven (it has not) -> died again, or done

A copy of what died is nothing new while its request has ended, and is to be done after `streamdpo redrive` sent it
again; only the feedback tells the two apart, for the bytes are the same. And bytes that nobody can read still lie under
a key that names their group, and so their request.
"""

from collections.abc import Sequence
from typing import NamedTuple

from streaming import topics
from streaming.errors import TrimmedError
from streaming.fencing import read_fences
from streaming.history import between, decoded, records
from streaming.keys import group_under
from streaming.log.by_reference import unfetched
from streaming.log.outlines import LetterOutline
from streaming.log.protocol import Log, Partition
from streaming.records import Feedback, PromptRequest, Source

MARK = "redrive"
"""Stage of the marks in the dead-letter topic: they have no bytes, and name the place of a letter that went again."""


class Lying(NamedTuple):
    """A dead letter: where its bytes lay, and under which key."""

    source: Source
    key: bytes


class DeadLetters:
    """The dead letters of one stage: of one policy's, where each policy has its own.

    Reads nothing before the first question, then all feedback there is, and for later questions what is new.
    """

    def __init__(self, log: Log, *, stage: str, policy: str | None = None) -> None:
        self._log = log
        self._stage = stage
        self._policy = policy
        self._told: dict[str, list[Feedback]] = {}  # by group, in their order
        self._open: set[str] = set()  # groups that were sent again, and of which nothing was told since
        self._next: dict[Partition, int] = {}

    def told(self, group_id: str) -> Sequence[Feedback]:
        """What was told of this group's dead letters, `dead_lettered` or `redriven`; nothing that is past retention."""
        self._read_on()
        return self._told.get(group_id, ())

    def has_ended(self, group_id: str) -> bool:
        """Whether a group that died needs nothing: it was told, and not sent again, or what was sent again is known."""
        return bool(self.told(group_id)) and group_id not in self._open

    def is_ours(self, one: Feedback) -> bool:
        """Whether the stage told this."""
        return one.stage == self._stage and self._policy in (None, one.policy)

    def _read_on(self) -> None:
        while True:
            begins, ends = (ask(topics.FEEDBACK.name) for ask in (self._log.begin_offsets, self._log.end_offsets))
            starts = {place: max(begin, self._next.get(place, 0)) for place, begin in begins.items()}
            try:
                return self._read(starts, ends)
            except TrimmedError:  # retention has overtaken the reading: what it took is asked for by nobody
                continue

    def _read(self, starts: dict[Partition, int], ends: dict[Partition, int]) -> None:
        if all(start >= ends[place] for place, start in starts.items()):
            return
        fences = read_fences(self._log)
        for entry, one in decoded(Feedback, between(self._log, starts, ends)):
            self._next[entry.topic, entry.partition] = entry.offset + 1
            if not fences.is_void(one, entry):
                self._hear(one)

    def _hear(self, one: Feedback) -> None:
        is_ours = self.is_ours(one)
        if is_ours and one.ending in ("dead_lettered", "redriven"):
            self._told.setdefault(one.group_id, []).append(one)
        if is_ours and one.ending == "redriven":
            self._open.add(one.group_id)
        elif self._policy is None or one.ends_for(self._policy):
            self._open.discard(one.group_id)


def unsent(log: Log) -> list[Lying]:
    """Every dead letter that was not sent again."""
    letters: list[Lying] = []
    marked: set[Source] = set()
    for entry, letter in records(unfetched(log), topics.DEAD_LETTER.name, LetterOutline):
        if letter.stage == MARK:
            marked.add(letter.source)
        else:
            letters.append(Lying(letter.source, entry.key))
    return [letter for letter in letters if letter.source not in marked]


def request_under(log: Log, key: bytes) -> PromptRequest | None:
    """The request of the group that this key names; None where it names none, or retention has taken the request.

    It reads all requests: what nobody can read is rare.
    """
    group_id = group_under(key)
    if group_id is None:
        return None
    found = (request for _, request in records(log, topics.PROMPTS.name, PromptRequest))
    return next((request for request in found if request.group_id == group_id), None)
