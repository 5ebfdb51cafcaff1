"""Weights that travel over a URL (learner.publish.url): where a run's versions lie, and the generators' copies."""

import os
import tempfile
import time
from pathlib import Path

from actors.fetching import WeightsCache
from deploy.config import Policy, RunConfig
from streaming.heartbeat import role_states
from streaming.kept import leased
from streaming.log.protocol import Log
from streaming.metrics import Metrics
from streaming.remote_weights import RemoteWeights


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
