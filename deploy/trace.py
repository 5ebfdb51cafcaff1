"""Why was this pair trained on? From the gradient step back to the prompt: `streamdpo trace`.

    an id -> pair -> scored group -> group -> prompt request      (each record names the place of the one before)
                  -> feedback of the group, from the pair's time on

Also for a request that became no pair. Every record names the log entry that it was made from, so a trace reads a
handful of entries of however large a log; only to find an id are keys compared, the newest first. Draws nothing:
`trace_page` does.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Generic, NamedTuple, TypeVar

from deploy.lookup import at, first_where, newest_first, since
from streaming import topics
from streaming.errors import ConfigError, RecordError
from streaming.fencing import read_fences, read_issuers
from streaming.history import decoded, entries, records
from streaming.log.protocol import Entry, Log
from streaming.records import (
    FINAL_ENDINGS,
    Feedback,
    Group,
    Pair,
    PromptRequest,
    Record,
    ScoredGroup,
    Source,
    decode,
)

_ID_DIGITS = 16
"""Hex digits of a whole id: with fewer, another record's may begin alike."""

_MAX_NAMED = 8
"""Ids that an error names when a prefix is not unique."""

R = TypeVar("R", bound=Record)


class Stored(NamedTuple, Generic[R]):
    """A record, and where and when it came into the log."""

    record: R
    where: str
    time_s: float


class Trace(NamedTuple):
    """Everything that the log knows about an example, or about a request that has none. None: past retention, or
    not there yet."""

    policy: str
    request: PromptRequest
    asked: Stored[PromptRequest] | None
    group: Stored[Group] | None
    scored: Stored[ScoredGroup] | None
    pair: Stored[Pair] | None
    feedback: list[Stored[Feedback]]  # about this example, in the order of the log

    @property
    def ending(self) -> Feedback | None:
        """The final ending; None while there is none."""
        return next((one.record for one in self.feedback if one.record.ending in FINAL_ENDINGS), None)

    @property
    def step(self) -> Feedback | None:
        """What the newest gradient step that took the example saw of it; None where none did."""
        taken = [one.record for one in self.feedback if one.record.step is not None and not one.record.reason]
        return taken[-1] if taken else None


def trace(log: Log, policies: Sequence[str], sought: str) -> list[Trace]:
    """The examples that a request number, a pair id, a group id or a beginning of an id means: of one request.

    A pair id gives one trace, anything else one for each pair of the request, or one of the request alone where it
    has none. Raises ConfigError where nothing has this id, or several have.
    """
    sought = sought.strip().lower()
    if sought.isdecimal() and len(sought) < _ID_DIGITS:
        request = _request_by_number(log, int(sought))
        if request is not None:
            return _of_request(log, policies, request)
    pair = _pair_by_id(log, policies, sought)
    if pair is not None:
        return [_of_pair(log, pair)]
    request = _request_by_group(log, sought)
    if request is None:
        raise ConfigError(
            f"no pair, group or request {sought!r} is in the log (any more)",
            where="trace",
            do="Give a pair id or a group id (`streamdpo tail feedback RUN` shows some), its beginning, or a request "
            "number. What is past its topic's retention cannot be traced.",
        )
    return _of_request(log, policies, request)


# Finding what is meant


def _request_by_number(log: Log, number: int) -> Stored[PromptRequest] | None:
    """Requests are numbered in the order of their issue but for a few: a bisection of each partition, else a search."""
    issuers = read_issuers(log)

    def rank(entry: Entry) -> float | None:
        request = _decoded(PromptRequest, entry)
        return None if request is None else request.number

    def sought(entry: Entry | None) -> Stored[PromptRequest] | None:
        request = None if entry is None else _decoded(PromptRequest, entry)
        if entry is None or request is None or request.number != number or issuers.is_void(request.claim, entry):
            return None
        return _stored(request, entry)

    firsts = first_where(log, topics.PROMPTS.name, rank, number).items()
    bisected = (sought(at(log, Source(topic=name, partition=place, offset=first))) for (name, place), first in firsts)
    searched = (sought(entry) for entry in entries(log, topics.PROMPTS.name))
    return next((found for found in chain(bisected, searched) if found is not None), None)


def _pair_by_id(log: Log, policies: Sequence[str], prefix: str) -> Stored[Pair] | None:
    found: dict[bytes, Stored[Pair]] = {}
    for policy in policies:
        for entry in newest_first(log, topics.pairs(policy).name):
            if entry.key.startswith(prefix.encode()) and (pair := _decoded(Pair, entry)) is not None:
                found[pair.pair_id.encode()] = _stored(pair, entry)
                if len(prefix) >= _ID_DIGITS:
                    return _stored(pair, entry)
    return _only(found, "pairs", prefix)


def _request_by_group(log: Log, prefix: str) -> Stored[PromptRequest] | None:
    found: dict[bytes, Stored[PromptRequest]] = {}
    for entry, request in records(log, topics.PROMPTS.name, PromptRequest):
        if (group_id := request.group_id).startswith(prefix):
            found[group_id.encode()] = _stored(request, entry)
    return _only(found, "groups", prefix)


def _only(found: dict[bytes, Stored[R]], what: str, prefix: str) -> Stored[R] | None:
    if len(found) > 1:
        names = ", ".join(key.decode() for key in sorted(found)[:_MAX_NAMED])
        raise ConfigError(
            f"{len(found)} {what} begin with {prefix!r}: {names}{' ...' if len(found) > _MAX_NAMED else ''}",
            where="trace",
            do="Give more digits of the id.",
        )
    return next(iter(found.values()), None)


