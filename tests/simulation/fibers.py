"""Who runs when, and what time it is. Everything that a process does is a fiber, and one fiber runs at a time.

    spawned -> (running -> waiting until some time)* -> done
                                   `-> killed: its process is dead, and nothing it does counts any more

A fiber gives way wherever the real thing could be interrupted so that others notice: at every request to the log, and
wherever it waits. Which one goes on is the world's choice, made by the seed. Time passes only when all of them wait.
"""

import asyncio
import heapq
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet

EPOCH_S = 1_000_000.0
"""Time at which every world begins."""


class Killed(BaseException):
    """SIGKILL: nothing catches it, and nothing that runs on the way out has any effect."""


class Fiber:
    """A thread of a process."""

    def __init__(self, process: "Process", body: Callable[[], None], name: str) -> None:
        self.process = process
        self.name = name
        self.wake_s = process.world.now_s
        self.is_done = False
        self._body = body
        self.greenlet = greenlet(self._run, parent=process.world.hub)
        self.loop: asyncio.AbstractEventLoop | None = None  # that runs in it while it waits

    def wake(self) -> None:
        """What it waits for may have happened."""
        self.wake_s = min(self.wake_s, self.process.world.now_s)

    def _run(self) -> None:
        try:
            self._body()
        except Killed:
            pass
        finally:
            self.is_done = True


class Process:
    """One start of a role."""

    def __init__(self, world: "World", role_id: str, start: int) -> None:
        self.world = world
        self.role_id = role_id
        self.start = start
        self.fibers: list[Fiber] = []
        self.is_dead = False
        self.is_over = False
        self.is_alive = True
        self.error: BaseException | None = None
        self.silent_since_s: float | None = None  # dead, or standing still
        self.resumes_s = 0.0

    def __str__(self) -> str:
        return f"{self.role_id}#{self.start}"

    def spawn(self, body: Callable[[], None], name: str) -> Fiber:
        fiber = Fiber(self, body, name)
        self.fibers.append(fiber)
        return fiber

    def begin(self, role: Callable[["Process"], None]) -> None:
        """Run a role; what it raises is kept."""

        def body() -> None:
            try:
                role(self)
            except Exception as error:
                self.error = error
            self.is_over, self.is_alive = True, False
            self.silent_since_s = self.world.now_s

        self.spawn(body, "main")

    def pass_by(self, what: str) -> None:
        """A moment at which others may run, or this process may die."""
        self.world.give_way(self, what)

    def wait(self, seconds: float, what: str) -> None:
        self.world.give_way(self, what, seconds)

    def stand_still(self, seconds: float) -> None:
        """SIGSTOP now, SIGCONT later."""
        self.silent_since_s = self.world.now_s
        self.resumes_s = self.world.now_s + seconds

    def kill(self) -> None:
        """Die now. What its fibers do on their way out has no effect."""
        self.is_dead, self.is_alive = True, False
        self.silent_since_s = self.silent_since_s or self.world.now_s
        for fiber in self.fibers:
            if fiber.greenlet is not getcurrent() and not fiber.is_done:
                fiber.is_done = True
                if fiber.greenlet:  # it has begun
                    self.world.unwind(fiber)
        if getcurrent() in [fiber.greenlet for fiber in self.fibers]:
            raise Killed


