"""Threads for work that blocks: a pool for calls, an event loop for coroutines, a coalescer for batches.

All are daemons: a reward function that hangs for ever cannot keep the process from ending. All give
`concurrent.futures.Future`s, which `asyncio.wrap_future` turns into something to await.

    idle -> working (on `submit`) -> closed (what waits is cancelled, what runs is abandoned)
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_JOIN_S = 1.0
"""How long closing waits for a thread: one that is still busy then is abandoned."""


class DaemonPool:
    """At most `max_threads` blocking calls at once; threads start when they are first needed."""

    def __init__(self, max_threads: int, *, name: str) -> None:
        self._max_threads = max_threads
        self._name = name
        self._lock = threading.Lock()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._unfinished = 0
        self._threads = 0

    def submit(self, call: Callable[[], Result]) -> "Future[Result]":
        """Run `call` in a thread."""
        future: Future[Result] = Future()
        with self._lock:
            self._unfinished += 1
            is_short = self._threads < min(self._unfinished, self._max_threads)
            self._threads += is_short
        self._calls.put((future, call))
        if is_short:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    def close(self) -> None:
        """Threads end after the call that they are in."""
        for _ in range(self._max_threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            _settle(*job)
            with self._lock:
                self._unfinished -= 1


class LoopThread:
    """An event loop in a thread of its own: a coroutine that blocks holds up only what was submitted here."""

    def __init__(self, *, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._begun: deque[Coroutine[Any, Any, None]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself refers to its tasks weakly
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Run a coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that tells by itself what came of it. Cheaper than `submit`: many share one wake-up."""
        self._begun.append(coroutine)
        if len(self._begun) == 1:  # otherwise the loop has been woken for one before it, and takes all there are
            self._loop.call_soon_threadsafe(self._take_begun)

    def close(self) -> None:
        """Cancel what still runs and end the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)

    def _take_begun(self) -> None:
        while self._begun:
            task = self._loop.create_task(self._begun.popleft())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _run(self) -> None:
        self._loop.run_forever()
        self._take_begun()  # to be cancelled with the others
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks))
        self._loop.close()


class Coalescer(Generic[Item, Result]):
    """One thread that runs a batch function on everything submitted while it was busy.

    A batch that raises is tried again item by item, so that one bad item fails alone.
    """

    def __init__(self, run: Callable[[list[Item]], list[Result]], *, name: str, max_items: int) -> None:
        self._run = run
        self._max_items = max_items
        self._jobs: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> "Future[Result]":
        """The result of `item`, in whatever batch it happens to be."""
        future: Future[Result] = Future()
        self._jobs.put((future, item))
        return future

    def close(self) -> None:
        """End after the batch under way; what waits behind it is cancelled. Nothing may be submitted afterwards."""
        self._jobs.put(None)
        self._thread.join(_JOIN_S)

    def _work(self) -> None:
        while jobs := self._take():
            self._settle([job for job in jobs if job[0].set_running_or_notify_cancel()])

    def _take(self) -> list[tuple["Future[Result]", Item]]:
        """What waits, at least one; nothing once this is closed."""
        jobs = [self._jobs.get()]
        while len(jobs) < self._max_items and not self._jobs.empty():
            jobs.append(self._jobs.get())
        if None not in jobs:
            return [job for job in jobs if job is not None]
        for job in jobs:
            if job is not None:
                job[0].cancel()
        return []

    def _settle(self, jobs: list[tuple["Future[Result]", Item]]) -> None:
        if not jobs:
            return
        try:
            results = self._run([item for _, item in jobs])
        except BaseException as error:
            if len(jobs) == 1:
                jobs[0][0].set_exception(error)
                return
            for job in jobs:
                self._settle([job])
            return
        for (future, _), result in zip(jobs, results, strict=True):
            future.set_result(result)


def _settle(future: "Future[Any]", call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except StopIteration as error:
        # asyncio's futures refuse a StopIteration, and whoever awaits one would wait for ever.
        future.set_exception(RuntimeError(f"raised {error!r}"))
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
