"""A run on a Ray cluster of two nodes, its log on a real Kafka broker: shared work, and processes that come and go."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.config import RunConfig, load_config
from deploy.roles import open_run_log
from streaming import topics
from streaming.audit import Balance, audit_log
from streaming.heartbeat import role_states
from streaming.history import entries
from streaming.log.kafka_topics import create_topics, open_admin, wanted_topics
from streaming.log.protocol import Log
from streaming.records import Group, RoleState, decode
from tests.e2e.test_run import RUN_S, SETTINGS, until, write_run
from tests.kafka_cluster import Address

pytestmark = pytest.mark.slow

STORE_BYTES = 80 * 1024 * 1024
"""Nothing large travels through Ray."""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield cluster.address
    finally:
        cluster.shutdown()


def write_cluster_run(folder: Path, kafka: Address, **changed: Any) -> Path:
    """A run like any other, with its log on Kafka and its topics created."""
    folder.mkdir(exist_ok=True)
    log = {"url": f"kafka://{kafka.bootstrap}", "kafka": {"partitions": 4, "replication_factor": 1}}
    log["kafka"] |= {"min_insync_replicas": 1, "session_timeout_s": 10.0}
    path = write_run(folder, log=log, **changed)
    config = load_config(path)
    rows = topics.all_topics(*(policy.name for policy in config.every_policy))
    admin = open_admin(config.log)
    try:
        create_topics(admin, wanted_topics(rows, config.name, config.log))
    finally:
        admin.close()
    return path


@contextmanager
def started(path: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`streamdpo ARGUMENTS`, ended on the way out if it still runs."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]
    process = subprocess.Popen(
        command, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.terminate()  # once asks for a clean stop, twice is in a hurry
        process.communicate(timeout=60)


@contextmanager
def opened(path: Path) -> Iterator[tuple[RunConfig, Log]]:
    config = load_config(path)
    with open_run_log(config) as log:
        yield config, log


def ready(log: Log) -> dict[str, RoleState]:
    return {name: state for name, state in role_states(log).items() if state.health == "ready"}


def balance(log: Log) -> Balance:
    return audit_log(log, policy="policy")


def groups(log: Log) -> list[Group]:
    return [decode(Group, entry.value) for entry in entries(log, topics.CANDIDATES.name)]


def test_two_nodes_share_the_work_and_a_generator_joins_and_leaves(tmp_path, kafka, ray_cluster):
    path = write_cluster_run(
        tmp_path,
        kafka,
        name="spread",
        generation={**SETTINGS["generation"], "num_generators": 2},
        scoring={**SETTINGS["scoring"], "num_processes": 2},
        selection={"num_processes": 2},
        learner={**SETTINGS["learner"], "world_size": 2},
        scheduler={**SETTINGS["scheduler"], "max_requests": 300},
    )
    with ExitStack() as stack:
        process = stack.enter_context(
            started(path, "run", str(path), RAY_ADDRESS=ray_cluster, RAY_AUTH_MODE="disabled")
        )
        _, log = stack.enter_context(opened(path))
        until(lambda: {f"{kind}-{i}" for kind in _TWICE for i in range(2)} <= ready(log).keys(), process)
        states = ready(log)
        for kind in ("generator", "scorer", "selector"):
            raylets = {psutil.Process(states[f"{kind}-{i}"].pid).ppid() for i in range(2)}
            assert len(raylets) == 2, f"both of {kind} are on one node"

        joined = stack.enter_context(started(path, "role", "generator", str(path), "--index", "2"))
        until(lambda: any(group.generator == "generator-2" for group in groups(log)), joined)
        joined.send_signal(signal.SIGTERM)
        _, err = joined.communicate(timeout=RUN_S)
        assert joined.returncode == 0, err
        out, err = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, err
        assert "end of data" in out
        books = balance(log)
        assert books.is_balanced, books
        assert {group.generator for group in groups(log)} == {f"generator-{i}" for i in range(3)}
        for kind in ("scorer", "selector"):
            read = [role_states(log)[f"{kind}-{i}"] for i in range(2)]
            assert all(state.health == "stopped" for state in read)


_TWICE = ("generator", "scorer", "selector", "learner")


def test_two_runs_side_by_side_on_one_cluster_and_broker_never_meet(tmp_path, kafka, ray_cluster):
    scheduler = {**SETTINGS["scheduler"], "max_requests": 60}
    paths = [
        write_cluster_run(tmp_path / name, kafka, name=name, scheduler=scheduler, prompts={"path": "prompts.jsonl"})
        for name in ("mine", "yours")
    ]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(started(path, "run", str(path), RAY_ADDRESS=ray_cluster, RAY_AUTH_MODE="disabled"))
            for path in paths
        ]
        for process in runs:
            _, err = process.communicate(timeout=RUN_S)
            assert process.returncode == 0, err
    for path in paths:
        with opened(path) as (_, log):
            books = balance(log)
            assert (books.num_requests, books.is_balanced, books.unknown) == (60, True, [])
