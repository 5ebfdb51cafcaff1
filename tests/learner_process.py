"""A learner alone in a process of its own, over a recorded log. It may stand still at an exact moment of its life.

The processes are forked from one that has imported everything and done nothing: they start in a blink.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import apsw

from learner import checkpoint
from learner.config import LearnerConfig
from streaming import topics
from streaming.heartbeat import Heartbeat
from streaming.history import entries
from streaming.log import open_log
from streaming.log.protocol import Output
from streaming.metrics import Metrics
from streaming.records import Feedback, RoleState, Version, WeightVersion, decode, encode
from tests.builders import make_pair
from tests.fakes import CrashingLog

PATIENCE_S = 60
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["learner.train", "transformers.models.llama.modeling_llama", "tests.light.process"])
NUM_REQUESTS = 61
NUM_TRAINED = 60
"""One request has two examples, two pairs are dropped: exactly twelve batches of five."""
SETTINGS = {
    "max_steps": 12,
    "num_threads": 1,
    "batch": {"batch_size": 5, "micro_batch_tokens": 64},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3},
    "loss": {"name": "rdpo", "beta_1": 0.05, "nll_weight": 0.1},
    "checkpoint": {"every_steps": 3},
    "publish": {"sync_every": 2},
}


def open_run(run):
    """The run's log."""
    return open_log(f"sqlite:///{run}/log.db", run="run", max_record_bytes=2**20, max_bytes=2**30)


_APPENDING = threading.Lock()
"""Held while this process writes to the log: one that stands still in a transaction blocks every other process."""


class AuditedLog(CrashingLog):
    """A log whose appends are events, like those that Python raises for files."""

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        written = list(outputs)
        for one in written:
            sys.audit("append", told(one))
        with _APPENDING:
            return super().append(written)


def told(output: Output) -> str:
    """What a record says, in words to look for."""
    if output.topic == topics.FEEDBACK.name:
        feedback = decode(Feedback, output.value)
        return f"{feedback.ending} in step {feedback.step}"
    if output.topic == topics.WEIGHTS.name:
        return f"version {decode(WeightVersion, output.value).version}"
    if output.topic == topics.ROLES.name:
        state = decode(RoleState, output.value)
        return f"beat {state.health} at step {state.numbers.get('step', 0):.0f}"
    return output.topic


def freeze_process(moment, file):
    """Stop this process (SIGSTOP, every thread of it) just before the first event of this kind with these words."""
    kind, words = moment
    is_over = threading.Event()

    def look(event, arguments):
        if event == kind and not is_over.is_set() and re.search(words, str(arguments)):
            is_over.set()
            with _APPENDING:
                wait_for_transactions(file)
                # To this very thread: another one may take a signal to the process, and this one go on for a while.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    sys.addaudithook(look)


def wait_for_transactions(file):
    """Until no thread of any process is writing to the log's file: in a transaction one must not stand still."""
    connection = apsw.Connection(str(file))
    connection.set_busy_timeout(1000 * PATIENCE_S)
    connection.execute("BEGIN IMMEDIATE; ROLLBACK")
    connection.close()


def until_frozen(process):
    """Return once the process stands still."""
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.is_alive() and time.monotonic() < deadline
        process.join(0.005)


def be_a_rank(run, model, settings, environment, output, freeze_at=None, sampled_by=None):
    """One rank of a learner, until SIGTERM or max_steps. It stops itself (SIGSTOP) at the moment `freeze_at`."""
    from learner.train import Learner

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    with open_run(run) as opened:
        log = opened if freeze_at is None else AuditedLog(opened)
        if freeze_at is not None:
            freeze_process(freeze_at, run / "log.db")
        metrics = Metrics("learner")
        heartbeat = Heartbeat(log, metrics, role="learner", index=int(environment["RANK"]))
        config = LearnerConfig.model_validate(settings)
        learner = Learner(
            log, metrics, heartbeat, config=config, model=str(model), directory=run, policy="policy",
            environment=environment, sampled_by=sampled_by,
        )  # fmt: skip
        learner.run(stop)
        print("pairs without rating:", metrics.value("pairs_without_rating_total"))
        heartbeat.close(health="stopped", message=heartbeat.state.message)


def recorded_pairs():
    """Both routes, different lengths, one request with two examples, one pair that is too long, one that is stale.

    Rating gaps from small to large, and some that are missing.
    """
    rng = random.Random(7)
    pairs = [
        make_pair(
            i,
            chosen=str(rng.randrange(10 ** rng.randrange(1, 6))),
            rejected=None if i % 4 == 0 else str(-i),
            rating_gap=None if i % 4 == 0 else (None, 1.0, 3.0, 10.0, 30.0)[i % 5],
        )
        for i in range(NUM_REQUESTS)
    ]
    pairs[20] = make_pair(20, chosen="9" * 600)
    pairs[30] = make_pair(30, version=Version(1, 50))
    pairs[7:8] = [make_pair(7, index=i, num_examples=2, chosen=str(i)) for i in range(2)]
    return pairs


def record(run, *pairs):
    """Append pairs to a run's log."""
    with open_run(run) as log:
        topic = topics.pairs("policy").name
        log.append([Output(topic, pair.pair_id.encode(), encode(pair)) for pair in pairs])


def start(run, model, settings, *, rank=0, world_size=1, port=0, freeze_at=None, sampled_by=None):
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    arguments = (run, model, {**settings, "world_size": world_size}, environment, run / f"rank-{rank}.log")
    process = CONTEXT.Process(target=be_a_rank, args=(*arguments, freeze_at, sampled_by))
    process.start()
    return process


def wait(process):
    """The exit code. A process that hangs is killed, and that is a failure."""
    process.join(PATIENCE_S)
    process.kill()
    process.join()
    return process.exitcode


def read(run, topic, kind):
    with open_run(run) as log:
        return [decode(kind, entry.value) for entry in entries(log, topic)]


def feedback(run, ending):
    return [one for one in read(run, topics.FEEDBACK.name, Feedback) if one.ending == ending]


def logs(run):
    return "\n".join(path.read_text() for path in run.glob("rank-*.log"))


def started_from(run, epoch):
    """The checkpoint that an epoch began with, by its name."""
    path = run / "checkpoints" / "policy" / f"epoch-{epoch}" / checkpoint.BEGINNING
    return json.loads(path.read_text())["origin"]
