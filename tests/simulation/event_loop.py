"""An asyncio event loop in a fiber: its timers are the world's time, its threads are fibers of the same process."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.simulation.fibers import Fiber, Killed, Process

_NEVER_S = 3600.0
"""How long a loop waits that has no timer: a fiber that finishes wakes it."""

_COARSE_S = 0.2
"""Timers of a slow machine: fewer looks at nothing."""


class FiberLoop(asyncio.BaseEventLoop):
    """Runs the coroutines of one process."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self._selector = self
        self._fiber: Fiber | None = None
        self._is_buried = False
        self._queues: dict[Any, deque[Callable[[], None]]] = {}
        self.set_exception_handler(lambda loop, context: None)  # what a dead process leaves behind is nobody's

    def run(self, work: Any) -> None:
        """Run a coroutine to its end. Where the process dies in it, everything in it is ended."""
        self._fiber = self._process.fibers[0]
        try:
            self.run_until_complete(work)
        except Killed:
            self._bury()
            raise
        finally:
            self._bury()

    # What BaseEventLoop asks of its selector and of its platform

    def time(self) -> float:
        return self._process.world.now_s

    def select(self, timeout: float | None) -> list[Any]:
        if not self._is_buried:
            seconds = _NEVER_S if timeout is None else timeout
            self._process.wait(max(seconds, _COARSE_S) if seconds else 0.0, "loop")
        return []

    def _process_events(self, events: list[Any]) -> None:
        return

    def _write_to_self(self) -> None:
        return

    def run_in_executor(self, executor: Any, work: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        """The work runs in a fiber; of one executor one after the other, as it would in its only thread."""
        if self._process.is_dead or self._is_buried:
            raise Killed
        future = self.create_future()

        def body() -> None:
            try:
                value = work(*arguments)
            except Exception as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(value)
            if self._fiber is not None:
                self._fiber.wake()

        if executor is None:
            self._process.spawn(body, "thread")
        else:
            self._enqueue(executor, body)
        return future

    def _enqueue(self, executor: Any, body: Callable[[], None]) -> None:
        queue = self._queues.get(executor)
        if queue is not None:
            queue.append(body)
            return
        queue = self._queues[executor] = deque([body])

        def work() -> None:
            while queue:
                queue.popleft()()
            del self._queues[executor]

        self._process.spawn(work, "thread")

    def _bury(self) -> None:
        """End every task that is left, so that the garbage collector finds nothing half-way."""
        self._is_buried = True
        for _ in range(100):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.call_soon(self.stop)
            self.run_forever()
        self.close()
