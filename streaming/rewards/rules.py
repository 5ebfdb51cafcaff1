"""Verifiers that need no model, for prompts whose answers can be checked. All have the signature of TRL's functions.

    function: streaming.rewards.rules:exact_answer

They give 1.0 or 0.0, and None (a missing reward) where a prompt lacks the column that they check against.
"""

import re
from collections.abc import Sequence
from typing import Any

Completion = str | list[dict[str, str]]

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def exact_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    golden: Sequence[str] | None = None,
    **_: Any,
) -> list[float | None]:
    """Whether the completion, without the blanks around it, is the column `answer` (or else the golden answer)."""
    wanted = _column(answer if answer is not None else golden, len(completions))
    return [
        None if right is None else float(text_of(completion).strip() == str(right).strip())
        for completion, right in zip(completions, wanted, strict=True)
    ]


def last_number(completions: Sequence[Completion], answer: Sequence[Any] | None = None, **_: Any) -> list[float | None]:
    """Whether the completion's last number equals the last number of the column `answer`, however it is written."""
    rewards: list[float | None] = []
    for completion, right in zip(completions, _column(answer, len(completions)), strict=True):
        wanted = None if right is None else _last_number(str(right))
        rewards.append(None if wanted is None else float(_last_number(text_of(completion)) == wanted))
    return rewards


def matches_pattern(
    completions: Sequence[Completion], pattern: Sequence[str] | None = None, **_: Any
) -> list[float | None]:
    """Whether the whole completion matches the regular expression in the column `pattern` (dot matches newlines)."""
    return [
        None if wanted is None else float(re.fullmatch(wanted, text_of(completion), re.DOTALL) is not None)
        for completion, wanted in zip(completions, _column(pattern, len(completions)), strict=True)
    ]


def within_length(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    length_limit: Sequence[int] | None = None,
    **_: Any,
) -> list[float | None]:
    """Whether the completion has at most as many tokens as the column `length_limit` says."""
    limits = _column(length_limit, len(completions))
    return [
        None if limit is None else float(len(tokens) <= limit)
        for tokens, limit in zip(completion_ids, limits, strict=True)
    ]


def text_of(completion: Completion) -> str:
    """The text of a completion in either of TRL's formats: a string, or a list of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _column(values: Sequence[Any] | None, count: int) -> Sequence[Any]:
    return [None] * count if values is None else values


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
