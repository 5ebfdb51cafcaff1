"""Arrays of numbers as they lie within a record (msgpack): token ids and log-probs."""

import math
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from streaming.errors import RecordError

Number = TypeVar("Number", int, float)

_ENCODER = msgspec.msgpack.Encoder()

_FEW = range(0x90, 0xA0)
"""First bytes of an array of up to 15 items: the low half is their number."""

_LENGTH_BYTES = {0xDC: 2, 0xDD: 4}
"""First byte of a longer one -> how many bytes of length follow."""


def pack(numbers: Sequence[int]) -> bytes:
    """The same numbers give the same bytes, and no other array's bytes begin with these."""
    return _ENCODER.encode(numbers)


def unpack(packed: msgspec.Raw, kind: type[Number]) -> list[Number]:
    """The numbers in these bytes. Raises RecordError where they are others, or none."""
    try:
        return msgspec.msgpack.decode(packed, type=list[kind])  # type: ignore[valid-type]
    except msgspec.DecodeError as cause:
        raise _not_numbers(str(cause)) from cause


def length(packed: msgspec.Raw) -> int:
    """How many items the array says it has. Raises RecordError where it is none."""
    seen = memoryview(packed)
    if seen[0] in _FEW:
        return seen[0] - _FEW.start
    if seen[0] not in _LENGTH_BYTES:
        raise _not_numbers("what it begins with is no array")
    return int.from_bytes(seen[1 : 1 + _LENGTH_BYTES[seen[0]]], "big")


def total_logprob(logprobs: Sequence[float], num_tokens: int) -> float | None:
    """Their sum, where every token has one and it is finite."""
    total = sum(logprobs)  # not fsum: six times as slow, for digits below those of any model
    return total if len(logprobs) == num_tokens and math.isfinite(total) else None


def _not_numbers(what: str) -> RecordError:
    return RecordError(
        f"not an array of numbers: {what}",
        where="a candidate's tokens or logprobs",
        do="The bytes go to the dead-letter topic.",
    )
