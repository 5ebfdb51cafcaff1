"""A new log for a run whose log is lost, from its checkpoints: `streamdpo recover`.

    no log -> (numbers and settled requests of the newest checkpoints, carried into an empty log) -> `streamdpo run`

What the checkpoints hold stays: the model, the optimizer, and the requests that are settled for ever, so nothing is
trained twice, and new requests get new numbers. What only the log held is gone, and is named: the requests that were
on their way (their prompts come again with the next pass), and the held-out measurements.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.config import RunConfig, run_directory
from deploy.lock import only_launcher
from deploy.roles import open_run_log
from learner import checkpoint
from learner.checkpoint import Checkpoint
from streaming import topics
from streaming.errors import ConfigError, NotReadyError
from streaming.frontier import IntervalSet
from streaming.log.protocol import Log, Output
from streaming.records import CarriedBalance, Version, encode

BEFORE = "before the log was lost"
"""Reason of the requests that a checkpoint has settled: trained or dropped, only the log could say."""


class Recovered(NamedTuple):
    """What the new log begins with, of one policy."""

    policy: str
    directory: Path  # the checkpoint
    version: Version
    step: int
    num_settled: int
    next_number: int  # of a request
    next_ordinal: int  # of a training prompt


def recover(config: RunConfig) -> list[Recovered]:
    """Begin a new log from the newest checkpoint of every policy. Doing it again after a crash is no harm.

    Raises NotReadyError where there is no checkpoint, or the run is running; ConfigError where the log holds something.
    """
    with only_launcher(run_directory(config)), open_run_log(config) as log:
        found = {policy.name: _newest(config, policy.name) for policy in config.every_policy}
        _refuse_a_log_that_is_there(log, config)
        return [_begin(log, config, name, one, list(found.values())) for name, one in found.items()]


def told(found: Sequence[Recovered]) -> str:
    """For people, a few lines each."""
    lines = []
    for one in found:
        lines += [
            f"{one.policy}: a new log from step {one.step}, version {one.version} ({one.directory})",
            f"  settled for ever, never trained again: {one.num_settled} requests",
            f"  the next request is number {one.next_number}, the next training prompt number {one.next_ordinal}",
        ]
    gone = "gone with the log: requests on their way, held-out measurements, dead letters, the audit until now"
    return "\n".join([*lines, gone])


def _root(config: RunConfig, policy: str) -> Path:
    return run_directory(config) / "checkpoints" / policy


def _newest(config: RunConfig, policy: str) -> Checkpoint:
    found = checkpoint.newest(_root(config, policy))
    if found is None:
        raise NotReadyError(
            "there is no whole checkpoint, so there is nothing to go on from",
            where=str(_root(config, policy)),
            do="Start the run anew: `streamdpo run` with another `directory`.",
        )
    return found


def _refuse_a_log_that_is_there(log: Log, config: RunConfig) -> None:
    names = {topic.name for policy in config.every_policy for topic in topics.all_topics(policy.name)}
    held = sorted(name for name in names - {topics.BOOKS.name} if any(log.end_offsets(name).values()))
    if held:
        raise ConfigError(
            f"the log is there: it holds {', '.join(held)}",
            where=config.log.url,
            do="Where it is whole, `streamdpo run` goes on with it. Where it is only a part of what was lost, move the "
            "file away (on Kafka: delete the run's topics), and recover again.",
        )


def _begin(log: Log, config: RunConfig, policy: str, found: Checkpoint, every: list[Checkpoint]) -> Recovered:
    settled = IntervalSet(found.state.reader.settled.intervals)
    next_number = max((end for one in every for _, end in one.state.reader.settled.intervals), default=0)
    claims = [claim.request_number + 1 for one in every for claim in one.state.reader.settled.claims]
    next_number = max([next_number, *claims])
    next_ordinal = max(one.state.issued for one in every)
    root = _root(config, policy)
    if checkpoint.log_began(root) <= found.state.version.epoch:  # else it was written before a crash of this command
        epoch = checkpoint.claim_epoch(root, at_least=found.state.version.epoch + 1)
        checkpoint.write_beginning(root, epoch, found, [], is_new_log=True)
    record = CarriedBalance(
        policy=policy,
        issued=[(0, next_number)] if next_number else [],
        closed=[(0, next_number)] if next_number else [],
        endings=[("settled", BEFORE, len(settled)), ("not known", BEFORE, next_number - len(settled))],
        next_ordinal=next_ordinal,
        time_s=time.time(),
    )
    log.append([Output(topics.BOOKS.name, policy.encode(), encode(record))])
    state = found.state
    return Recovered(policy, found.directory, state.version, state.step, len(settled), next_number, next_ordinal)
