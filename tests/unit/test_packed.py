"""Packed groups: the same records, decoded as far as somebody looks."""

from typing import Any

import msgspec
import pytest

from streaming.errors import RecordError
from streaming.packed import PackedGroup, PackedScoredGroup, decode_group
from streaming.records import Candidate, Group, Version, decode, encode
from tests.builders import make_candidate, make_group, make_scored

LONG = 70_000
"""More tokens than 16 bits count."""


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 512, LONG])
def test_a_packed_candidate_says_what_the_candidate_says(num_tokens: int) -> None:
    candidate = make_candidate("7", tokens=list(range(num_tokens)), version=Version(2, 3))
    group = make_group(candidates=[candidate, make_candidate("8", spans=[])])
    packed = decode_group(encode(group), where="here")
    names = [name for name in dir(Candidate) if not name.startswith("_")]
    assert {"tokens", "logprobs", "logprob", "num_tokens", "version", "text", "has_eos", "spans"} <= set(names)
    for theirs, ours in zip(group.candidates, packed.candidates, strict=True):
        said = {name: getattr(ours, name) for name in names}
        assert said | {"packed_tokens": bytes(ours.packed_tokens)} == {name: getattr(theirs, name) for name in names}
    assert (packed.group_id, packed.content_hash) == (group.group_id, group.content_hash)


def test_packed_records_travel_on_as_the_bytes_they_were() -> None:
    scored = make_scored([1.0, 0.0], group=make_group(["12", "345"]))
    packed = decode(PackedScoredGroup, encode(scored))
    assert [candidate.tokens for candidate in packed.group.candidates]
    assert encode(packed) == encode(scored)


def test_bytes_that_are_no_group_are_called_by_the_name_that_people_know() -> None:
    """`redrive --reason "not a Group"` found none of them: they were no PackedGroup."""
    with pytest.raises(RecordError, match="not a Group: "):
        decode_group(b"junk", where="candidates/0@0")


@pytest.mark.parametrize("broken", [{"tokens": ["a"]}, {"tokens": 3}, {"logprobs": [None]}, {"logprobs": {}}])
def test_arrays_that_hold_no_numbers_are_no_group(broken: dict[str, Any]) -> None:
    group = msgspec.to_builtins(make_group(["a", "b"]))
    group["candidates"][1] |= broken
    value = msgspec.msgpack.encode(group)
    with pytest.raises(RecordError):
        decode(Group, value)
    with pytest.raises(RecordError, match="not an array"):
        decode_group(value, where="here")


def test_arrays_are_refused_when_they_are_looked_at() -> None:
    """By a stage that looks at few of them: the others go by."""
    group = msgspec.to_builtins(make_group(["a", "b"]))
    group["candidates"][1] |= {"tokens": ["x"]}
    packed = decode(PackedGroup, msgspec.msgpack.encode(group))
    assert packed.candidates[0].tokens
    with pytest.raises(RecordError, match="tokens"):
        _ = packed.candidates[1].tokens
