"""People's own reward functions, called as TRL 1.16 calls them, so that they work unchanged.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]     # or async def

Prompts and completions are strings; for conversations a prompt is a list of messages and a completion is
`[{"role": "assistant", "content": ...}]`. Every other column of the prompt comes as a keyword, repeated once per
candidate, and so does `golden` where the prompt has one. Beyond TRL, a function without `**kwargs` is given only
the keywords that it names.
"""

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from streaming.errors import DataError
from streaming.records import Group
from streaming.rewards.protocol import MissingReason, Reward, checked, missing
from streaming.rewards.workers import DaemonPool, LoopThread

RewardFunction = Callable[..., Any]

_LOGGER = logging.getLogger(__name__)
_RESERVED = frozenset({"prompt", "completion", "prompts", "completions", "completion_ids"})
_TRAINER_ONLY = frozenset({"trainer_state", "environments"})
"""What TRL passes and a stream cannot have: there is no trainer in the scorer's process."""


class FunctionSource:
    """A reward source around a function. Plain functions run in threads, coroutines on a loop of their own.

    A call past its deadline keeps its slot until it really ends: a function that hangs never has more than
    `max_concurrency` threads. Raises DataError where the function cannot be called by us at all.
    """

    def __init__(
        self, function: RewardFunction, *, name: str, version: str, timeout_s: float = 60.0, max_concurrency: int = 16
    ) -> None:
        self.name = name
        self.version = version
        self._function = function
        self._accepted = accepted_keywords(function)
        self._timeout_s = timeout_s
        self._max_concurrency = max_concurrency
        self._slots = asyncio.Semaphore(max_concurrency)
        self._overdue: set[Future[list[Reward]]] = set()
        self._logged: set[MissingReason] = set()
        self._pool = DaemonPool(max_concurrency, name=f"reward-{name}")
        self._loop = LoopThread(name=f"reward-{name}") if is_async(function) else None

    async def score(self, group: Group) -> list[Reward]:
        """One reward per candidate; see RewardSource."""
        count = len(group.candidates)
        if not await self._enter():
            return missing("timeout", count)
        call = self._start(keywords_of(group), count)
        future = asyncio.wrap_future(call)
        done, _ = await asyncio.wait({future}, timeout=self._timeout_s)
        if not done:
            self._overdue.add(call)
            future.cancel()
            return missing("timeout", count)
        error = future.exception()
        if error is None:
            return future.result()
        self._log_once("error", "raised: its rewards are missing. Later errors are counted, not shown.", error)
        return missing("error", count)

    def close(self) -> None:
        """Abandon what still runs."""
        self._pool.close()
        if self._loop:
            self._loop.close()

    async def _enter(self) -> bool:
        """Wait for a slot. False where every slot has been held by a call past its deadline for a whole deadline."""
        if not self._slots.locked():
            return await self._slots.acquire()  # at once: without the task and the timer of a wait
        while True:
            try:
                await asyncio.wait_for(self._slots.acquire(), self._timeout_s)
                return True
            except TimeoutError:
                if len(self._overdue) >= self._max_concurrency:
                    return False

    def _start(self, keywords: dict[str, Any], count: int) -> "Future[list[Reward]]":
        if self._accepted is not None:
            keywords = {name: value for name, value in keywords.items() if name in self._accepted}
        if self._loop:
            call = self._loop.submit(self._awaited(keywords, count))
        else:
            call = self._pool.submit(lambda: self._rewards(self._function(**keywords), count))
        scorer_loop = asyncio.get_running_loop()

        def leave(call: "Future[list[Reward]]") -> None:
            if not scorer_loop.is_closed():
                scorer_loop.call_soon_threadsafe(self._leave, call)

        call.add_done_callback(leave)
        return call

    async def _awaited(self, keywords: dict[str, Any], count: int) -> list[Reward]:
        return self._rewards(await self._function(**keywords), count)

    def _leave(self, call: "Future[list[Reward]]") -> None:
        self._overdue.discard(call)
        self._slots.release()

    def _rewards(self, returned: Any, count: int) -> list[Reward]:
        if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
            self._log_once("wrong_type", f"returned {type(returned).__name__}; return a list of floats or None.")
            return missing("wrong_type", count)
        values = list(returned)
        if len(values) != count:
            self._log_once("wrong_count", f"returned {len(values)} rewards for {count} completions; return one each.")
            return missing("wrong_count", count)
        return checked(values)

    def _log_once(self, reason: MissingReason, what: str, error: BaseException | None = None) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _LOGGER.error("reward source %s (%s) %s", self.name, self.version, what, exc_info=error)


def keywords_of(group: Group) -> dict[str, Any]:
    """What a reward function is called with for a group, by TRL's names."""
    request, count = group.request, len(group.candidates)
    columns = request.columns if request.golden is None else {"golden": request.golden, **request.columns}
    keywords: dict[str, Any] = {name: [value] * count for name, value in columns.items() if name not in _RESERVED}
    keywords["completion_ids"] = [candidate.tokens for candidate in group.candidates]
    keywords["log_extra"] = keywords["log_metric"] = _ignore
    texts = [candidate.text for candidate in group.candidates]
    if request.messages is None:
        return {"prompts": [request.text] * count, "completions": texts, **keywords}
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    return {"prompts": [messages] * count, "completions": answers, **keywords}


def accepted_keywords(function: RewardFunction) -> frozenset[str] | None:
    """The keywords that a function names; None where it takes any. Raises DataError where it needs a trainer."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some C functions have no signature
        return None
    needed = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    if needed & _TRAINER_ONLY:
        raise DataError(
            f"needs {', '.join(sorted(needed & _TRAINER_ONLY))}, which only a trainer in the same process has",
            where=f"reward function {getattr(function, '__name__', function)}",
            do="Give that parameter a default and do without it, or compute it from the prompt's columns.",
        )
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def is_async(function: RewardFunction) -> bool:
    """Whether a call gives a coroutine: for functions, `functools.partial` and instances with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    called: Any = function
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(called.__call__)


def _ignore(*_: object) -> None:
    """TRL's `log_extra` and `log_metric`: there is no completions table to add to."""
