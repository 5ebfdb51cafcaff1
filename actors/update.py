"""One weight update: from the learner's announcement to an engine that samples with it."""

import asyncio
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from actors.engine import Engine
from actors.fetching import Copy, WeightsCache
from streaming.errors import WeightsError
from streaming.records import Probe, Version, WeightVersion
from streaming.remote_weights import is_remote
from streaming.weights import Manifest, verify


class Weights(NamedTuple):
    """What an engine can be started from or updated to."""

    directory: Path
    version: Version
    manifest_sha256: str | None  # None: the run's initial model, which nobody announced
    probe: Probe | None
    copy: Copy | None = None  # of a version that lies behind a URL: what brings it into the directory


def announced(record: WeightVersion, cache: WeightsCache | None = None) -> Weights:
    """The weights that the learner published; those behind a URL come into the cache."""
    weights = Weights(Path(record.location), record.version, record.manifest_sha256, record.probe)
    if cache is None or not is_remote(record.location):
        return weights
    return weights._replace(directory=cache.place(record), copy=Copy(cache, record))


async def verify_weights(weights: Weights) -> None:
    """Raises WeightsError unless every byte is as the learner announced it. Brings it here first where it is remote.

    Done before the engine is paused: it reads everything once, so that loading finds it in the page cache.
    """
    if weights.manifest_sha256 is None:
        return
    manifest = await _verified(weights, weights.manifest_sha256)
    if manifest.version != weights.version:
        raise WeightsError(
            f"holds version {manifest.version}, announced was {weights.version}",
            where=str(weights.directory),
            do="The version is not applied; the next one replaces it.",
        )


async def _verified(weights: Weights, manifest_sha256: str) -> Manifest:
    if weights.copy is None:
        return await asyncio.to_thread(verify, weights.directory, manifest_sha256)
    await weights.copy.fetch()
    try:
        return await asyncio.to_thread(verify, weights.directory, manifest_sha256)
    except WeightsError:
        await weights.copy.fetch_again()
    return await asyncio.to_thread(verify, weights.directory, manifest_sha256)


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
