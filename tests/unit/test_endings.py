from typing import Any

import msgspec
import pytest

from streaming.endings import request_in
from streaming.errors import RecordError
from streaming.log.outlines import outline
from streaming.records import PromptRequest, Version, encode
from streaming.wire import Reference, encode_reference
from tests.builders import broken, make_prompt

EVAL: dict[str, Any] = {"purpose": "eval", "round": 2, "round_size": 9, "min_version": Version(1, 4)}


@pytest.mark.parametrize("fields", [{}, {"ordinal": 3, "claim": 7}, EVAL])
def test_a_broken_request_is_counted_and_ended_as_what_it_was_to_be(fields: dict[str, Any]) -> None:
    request = make_prompt(5, **fields)
    left = request_in(broken(request, num_candidates="two"))
    assert left == msgspec.structs.replace(request, num_candidates=0, text=None)
    assert left.group_id == request.group_id


def test_a_request_that_can_be_read_is_whole() -> None:
    request = make_prompt(5, **EVAL)
    assert request_in(encode(request)) == request


def test_a_request_whose_blob_is_gone_is_known_by_its_outline() -> None:
    value = encode(make_prompt(5, golden="6"))
    reference = Reference(location="gone", num_bytes=len(value), outline=outline("prompts", value))
    assert request_in(encode_reference(reference)) == PromptRequest(number=5, prompt_id="p5", num_candidates=0)
    assert b"5+1=" not in reference.outline


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"junk",
        broken(make_prompt(5), number="five", num_candidates=None),
        broken(make_prompt(5, purpose="eval"), text=7),
    ],
)
def test_bytes_that_do_not_say_which_request_they_were_are_none(value: bytes) -> None:
    with pytest.raises(RecordError):
        request_in(value)
