"""The feedback that ends a request, as the generator, the scorer and the selector write it."""

from typing import Any

from streaming.records import Ending, Feedback, PromptRequest

FORGOTTEN = "forgotten"
"""Reason of a drop whose prompt is gone: a person's data were deleted (`streamdpo forget`)."""


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
