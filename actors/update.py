"""One weight update: from the learner's announcement to an engine that samples with it."""

import asyncio
from pathlib import Path

from actors.engine import Engine
from streaming.errors import WeightsError
from streaming.records import Version, WeightVersion
from streaming.weights import verify


async def verify_weights(weights: WeightVersion) -> Path:
    """The directory of this version, every byte as the learner announced it. Raises WeightsError otherwise.

    Done before the engine is paused: it reads everything once, so that loading finds it in the page cache.
    """
    directory = Path(weights.location)
    manifest = await asyncio.to_thread(verify, directory, weights.manifest_sha256)
    if manifest.version != weights.version:
        raise WeightsError(
            f"holds version {manifest.version}, announced was {weights.version}",
            where=str(directory),
            do="The version is not applied; the next one replaces it.",
        )
    return directory


async def apply_weights(engine: Engine, directory: Path, version: Version) -> bool:
    """Bring the engine to `version`; requests in flight go on across it. False if it is already there or beyond.

    Raises WeightsError where it did not load, EngineError where the engine died: either way it has to be closed.
    """
    if version <= engine.version:  # (epoch, number): a restarted learner's lower number is newer
        return False
    await engine.pause()
    # Where this raises the engine stays paused, on purpose: a half-loaded model must never sample. Restarting it
    # loses nothing, because a request is settled in the log only when its group is.
    await engine.load(directory, version)
    await engine.resume()
    return True
