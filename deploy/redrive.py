"""Dead letters back to where they came from: `streamdpo redrive`.

    letter -> planned (sent, or left with a reason) -> request reopened -> bytes appended -> marked

The original bytes go to the original topic under the original key, and their stage does them again. The books stay
honest: a dead letter whose request is known has ended it as `dead_lettered`, so before its bytes are sent a feedback
`redriven` takes exactly this ending back. The request is outstanding again (the scheduler counts it, so a run does not
end over it) and ends once more, in one way: trained, dropped, or dead-lettered again. A request that has ended in
another way since is left alone, and so is an evaluation, whose round is measured again by itself.

Each letter goes once: it is known by the place of its original bytes, and a mark for that place in the dead-letter
topic says that it went. Bytes that die again lie at a new place, so they are a new letter. A crash between the three
appends leaves a letter without its mark: the next redrive sends the bytes again, and the stage recognises the second
copy by its id.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from deploy.lookup import at
from streaming import topics
from streaming.dead_letters import MARK
from streaming.endings import request_in
from streaming.errors import ConfigError, RecordError
from streaming.fencing import read_fences, without_claim
from streaming.history import records
from streaming.keys import group_under
from streaming.log.by_reference import inlined, missing_blob
from streaming.log.outlines import GroupOutline, PairOutline, ScoredOutline
from streaming.log.protocol import Entry, Log, Output, Partition
from streaming.records import (
    FINAL_ENDINGS,
    DeadLetter,
    Feedback,
    Source,
    decode,
    encode,
)

_CHUNK = 64
"""Letters sent together: a few megabytes."""

_NOT_DONE = "its stage is not done with it yet: try again in a moment"

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}


class Wanted(NamedTuple):
    """Which letters are asked for."""

    stage: str | None = None
    reason: re.Pattern[str] | None = None  # found anywhere in the letter's reason
    since_s: float = 0.0
    limit: int | None = None

    def takes(self, letter: DeadLetter) -> bool:
        return (
            self.stage in (None, letter.stage)
            and (self.reason is None or self.reason.search(letter.reason) is not None)
            and letter.time_s >= self.since_s
        )


class Planned(NamedTuple):
    """What will happen to a letter."""

    place: Source  # of the letter; its bytes are read again when it goes
    stage: str
    source: Source  # of the bytes that died
    reason: str
    time_s: float
    request_number: int | None
    reopened: list[Output]  # the feedback that takes its request's ending back: of each policy that has it
    left: str | None  # why it stays; None: it goes


class _Asked(NamedTuple):
    """Which request bytes belong to."""

    group_id: str
    number: int | None = None  # None where only the key names the group
    is_eval: bool = False


class _Heard(NamedTuple):
    """Feedback, and the output that wrote it."""

    output: Output
    feedback: Feedback


class _Letter(NamedTuple):
    place: Source
    letter: DeadLetter  # without its bytes
    asked: _Asked | None
    missing: str | None = None  # why the bytes cannot go: they lay beside the log


def plan(log: Log, policies: Sequence[str], wanted: Wanted) -> list[Planned]:
    """What a redrive would do, the oldest letter first. Changes nothing."""
    marked, letters = _read(log, wanted)
    told = _feedback(log, letters)
    ends = {place: end for topic in _readers(policies) for place, end in _committed(log, topic, policies).items()}
    planned: list[Planned] = []
    num_sent = 0
    for letter in letters:
        found = _planned(letter, marked, told, ends)
        if found.left is None and wanted.limit is not None and num_sent >= wanted.limit:
            break
        num_sent += found.left is None
        planned.append(found)
        marked.add(letter.letter.source)  # a letter that was written twice goes once
    return planned


def carry_out(log: Log, planned: Iterable[Planned]) -> int:
    """Send every letter that is to go; how many went. One that is gone meanwhile, or whose bytes are, does not."""
    going = [one for one in planned if one.left is None]
    num_sent = 0
    for first in range(0, len(going), _CHUNK):
        num_sent += _send(log, going[first : first + _CHUNK])
    return num_sent


def parse_since(text: str, now_s: float) -> float:
    """Unix time of `90s`, `30m`, `2h`, `7d` ago. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no length of time", where="--since", do="Write 90s, 30m, 2h or 7d.")
    return now_s - float(match[1]) * _UNITS_S[match[2]]


