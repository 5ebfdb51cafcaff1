import asyncio
import threading
from concurrent.futures import CancelledError, wait
from queue import SimpleQueue

import pytest

from streaming.rewards.workers import Coalescer, DaemonPool, LoopThread

WAIT_S = 60.0


def test_a_pool_runs_as_many_calls_at_once_as_it_has_threads() -> None:
    together = threading.Barrier(4)
    pool = DaemonPool(4, name="test")
    futures = [pool.submit(lambda: together.wait(WAIT_S)) for _ in range(4)]
    assert {future.result(WAIT_S) for future in futures} == {0, 1, 2, 3}
    pool.close()


def test_a_hung_call_holds_up_no_other_call() -> None:
    release = threading.Event()
    pool = DaemonPool(2, name="test")
    hung = pool.submit(lambda: release.wait(WAIT_S))
    assert [pool.submit(lambda: 1).result(WAIT_S) for _ in range(20)] == [1] * 20
    release.set()
    assert hung.result(WAIT_S)
    pool.close()


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), StopIteration()])
def test_whatever_a_call_raises_reaches_who_awaits_it(error: BaseException) -> None:
    def fail() -> None:
        raise error

    async def awaited() -> None:
        await asyncio.wait_for(asyncio.wrap_future(pool.submit(fail)), WAIT_S)

    pool = DaemonPool(1, name="test")
    with pytest.raises((ValueError, SystemExit, RuntimeError)):
        asyncio.run(awaited())
    pool.close()


def test_closing_a_loop_cancels_what_still_runs_in_it() -> None:
    loop = LoopThread(name="test")
    future = loop.submit(asyncio.sleep(3600))
    loop.close()
    with pytest.raises(CancelledError):
        future.result(WAIT_S)


def test_a_loop_runs_all_that_is_begun_whoever_begins_it() -> None:
    loop, ran = LoopThread(name="test"), SimpleQueue[int]()

    async def run(number: int) -> None:
        ran.put(number)

    def begin(first: int) -> None:
        for number in range(first, 1000, 4):
            loop.begin(run(number))

    threads = [threading.Thread(target=begin, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    assert sorted(ran.get(timeout=WAIT_S) for _ in range(1000)) == list(range(1000))
    loop.close()


def test_closing_a_loop_cancels_what_was_begun() -> None:
    loop, told = LoopThread(name="test"), SimpleQueue[str]()
    busy, release = threading.Event(), threading.Event()

    async def block() -> None:
        busy.set()
        release.wait(WAIT_S)

    async def wait_for_ever() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            told.put("cancelled")

    loop.begin(wait_for_ever())
    loop.begin(block())
    assert busy.wait(WAIT_S)
    loop.begin(block())
    closing = threading.Thread(target=loop.close)
    closing.start()
    release.set()
    closing.join()
    assert told.get(timeout=WAIT_S) == "cancelled"


def test_what_comes_while_a_batch_runs_shares_the_next_one() -> None:
    batches: list[list[int]] = []
    started, release = threading.Event(), threading.Event()

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        started.set()
        release.wait(WAIT_S)
        return [item * 10 for item in items]

    coalescer = Coalescer(run, name="test", max_items=3)
    futures = [coalescer.submit(0)]
    started.wait(WAIT_S)
    futures += [coalescer.submit(item) for item in (1, 2, 3, 4)]
    release.set()
    assert [future.result(WAIT_S) for future in futures] == [0, 10, 20, 30, 40]
    assert batches == [[0], [1, 2, 3], [4]]
    coalescer.close()


def test_a_bad_item_fails_alone() -> None:
    started, release = threading.Event(), threading.Event()

    def run(items: list[int]) -> list[float]:
        started.set()
        release.wait(WAIT_S)
        return [1 / item for item in items]

    coalescer = Coalescer(run, name="test", max_items=8)
    futures = [coalescer.submit(1)]
    started.wait(WAIT_S)
    futures += [coalescer.submit(item) for item in (2, 0, 4)]
    release.set()
    wait(futures, WAIT_S)
    assert [future.result() for future in futures if not future.exception()] == [1.0, 0.5, 0.25]
    assert isinstance(futures[2].exception(), ZeroDivisionError)
    coalescer.close()


def test_closing_a_coalescer_cancels_what_waits() -> None:
    started, release = threading.Event(), threading.Event()

    def run(items: list[int]) -> list[int]:
        started.set()
        release.wait(WAIT_S)
        return items

    coalescer = Coalescer(run, name="test", max_items=1)
    running = coalescer.submit(1)
    started.wait(WAIT_S)
    closing = threading.Thread(target=coalescer.close)
    closing.start()
    release.set()
    closing.join(WAIT_S)
    assert running.result(WAIT_S) == [1][0]
