"""What is left of a large record where its blob is gone: enough to end its request, so that the books balance."""

from typing import Any

import msgspec

from streaming import topics
from streaming.errors import RecordError
from streaming.records import DeadLetter, Group, Pair, PromptRequest, Record, ScoredGroup, Source, decode, encode


class _Group(Record, frozen=True, kw_only=True):
    """The outline of a Group."""

    request: PromptRequest
    policy: str


class _ScoredGroup(Record, frozen=True, kw_only=True):
    """The outline of a ScoredGroup."""

    group: _Group


class _Pair(Record, frozen=True, kw_only=True):
    """The outline of a Pair: what says which example it is."""

    request_number: int
    group_id: str
    prompt_id: str
    content_hash: str
    settings_hash: str
    index: int = 0
    num_examples: int = 1


class _DeadLetter(Record, frozen=True, kw_only=True):
    """The outline of a DeadLetter: all but the bytes."""

    stage: str
    source: Source
    reason: str


def outline(topic: str, value: bytes) -> bytes:
    """A few fields of the value under their own names, without its texts; empty where nothing is known about it."""
    row = topics.find(topic)
    try:
        if row is not None and row.record is PromptRequest:
            return encode(_request_without_texts(decode(PromptRequest, value)))
        if row is not None and row.record is Group:
            return encode(_without_texts(decode(_Group, value)))
        if row is not None and row.record is ScoredGroup:
            return encode(_ScoredGroup(group=_without_texts(decode(_ScoredGroup, value).group)))
        if row is not None and row.record is Pair:
            return encode(decode(_Pair, value))
        if row is not None and row.record is DeadLetter:
            return encode(decode(_DeadLetter, value))
    except RecordError:
        return b""
    return b""


def _without_texts(group: _Group) -> _Group:
    return msgspec.structs.replace(group, request=_request_without_texts(group.request))


def _request_without_texts(request: PromptRequest) -> PromptRequest:
    nothing: dict[str, Any] = {"text": None, "messages": None, "golden": None, "columns": {}}
    return msgspec.structs.replace(request, **nothing)