# Following the places


def _of_pair(log: Log, stored: Stored[Pair]) -> Trace:
    pair = stored.record
    feedback = _feedback_of(log, pair.group_id, [pair.policy], stored.time_s, index=pair.index)
    stored = _taken_copy(log, stored, feedback)
    scored = _follow(log, ScoredGroup, stored.record.source)
    group = None
    if scored is not None:
        group = _follow(log, Group, scored.record.source)
    asked = _follow(log, PromptRequest, group.record.source) if group else _request_by_number(log, pair.request_number)
    request = _request_in(asked, group, scored)
    return Trace(pair.policy, request or _request_of(pair), asked, group, scored, stored, feedback)


def _taken_copy(log: Log, stored: Stored[Pair], feedback: Iterable[Stored[Feedback]]) -> Stored[Pair]:
    """A request sampled again after a crash has two pairs of one id: the one that the feedback is about."""
    taken = next((one.record.content_hash for one in feedback if one.record.pair_id == stored.record.pair_id), "")
    if not taken or stored.record.content_hash == taken:
        return stored
    pair_id = stored.record.pair_id.encode()
    for entry in newest_first(log, topics.pairs(stored.record.policy).name):
        if entry.key.startswith(pair_id) and (pair := _decoded(Pair, entry)) is not None and pair.content_hash == taken:
            return _stored(pair, entry)
    return stored


def _of_request(log: Log, policies: Sequence[str], asked: Stored[PromptRequest]) -> list[Trace]:
    request = asked.record
    group_id = request.group_id
    feedback = _feedback_of(log, group_id, policies, asked.time_s)
    pairs = _pairs_of(log, policies, group_id, asked.time_s, feedback)
    if pairs:
        return [_of_pair(log, pair) for pair in pairs]
    key = group_id.encode()
    group = _first(log, topics.CANDIDATES.name, asked.time_s, Group, key)
    scored = None
    if group is not None and request.purpose == "train":
        scored = _first(log, topics.SCORED.name, group.time_s, ScoredGroup, key)
    policy = feedback[0].record.policy if feedback else group.record.policy if group else policies[0]
    return [Trace(policy, request, asked, group, scored, None, feedback)]


def _pairs_of(
    log: Log, policies: Sequence[str], group_id: str, time_s: float, feedback: Sequence[Stored[Feedback]]
) -> list[Stored[Pair]]:
    """The pairs of a request, one of each id. Where it ended without any, none is looked for."""
    told = {one.record.policy: one.record.pair_id for one in feedback}
    found: dict[str, Stored[Pair]] = {}
    for policy in policies:
        if policy in told and told[policy] is None:
            continue
        for entry, pair in decoded(Pair, since(log, topics.pairs(policy).name, time_s)):
            if pair.group_id == group_id:
                found.setdefault(pair.pair_id, _stored(pair, entry))
                if len([one for one in found.values() if one.record.policy == policy]) >= pair.num_examples:
                    break
    return list(found.values())


def _feedback_of(
    log: Log, group_id: str, policies: Sequence[str], time_s: float, *, index: int | None = None
) -> list[Stored[Feedback]]:
    """What was told about a group until it ended, by policy; with `index`, about that example of it."""
    found: list[Stored[Feedback]] = []
    ended: set[str] = set()
    fences = read_fences(log)
    for entry in since(log, topics.FEEDBACK.name, time_s):
        if entry.key != group_id.encode() or (one := _decoded(Feedback, entry)) is None:
            continue
        if fences.is_void(one, entry):  # said by a learner that had been replaced
            continue
        concerned = [policy for policy in policies if one.ends_for(policy)]
        if not concerned or (index is not None and one.pair_id is not None and one.index != index):
            continue
        found.append(_stored(one, entry))
        if one.ending in FINAL_ENDINGS and (index is not None or one.num_examples == 1):
            ended |= set(concerned)
        if ended >= set(policies):
            break
    return found


def _first(log: Log, topic: str, time_s: float, kind: type[R], key: bytes) -> Stored[R] | None:
    for entry in since(log, topic, time_s):
        if entry.key == key and (record := _decoded(kind, entry)) is not None:
            return _stored(record, entry)
    return None


def _follow(log: Log, kind: type[R], source: Source | None) -> Stored[R] | None:
    entry = None if source is None else at(log, source)
    record = None if entry is None else _decoded(kind, entry)
    return None if entry is None or record is None else _stored(record, entry)


def _request_in(
    asked: Stored[PromptRequest] | None, group: Stored[Group] | None, scored: Stored[ScoredGroup] | None
) -> PromptRequest | None:
    """The request as the newest record that is still there holds it."""
    if scored is not None:
        return scored.record.group.request
    if group is not None:
        return group.record.request
    return None if asked is None else asked.record


def _request_of(pair: Pair) -> PromptRequest:
    """What a pair alone still knows of its request."""
    return PromptRequest(
        number=pair.request_number, prompt_id=pair.prompt_id, num_candidates=0, text=pair.prompt_text,
        config_version=pair.config_version,
    )  # fmt: skip


def _stored(record: R, entry: Entry) -> Stored[R]:
    return Stored(record, entry.where, entry.time_s)


def _decoded(kind: type[R], entry: Entry) -> R | None:
    """None for bytes that are no such record: a stage has dead-lettered them."""
    try:
        return decode(kind, entry.value, where=entry.where)
    except RecordError:
        return None
