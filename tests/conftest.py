"""Fixtures that every test may ask for."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from streaming.log import open_log
from streaming.log.kafka_acls import ROLES
from streaming.log.protocol import Log
from tests.kafka_cluster import Address, Cluster, Security, why_not
from tests.s3_server import S3Server, served_here

if TYPE_CHECKING:
    from learner.ranks import Ranks

# Tests download nothing: without a network, a name that is no directory would be looked for on the hub for half a
# minute. Set before anything imports huggingface_hub, which reads it then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["tests.fault_rows"]

# The same examples on every machine, however slow it is at the moment.
settings.register_profile("ours", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """An empty log of run "test" in a file of its own."""
    with open_log(f"sqlite:///{tmp_path}/log.db", run="test", max_record_bytes=2**20, max_blob_bytes=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def ranks() -> Iterator["Ranks"]:
    """The only rank of a learner in this process."""
    from learner.ranks import connect

    with connect(1, {}) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def deepspeed_ranks() -> Iterator["Ranks"]:
    """The same for an engine. DeepSpeed forgets it on the way out, so that the next module may have one too."""
    import deepspeed

    from learner.ranks import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # the engine sets it for DeepSpeed: what trains in later tests is no rank
        yield connect(1, {})
        deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """One plaintext Kafka broker for all tests of the session, started when the first one asks for it.

    KAFKA_BOOTSTRAP names a person's own broker instead.
    """
    own = os.environ.get("KAFKA_BOOTSTRAP")
    if own:
        yield Address(own)
        return
    with _cluster(tmp_path_factory, "plaintext") as cluster:
        yield Address(cluster.bootstrap)


@pytest.fixture(scope="session")
def scram_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A broker with TLS and ACLs for all tests of the session: a user per role, by SCRAM (password ROLE-secret) or by
    a token."""
    with _cluster(tmp_path_factory, "tls_scram") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def mtls_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A broker with mutual TLS and ACLs for all tests of the session; its authority issues what a test asks for."""
    with _cluster(tmp_path_factory, "mtls") as cluster:
        yield cluster


def _cluster(tmp_path_factory: pytest.TempPathFactory, security: Security) -> Cluster:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    users = {name: f"{name}-secret" for name in (*ROLES, "stranger")}
    settings = {"group.min.session.timeout.ms": "1000"}  # so that a member's death is noticed in a test's time
    return Cluster(tmp_path_factory.mktemp("kafka"), security=security, users=users, settings=settings)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An object store for all tests of the session; each test makes a bucket of its own."""
    with S3Server() as server, served_here(server):
        yield server
