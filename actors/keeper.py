"""Keeps one engine alive and on the newest weights. Knows engines and versions; knows no prompts and no topics.

start -> (update -> ...)* -> close
           `-> a failed update, or an engine that died: closed, and a new one from the newest good version
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from actors.engine import Engine
from actors.parity import check
from actors.update import Weights, apply_weights, verify_weights
from streaming.errors import EngineError, NotReadyError, WeightsError
from streaming.heartbeat import Heartbeat
from streaming.metrics import Metrics
from streaming.records import Version

MakeEngine = Callable[[Path, Version], Awaitable[Engine]]
"""Starts an engine that holds the model in this directory, under this version."""

Outcome = Literal["applied", "refused", "failed", "parity"]
"""refused: wrong bytes, nothing changed. failed, parity: the engine was replaced."""

MAX_FRUITLESS_RESTARTS = 3
"""An engine that dies this often without finishing a single group in between will not recover by itself."""


class EngineKeeper:
    """Hands out the engine; updates and replaces it. All methods belong to one event loop."""

    def __init__(self, make_engine: MakeEngine, metrics: Metrics, heartbeat: Heartbeat, *, tolerance: float) -> None:
        self._make_engine = make_engine
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._tolerance = tolerance
        self._engine: Engine | None = None
        self._weights: list[Weights] = []  # to start from, the newest first
        self._changing = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._fruitless_restarts = 0

    async def start(self, weights: Weights) -> None:
        """Start an engine from verified weights. Raises WeightsError, NotReadyError: the caller may try other ones."""
        async with self._changing:
            await self._start_from(weights)

    @property
    def version(self) -> Version:
        """What the engine holds, or will hold again once it is replaced. Only after `start`."""
        return self._weights[0].version

    @property
    def is_ready(self) -> bool:
        """Whether there is an engine at this moment."""
        return self._engine is not None

    async def engine(self) -> Engine:
        """The engine; waits while it is being replaced."""
        async with self._changed:
            while (engine := self._engine) is None:
                await self._changed.wait()
            return engine

    async def verify(self, weights: Weights) -> bool:
        """Whether these may be applied: newer, and every byte as announced. Takes a lease on them first."""
        if self._weights and weights.version <= self._weights[0].version:
            return False
        await self._lease(weights)
        try:
            await verify_weights(weights)
        except WeightsError as error:
            self._count("refused", error)
            await self._lease()
            return False
        return True

    async def update(self, weights: Weights) -> Outcome:
        """Bring the engine to verified weights, in flight, and compare it with the learner.

        Whatever goes wrong, the engine is replaced: then nothing that `weights.version` sampled so far may be used.
        """
        async with self._changing:
            engine = self._engine
            assert engine is not None, "update comes after start"
            outcome: Outcome = "failed"
            try:
                began = time.monotonic()
                await apply_weights(engine, weights, paused=self._metrics.time.spend("updating"))
                self._metrics.observe("weight_update_seconds", time.monotonic() - began)
                outcome = "parity"
                await self._check_parity(engine, weights)  # a request among others: the engine samples on meanwhile
            except (WeightsError, EngineError) as error:
                self._count(outcome, error)
                with self._metrics.time.spend("updating"):
                    await self._replace(engine, [weights, *self._weights])
                return outcome
            await self._hold(engine, weights)
            self._count("applied")
            return "applied"

    async def replace(self, broken: Engine, error: EngineError) -> None:
        """Replace an engine that failed a request; where that has happened already, do nothing.

        Raises EngineError where engines die again and again.
        """
        async with self._changing:
            if self._engine is not broken:
                return
            self._heartbeat.tell(health="degraded", message=str(error))
            with self._metrics.time.spend("updating"):
                await self._replace(broken, self._weights)

    def worked(self) -> None:
        """A group was finished: the engine is well."""
        self._fruitless_restarts = 0

    async def close(self) -> None:
        """Close the engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    async def _replace(self, broken: Engine, candidates: list[Weights]) -> None:
        self._engine = None
        await broken.close()
        self._fruitless_restarts += 1
        if self._fruitless_restarts > MAX_FRUITLESS_RESTARTS:
            raise EngineError(
                f"the engine failed {self._fruitless_restarts} times without finishing one group",
                where=str(candidates[0].directory),
                do="See the messages of the failures above; a smaller engine.max_num_seqs needs less memory.",
            )
        for weights in candidates:
            try:
                await self._lease(weights)
                await verify_weights(weights)
                return await self._start_from(weights)
            except (WeightsError, NotReadyError) as error:  # the version before is as good a place to go on from
                self._heartbeat.tell(health="degraded", message=str(error))
                failure = error
        raise failure

    async def _start_from(self, weights: Weights) -> None:
        engine = await self._make_engine(weights.directory, weights.version)
        try:
            await self._check_parity(engine, weights)
        except BaseException:
            await engine.close()
            raise
        await self._hold(engine, weights)

    async def _check_parity(self, engine: Engine, weights: Weights) -> None:
        if weights.probe is not None:
            await check(engine, weights.probe, self._metrics, tolerance=self._tolerance)

    async def _hold(self, engine: Engine, weights: Weights) -> None:
        """From now on this engine, with these weights; the version before stays a place to start from."""
        self._weights = [weights, *(older for older in self._weights if older.version < weights.version)][:2]
        self._metrics.set("weights_epoch", weights.version.epoch)
        self._metrics.set("weights_number", weights.version.number)
        self._heartbeat.tell(version=weights.version, health="ready", message="")
        await self._lease()
        async with self._changed:
            self._engine = engine
            self._changed.notify_all()

    async def _lease(self, *more: Weights) -> None:
        """Tell the learner which versions must stay on disk, before they are read."""
        leases = sorted({weights.version for weights in (*more, *self._weights) if weights.manifest_sha256 is not None})
        if leases != self._heartbeat.state.leases:
            await asyncio.to_thread(self._heartbeat.tell, at_once=True, leases=leases)

    def _count(self, outcome: Outcome, error: Exception | None = None) -> None:
        self._metrics.count("weight_updates_total", outcome=outcome)
        if error is not None:
            self._heartbeat.tell(health="degraded", message=str(error))
