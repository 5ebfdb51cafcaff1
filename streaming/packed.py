"""Groups whose arrays stay bytes until somebody asks for them, and travel on as the bytes that they were.

A group of 16 answers of 512 tokens holds 16,384 numbers: half a megabyte as Python objects, most of which a stage
never looks at. On the wire there is no difference.
"""

from functools import cached_property
from typing import TypeVar

import msgspec

from streaming.errors import RecordError
from streaming.records import FinishReason, Group, Record, ScoredGroup, Span, Version, decode, total_logprob

Number = TypeVar("Number", int, float)

_FEW = range(0x90, 0xA0)
"""First bytes of a msgpack array of up to 15 items: the low half is their number."""

_LENGTH_BYTES = {0xDC: 2, 0xDD: 4}
"""First byte of a longer one -> how many bytes of length follow."""


class PackedCandidate(Record, frozen=True, kw_only=True, dict=True):
    """Reads like a Candidate. What is in its arrays is looked at when they are asked for: RecordError then."""

    packed_tokens: msgspec.Raw = msgspec.field(name="tokens")
    packed_logprobs: msgspec.Raw = msgspec.field(name="logprobs")
    text: str
    finish_reason: FinishReason
    has_eos: bool
    spans: list[Span]

    @cached_property
    def tokens(self) -> list[int]:
        return _numbers(self.packed_tokens, int)

    @property
    def logprobs(self) -> list[float]:
        return _numbers(self.packed_logprobs, float)

    @property
    def version(self) -> Version | None:
        return self.spans[0].version if len(self.spans) == 1 else None

    @cached_property
    def logprob(self) -> float | None:
        return total_logprob(self.logprobs, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        packed = memoryview(self.packed_tokens)
        if packed[0] in _FEW:
            return packed[0] - _FEW.start
        if packed[0] not in _LENGTH_BYTES:
            raise _not_numbers("what it begins with is no array", int)
        return int.from_bytes(packed[1 : 1 + _LENGTH_BYTES[packed[0]]], "big")


class PackedGroup(Group, frozen=True, kw_only=True):
    """A Group of packed candidates."""

    candidates: list[PackedCandidate]  # type: ignore[assignment]


class PackedScoredGroup(ScoredGroup, frozen=True, kw_only=True):
    """A ScoredGroup of packed candidates."""

    group: PackedGroup


def decode_group(value: bytes, *, where: str) -> PackedGroup:
    """The group in these bytes, its arrays looked at: RecordError where they are not one, as of any other record."""
    group = decode(PackedGroup, value, where=where)
    for candidate in group.candidates:
        _ = candidate.tokens, candidate.logprob
    return group


def _numbers(packed: msgspec.Raw, kind: type[Number]) -> list[Number]:
    try:
        return msgspec.msgpack.decode(packed, type=list[kind])  # type: ignore[valid-type]
    except msgspec.DecodeError as cause:
        raise _not_numbers(str(cause), kind) from cause


def _not_numbers(what: str, kind: type) -> RecordError:
    return RecordError(
        f"not an array of {kind.__name__}: {what}",
        where="a candidate's tokens or logprobs",
        do="The bytes go to the dead-letter topic.",
    )