def parse_reason(text: str) -> re.Pattern[str]:
    """The regular expression. Raises ConfigError where it is none."""
    try:
        return re.compile(text)
    except re.error as cause:
        raise ConfigError(
            f"{text!r} is no regular expression: {cause}", where="--reason", do="Mend it, or quote it for the shell."
        ) from cause


# Planning


def _read(log: Log, wanted: Wanted) -> tuple[set[Source], list[_Letter]]:
    marked: set[Source] = set()
    letters: list[_Letter] = []
    for entry, letter in records(log, topics.DEAD_LETTER.name, DeadLetter):
        if letter.stage == MARK:
            marked.add(letter.source)
        elif wanted.takes(letter):
            asked = _asked(letter)
            missing = missing_blob(log, letter.value)
            letters.append(_Letter(_source(entry), msgspec.structs.replace(letter, value=b""), asked, missing))
    return marked, sorted(letters, key=lambda one: one.letter.time_s)


def _planned(
    one: _Letter, marked: set[Source], told: Mapping[str, list[_Heard]], ends: Mapping[Partition, int]
) -> Planned:
    letter, asked = one.letter, one.asked
    heard = told.get(asked.group_id, []) if asked else []
    reopened, waits = _ending(heard, letter)
    source = letter.source
    left = None
    if source in marked:
        left = "it went before"
    elif topics.find(source.topic) is None:
        left = f"the run has no topic {source.topic}"
    elif one.missing is not None:
        left = f"its bytes are not there: {one.missing}"
    elif (asked is not None and asked.is_eval) or any(feedback.round is not None for _, feedback in heard):
        left = "an evaluation: its round is measured again by itself"
    elif waits is not None:
        left = waits
    elif source.offset >= ends.get((source.topic, source.partition), source.offset + 1):
        left = _NOT_DONE
    number = asked.number if asked else None
    if number is None and heard:
        number = heard[0][1].request_number
    return Planned(one.place, letter.stage, source, letter.reason, letter.time_s, number, reopened, left)


def _ending(heard: Sequence[_Heard], letter: DeadLetter) -> tuple[list[Output], str | None]:
    """The feedback that takes this letter's endings back, and why it stays where there is nothing to take back."""
    endings: dict[str, _Heard] = {}  # policy -> how it stands
    under_way: set[str] = set()  # policies
    for one in heard:
        policy, ending = one.feedback.policy, one.feedback.ending
        if ending == "redriven":
            endings.pop(policy, None)
            under_way.discard(policy)
        elif ending in FINAL_ENDINGS:
            endings[policy] = one
        else:
            under_way.add(policy)
    dead = [one for one in endings.values() if one.feedback.ending == "dead_lettered" and _is_of(one.feedback, letter)]
    if not dead:
        ended = next((one.feedback.ending for one in endings.values()), None)
        if ended is not None:
            return [], f"its request has ended since: {ended}"
        return [], _NOT_DONE if under_way else None  # a learner tells the end after its next checkpoint
    now_s = time.time()
    taken_back = [msgspec.structs.replace(one.feedback, ending="redriven", time_s=now_s) for one in dead]
    return [one.output._replace(value=encode(back)) for one, back in zip(dead, taken_back, strict=True)], None


def _is_of(ending: Feedback, letter: DeadLetter) -> bool:
    """Whether the stage that wrote this letter told this ending: for each policy that reads these bytes."""
    topic = letter.source.topic
    is_its_policy = not topic.startswith("pairs.") or topic == topics.pairs(ending.policy).name
    return is_its_policy and _kind(ending.stage) == _kind(letter.stage)