class World:
    """All processes, one clock, one source of chance."""

    def __init__(self, seed: int, *, is_traced: bool = False) -> None:
        self.chance = random.Random(seed)
        self.now_s = EPOCH_S
        self.wrong_by_s = 0.0  # what every clock that people set shows too much
        self.hub = getcurrent()
        self.processes: list[Process] = []
        self._living: list[Process] = []
        self.num_steps = 0
        self.trace: list[str] | None = [] if is_traced else None
        self.on_step: Callable[[Process], None] = lambda process: None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self.current: Fiber | None = None

    def process(self, role_id: str, start: int) -> Process:
        made = Process(self, role_id, start)
        self.processes.append(made)
        self._living.append(made)
        return made

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen to the world in so many seconds."""
        self._num_events += 1
        heapq.heappush(self._events, (self.now_s + seconds, self._num_events, event))

    def run(self, is_over: Callable[[], bool], *, max_steps: int) -> bool:
        """Run until it is over; False where that does not happen within so many steps."""
        with virtual_time(self):
            while not is_over():
                if self.num_steps >= max_steps:
                    return False
                self._step()
        return True

    def tell(self, who: object, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now_s - EPOCH_S:9.3f} {who}: {what}")

    def give_way(self, process: Process, what: str, seconds: float = 0.0) -> None:
        """Called in a fiber: let others run, for at least so long."""
        fiber = self.current
        if process.is_dead:
            raise Killed
        if fiber is None or fiber.process is not process:
            return  # the world itself looks, or a process that is dying
        self.tell(process, what)
        fiber.wake_s = self.now_s + seconds
        fiber.loop = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        self.current = None
        self.hub.switch()
        self.current = fiber
        asyncio._set_running_loop(fiber.loop)
        if process.is_dead:
            raise Killed

    def unwind(self, fiber: Fiber) -> None:
        """Let a dead fiber's frames end."""
        asyncio._set_running_loop(None)
        current, self.current = self.current, None
        fiber.greenlet.throw(Killed)
        self.current = current

    def bury(self) -> None:
        """Kill whatever is left, so that nothing of this world is ever finished by the garbage collector."""
        with virtual_time(self):
            for process in self.processes:
                process.kill()

    def _step(self) -> None:
        self.num_steps += 1
        while not (ready := self._ready()):
            pass
        fiber = ready[int(self.chance.random() * len(ready))]
        process = fiber.process
        self.on_step(process)
        if process.is_alive and process.resumes_s <= self.now_s:
            self._resume(fiber)

    def _ready(self) -> list[Fiber]:
        """Fibers that can run now; none where only time had to pass."""
        while self._events and self._events[0][0] <= self.now_s:
            heapq.heappop(self._events)[2]()
        self._living = [process for process in self._living if process.is_alive]
        ready: list[Fiber] = []
        next_s = self._events[0][0] if self._events else math.inf
        for process in self._living:
            if process.resumes_s > self.now_s:
                next_s = min(next_s, process.resumes_s)
                continue
            process.silent_since_s = None
            for fiber in process.fibers:
                if fiber.wake_s <= self.now_s:
                    ready.append(fiber)
                elif fiber.wake_s < next_s:
                    next_s = fiber.wake_s
        if not ready:
            assert next_s < math.inf, "nobody will ever do anything again"
            self.now_s = next_s
        return ready

    def _resume(self, fiber: Fiber) -> None:
        self.current = fiber
        fiber.greenlet.switch()
        self.current = None
        if fiber.is_done and fiber in fiber.process.fibers:
            fiber.process.fibers.remove(fiber)
        if fiber.process.is_over and not fiber.process.is_dead:
            fiber.process.kill()


@contextmanager
def virtual_time(world: World) -> Iterator[None]:
    """Inside the block Python's clocks are the world's: roles read them wherever they account for time."""
    clocks = time.time, time.monotonic
    time.time, time.monotonic = lambda: world.now_s + world.wrong_by_s, lambda: world.now_s
    try:
        yield
    finally:
        time.time, time.monotonic = clocks


class FiberLock:
    """A lock between the fibers of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._is_held = False

    def __enter__(self) -> None:
        while self._is_held:
            self._process.wait(0.001, "lock")
        self._is_held = True

    def __exit__(self, *_: object) -> None:
        self._is_held = False


class FiberEvent:
    """Stands in for a threading.Event."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, seconds: float) -> bool:
        if not self._is_set:
            self._process.wait(seconds, "waits")
        return self._is_set


class FiberThread:
    """Stands in for a threading.Thread: what its body raises ends it, and nobody is told."""

    def __init__(self, process: Process, body: Callable[[], None], name: str) -> None:
        self._process = process

        def run() -> None:
            try:
                body()
            except Exception as error:
                process.world.tell(process, f"the thread {name} ends: {error}")

        self._fiber = process.spawn(run, name)

    def join(self) -> None:
        while not self._fiber.is_done:
            self._process.wait(0.1, "join")


class FiberFuture:
    """What a fiber of an executor comes to."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.is_done = False
        self.value: Any = None
        self.error: BaseException | None = None

    def done(self) -> bool:
        return self.is_done

    def result(self) -> Any:
        while not self.is_done:
            self._process.wait(0.02, "future")
        if self.error is not None:
            raise self.error
        return self.value


class FiberExecutor:
    """Stands in for a ThreadPoolExecutor of one thread."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._newest: FiberFuture | None = None

    def submit(self, work: Callable[..., Any], *arguments: Any) -> FiberFuture:
        before, future = self._newest, FiberFuture(self._process)
        self._newest = future

        def body() -> None:
            while before is not None and not before.is_done:
                self._process.wait(0.01, "queue")
            try:
                future.value = work(*arguments)
            except Exception as error:
                future.error = error
            future.is_done = True

        self._process.spawn(body, "worker")
        return future

    def shutdown(self) -> None:
        while self._newest is not None and not self._newest.is_done:
            self._process.wait(0.02, "shutdown")
