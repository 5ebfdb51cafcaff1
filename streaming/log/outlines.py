"""What is left of a large record where its blob is gone: enough to end its request, so that the books balance.

Whoever needs no more than this of a record reads it as its outline: that is quick, and it is there without the blob.
"""

from typing import Any

import msgspec

from streaming import topics
from streaming.errors import RecordError
from streaming.records import DeadLetter, Group, Outline, Pair, PromptRequest, ScoredGroup, Source, decode, encode


class GroupOutline(Outline, frozen=True, kw_only=True):
    """Of a Group."""

    request: PromptRequest
    policy: str


class ScoredOutline(Outline, frozen=True, kw_only=True):
    """Of a ScoredGroup."""

    group: GroupOutline


class PairOutline(Outline, frozen=True, kw_only=True):
    """Of a Pair: what says which example it is, and of which content."""

    request_number: int
    group_id: str
    prompt_id: str
    content_hash: str
    settings_hash: str
    index: int = 0
    num_examples: int = 1


class LetterOutline(Outline, frozen=True, kw_only=True):
    """Of a DeadLetter: where its bytes lay."""

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
            return encode(_without_texts(decode(GroupOutline, value)))
        if row is not None and row.record is ScoredGroup:
            return encode(ScoredOutline(group=_without_texts(decode(ScoredOutline, value).group)))
        if row is not None and row.record is Pair:
            return encode(decode(PairOutline, value))
        if row is not None and row.record is DeadLetter:
            return encode(decode(LetterOutline, value))
    except RecordError:
        return b""
    return b""


def _without_texts(group: GroupOutline) -> GroupOutline:
    return msgspec.structs.replace(group, request=_request_without_texts(group.request))


def _request_without_texts(request: PromptRequest) -> PromptRequest:
    nothing: dict[str, Any] = {"text": None, "messages": None, "golden": None, "columns": {}}
    return msgspec.structs.replace(request, **nothing)
