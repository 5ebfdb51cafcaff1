"""Groups whose arrays stay bytes until somebody asks for them, and travel on as the bytes that they were.

A group of 16 answers of 512 tokens holds 16,384 numbers: half a megabyte as Python objects, most of which a stage
never looks at. On the wire there is no difference.
"""

from functools import cached_property

import msgspec

from streaming.arrays import length, total_logprob, unpack
from streaming.records import FinishReason, Group, Record, ScoredGroup, Span, Version, decode


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
        return unpack(self.packed_tokens, int)

    @property
    def logprobs(self) -> list[float]:
        return unpack(self.packed_logprobs, float)

    @property
    def version(self) -> Version | None:
        return self.spans[0].version if len(self.spans) == 1 else None

    @cached_property
    def logprob(self) -> float | None:
        return total_logprob(self.logprobs, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return length(self.packed_tokens)


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