def _kind(stage: str) -> str:
    """`selector.POLICY` and `selector` read the same bytes."""
    return stage.partition(".")[0]


def _feedback(log: Log, letters: Sequence[_Letter]) -> dict[str, list[_Heard]]:
    """What was told about the letters' requests, by group, in the order of the log."""
    groups = {one.asked.group_id for one in letters if one.asked is not None}
    found: dict[str, list[_Heard]] = {}
    if not groups:
        return found
    fences = read_fences(log)
    for entry, one in records(log, topics.FEEDBACK.name, Feedback):  # another copy may have ended the request before
        if one.group_id in groups and not fences.is_void(one, entry):
            found.setdefault(one.group_id, []).append(_Heard(Output(entry.topic, entry.key, entry.value), one))
    return found


def _readers(policies: Sequence[str]) -> dict[str, list[str]]:
    """Who reads a topic as a group. The learner's place is in its checkpoint, the scheduler reads everything again."""
    return {
        topics.PROMPTS.name: ["generators"],
        topics.CANDIDATES.name: ["scorer"],
        topics.SCORED.name: [topics.selectors(policy) for policy in policies],
    }


def _committed(log: Log, topic: str, policies: Sequence[str]) -> dict[Partition, int]:
    """Per partition what every reader of the topic is done with."""
    places: dict[Partition, int] = {}
    for group in _readers(policies)[topic]:
        for place, offset in log.committed(group, [topic]).items():
            places[place] = min(offset, places.get(place, offset))
    return places


def _asked(letter: DeadLetter) -> _Asked | None:
    """The request of dead bytes, as far as they still say it, or their key does."""
    topic = letter.source.topic
    try:
        if topic.startswith("pairs."):
            pair = decode(PairOutline, letter.value)
            return _Asked(pair.group_id, pair.request_number)
        if topic == topics.PROMPTS.name:
            request = request_in(letter.value)
        elif topic == topics.CANDIDATES.name:
            request = decode(GroupOutline, letter.value).request
        elif topic == topics.SCORED.name:
            request = decode(ScoredOutline, letter.value).group.request
        else:
            return None
    except RecordError:
        group_id = None if topic == topics.PROMPTS.name else group_under(letter.key)
        return None if group_id is None else _Asked(group_id)
    return _Asked(request.group_id, request.number, is_eval=request.purpose == "eval")


# Sending


def _send(log: Log, going: Sequence[Planned]) -> int:
    """Reopen, send, mark: each durable before the next, so that a crash never marks what did not go."""
    letters = [(one, letter) for one in going if (letter := _letter_at(log, one.place)) is not None]
    log.append([output for one, _ in letters for output in one.reopened])
    places = log.append([_sent(letter) for _, letter in letters])
    log.append(_marks([letter for _, letter in letters], places))
    return len(letters)


def _sent(letter: DeadLetter) -> Output:
    """A request goes without its scheduler's claim: that one may have an heir by now."""
    topic, value = letter.source.topic, letter.value
    return Output(topic, letter.key, without_claim(value) if topic == topics.PROMPTS.name else value)


def _marks(letters: Sequence[DeadLetter], places: Sequence[tuple[int, int]]) -> Iterator[Output]:
    for letter, (partition, offset) in zip(letters, places, strict=True):
        reason = f"redriven to {letter.source.topic}/{partition}@{offset}"
        mark = msgspec.structs.replace(letter, stage=MARK, value=b"", reason=reason, time_s=time.time())
        yield Output(topics.DEAD_LETTER.name, letter.key, encode(mark))


def _letter_at(log: Log, place: Source) -> DeadLetter | None:
    """The letter with its bytes; None where it is gone, or they are, which lay beside the log."""
    entry = at(log, place)
    if entry is None:
        return None
    letter = decode(DeadLetter, entry.value, where=entry.where)
    try:
        return msgspec.structs.replace(letter, value=inlined(log, letter.value))
    except RecordError:
        return None


def _source(entry: Entry) -> Source:
    return Source(topic=entry.topic, partition=entry.partition, offset=entry.offset)
