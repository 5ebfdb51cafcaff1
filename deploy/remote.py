"""What of a run lies behind URLs (log.blobs, learner.publish.url): where, in whose cache, and whether it can."""

import os
import tempfile
import time
from pathlib import Path

from actors.fetching import WeightsCache
from deploy.config import Policy, RunConfig
from streaming.errors import NotReadyError
from streaming.heartbeat import role_states
from streaming.kept import leased
from streaming.log.protocol import Log
from streaming.metrics import Metrics
from streaming.remote import RemoteFolder
from streaming.remote_weights import RemoteWeights

_PROBE = b"streamdpo check"


def remote_weights(config: RunConfig, policy: Policy) -> RemoteWeights | None:
    """A policy's versions behind the URL; None where generators read them in the run's directory."""
    url = policy.learner.publish.url
    return None if url is None else RemoteWeights(f"{url.rstrip('/')}/{config.name}/{policy.name}")


def weights_cache(config: RunConfig, log: Log, metrics: Metrics) -> WeightsCache:
    """This machine's copies of what the sampling policy publishes; nothing is made before the first one comes."""
    directory = config.generation.weights_cache or str(Path(tempfile.gettempdir()) / f"streamdpo-{os.getuid()}")
    return WeightsCache(
        Path(directory) / config.name / config.policy,
        keep=config.generation.keep_weights,
        leases=lambda: leased(role_states(log).values(), now_s=time.time()),
        metrics=metrics,
    )


def check_stores(config: RunConfig) -> str:
    """Write, read and remove a small thing in every store that the settings name.

    Raises ConfigError for a URL of no known kind, NotReadyError for a store that does not do what it should.
    """
    urls = {"log.blobs": config.log.blobs} | {
        f"learner.publish.url of {policy.name}": policy.learner.publish.url for policy in config.every_policy
    }
    named = {setting: url for setting, url in urls.items() if url is not None}
    for setting, url in named.items():
        _try_store(url, setting)
    return ", ".join(sorted(set(named.values()))) or "none: large records and weights stay in the run's directory"


def _try_store(url: str, setting: str) -> None:
    folder = RemoteFolder(url, setting=setting, error=NotReadyError, pauses_s=())
    name = f"check-{os.getpid()}-{time.time_ns()}"
    path = folder.path(name)
    folder.write(name, lambda: folder.fs.pipe_file(path, _PROBE))
    if folder.attempt("read", name, lambda: folder.fs.cat_file(path)) != _PROBE:
        raise NotReadyError("what is read is not what was written", where=url, do=f"Name another store in {setting}.")
    folder.attempt("remove", name, lambda: folder.fs.rm_file(path))
