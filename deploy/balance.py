"""What `streamdpo audit` says about the books of a policy, for people."""

import time
from collections.abc import Iterator, Sequence

from streaming.audit import Balance

_MAX_NAMED = 10
"""Requests or places in a line."""


def told(balance: Balance, *, final: bool) -> str:
    """A line each. `final`: the data have come to their end, so what has not ended is named."""
    title = f"{balance.num_requests} requests of {balance.policy}"
    return "\n  ".join([title, *_lines(balance, final)])


def _lines(balance: Balance, final: bool) -> Iterator[str]:
    for (ending, reason), count in sorted(balance.endings.items()):
        yield f"{ending}{f' ({reason})' if reason else ''}: {count}"
    under_way = len(balance.not_ended) - len(balance.consumed)
    yield f"in a step whose checkpoint is not durable yet: {len(balance.consumed)}"
    yield f"on their way: {under_way}{_requests(balance.not_ended) if final else ''}"
    if balance.dead:
        yield f"of these, dead letters whose end nobody told: {len(balance.dead)}{_requests(balance.dead)}"
    if balance.nameless:
        yield f"dead letters of nobody knows which request: {len(balance.nameless)} ({_some(balance.nameless)})"
    yield f"ended twice: {len(balance.ended_twice)}{_requests(balance.ended_twice)}"
    if balance.unreadable:
        yield f"bytes that are no record, and dead letters: {len(balance.unreadable)} ({_some(balance.unreadable)})"
    if balance.carried_s is not None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(balance.carried_s))
        yield f"part of the log is past retention: this goes on from the balance carried at {at}"
    if not balance.is_whole:
        yield "part of the log is past retention and in no carried balance: what ended there is not counted"


def _requests(numbers: Sequence[int]) -> str:
    return f" (requests {_some(numbers)})" if numbers else ""


def _some(named: Sequence[object]) -> str:
    return ", ".join(map(str, named[:_MAX_NAMED])) + " ..." * (len(named) > _MAX_NAMED)
