"""The feedback that ends a request, as the generator, the scorer and the selector write it."""

from typing import Any

import msgspec

from streaming.errors import RecordError
from streaming.records import Ending, Feedback, Outline, PromptRequest, Purpose, Version, decode

FORGOTTEN = "forgotten"
"""Reason of a drop whose prompt is gone: a person's data were deleted (`streamdpo forget`)."""


class _RequestOutline(Outline, frozen=True, kw_only=True):
    """What is needed of a broken request to count it and to end it."""

    number: int
    prompt_id: str
    purpose: Purpose = "train"
    round: int | None = None
    round_size: int | None = None
    min_version: Version | None = None
    ordinal: int | None = None
    claim: int | None = None


def request_in(value: bytes, *, where: str = "record") -> PromptRequest:
    """The request in bytes from `prompts`; of a broken one as much as its ending takes, and no prompt.

    So who issues requests, who ends the broken ones and who counts them agree. Raises RecordError where the bytes do
    not say which request it was.
    """
    try:
        return decode(PromptRequest, value, where=where)
    except RecordError:
        left = decode(_RequestOutline, value, where=where)
    if left.purpose == "eval" and (left.round is None or left.min_version is None):
        raise RecordError("an evaluation of no round", where=where, do="The bytes go to the dead-letter topic.")
    return PromptRequest(num_candidates=0, **msgspec.structs.asdict(left))


def end(
    request: PromptRequest, ending: Ending, *, policy: str, stage: str, reason: str, time_s: float, **details: Any
) -> Feedback:
    """How the request ended at `stage`; `details` are further fields of Feedback."""
    return Feedback(
        request_number=request.number,
        group_id=request.group_id,
        prompt_id=request.prompt_id,
        policy=policy,
        ending=ending,
        stage=stage,
        reason=reason,
        round=request.round,
        round_size=request.round_size,
        time_s=time_s,
        **details,
    )
