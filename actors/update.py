"""One weight update: from the learner's announcement to an engine that samples with it."""

import asyncio
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from actors.engine import Engine
from streaming.errors import WeightsError
from streaming.records import Probe, Version, WeightVersion
from streaming.weights import verify


class Weights(NamedTuple):
    """What an engine can be started from or updated to."""

    directory: Path
    version: Version
    manifest_sha256: str | None  # None: the run's initial model, which nobody announced
    probe: Probe | None


def announced(record: WeightVersion) -> Weights:
    """The weights that the learner published."""
    return Weights(Path(record.location), record.version, record.manifest_sha256, record.probe)


async def verify_weights(weights: Weights) -> None:
    """Raises WeightsError unless every byte is as the learner announced it.

    Done before the engine is paused: it reads everything once, so that loading finds it in the page cache.
    """
    if weights.manifest_sha256 is None:
        return
    manifest = await asyncio.to_thread(verify, weights.directory, weights.manifest_sha256)
    if manifest.version != weights.version:
        raise WeightsError(
            f"holds version {manifest.version}, announced was {weights.version}",
            where=str(weights.directory),
            do="The version is not applied; the next one replaces it.",
        )


async def apply_weights(
    engine: Engine, weights: Weights, *, paused: AbstractContextManager[None] | None = None
) -> bool:
    """Bring the engine to this version; requests in flight go on across it. False if it is already there or beyond.

    `paused` is entered while nothing is sampled: after the step under way, which still counts.
    Raises WeightsError where it did not load, EngineError where the engine died: either way it has to be closed.
    """
    if weights.version <= engine.version:  # (epoch, number): a restarted learner's lower number is newer
        return False
    await engine.pause()
    # Where this raises the engine stays paused, on purpose: a half-loaded model must never sample. Restarting it
    # loses nothing, because a request is settled in the log only when its group is.
    with paused or nullcontext():
        await engine.load(weights.directory, weights.version)
        await engine.resume()
    return True
