"""Whatever brokers and network do, what the log acknowledged is read once more or once, in order, and never lost.

The short form is part of the test suite. STREAMDPO_FAULTS=long adds outages of 20 and 120 s, and a broker that stands
still.
"""

import itertools
import os
import threading
from collections.abc import Iterator

import pytest

from streaming import topics
from streaming.config import KafkaConfig, LogConfig
from streaming.log.kafka_topics import differences, wanted_topics
from tests.fault_rows import Injected
from tests.kafka_cluster import Cluster, free_ports, why_not
from tests.tcp_proxy import TcpProxy
from tests.traffic import Traffic

pytestmark = [pytest.mark.slow, pytest.mark.fault("broker", backend="kafka")]

LONG = os.environ.get("STREAMDPO_FAULTS") == "long"
LONG_ONLY = pytest.mark.skipif(not LONG, reason="takes minutes: set STREAMDPO_FAULTS=long")
RUNS = itertools.count()

QUICKLY_MISSED = {"broker.session.timeout.ms": "4000", "broker.heartbeat.interval.ms": "500"}
"""A killed broker comes back when its old session is over: that of Kafka's own settings takes 9 s."""


def traffic(cluster: Cluster) -> Traffic:
    """Of a run of its own, whose topics are made first."""
    copies = min(3, cluster.num_brokers)
    kafka = KafkaConfig(
        replication_factor=copies,
        min_insync_replicas=min(2, copies),
        partitions=4,
        request_timeout_s=5,
        session_timeout_s=10,
        delivery_timeout_s=240,
    )
    config = LogConfig(url=f"kafka://{cluster.bootstrap}", kafka=kafka)
    run = f"faults-{next(RUNS)}"
    differences(config, wanted_topics([topics.PROMPTS], run, config), create=True)
    return Traffic(config.url, run, kafka)


def stand_still(seconds: float) -> None:
    """The length of an outage is the fault itself, so this waits by the clock."""
    threading.Event().wait(seconds)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one broker."""
    if why_not():
        pytest.skip(str(why_not()))
    with Cluster(tmp_path_factory.mktemp("one")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three brokers: three copies of each record, of which two have to hold it."""
    if why_not():
        pytest.skip(str(why_not()))
    with Cluster(tmp_path_factory.mktemp("three"), 3, settings=QUICKLY_MISSED) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def behind_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, TcpProxy]]:
    """A broker that clients reach through a proxy only."""
    if why_not():
        pytest.skip(str(why_not()))
    (port,) = free_ports(1)
    cluster = Cluster(tmp_path_factory.mktemp("proxy"), advertised=[port])
    with TcpProxy(("127.0.0.1", cluster.ports[0]), listen=("127.0.0.1", port)) as proxy, cluster:
        yield cluster, proxy


@pytest.mark.parametrize("down_s", [5, pytest.param(20, marks=LONG_ONLY), pytest.param(120, marks=LONG_ONLY)])
def test_a_broker_that_is_killed_and_comes_back_loses_nothing(one: Cluster, down_s: float, injected: Injected) -> None:
    with traffic(one) as flow:
        flow.recovered()
        one.kill(0)
        stand_still(down_s)
        one.restart(0)
        injected(f"broker down for {down_s} s", recovery_s=flow.recovered())
        verdict = flow.stop()
    assert verdict.is_good, verdict


@LONG_ONLY
def test_a_broker_that_stands_still_loses_nothing(one: Cluster, injected: Injected) -> None:
    with traffic(one) as flow:
        flow.recovered()
        one.pause(0)
        stand_still(15)
        one.resume(0)
        injected("broker stands still for 15 s", recovery_s=flow.recovered())
        verdict = flow.stop()
    assert verdict.is_good, verdict


def test_each_of_three_brokers_killed_in_turn_loses_nothing(three: Cluster, injected: Injected) -> None:
    with traffic(three) as flow:
        flow.recovered()
        for i in range(3):
            three.kill(i)
            injected("each of three brokers killed in turn", recovery_s=flow.recovered())
            three.restart(i)
            three.wait_in_sync()
        flow.recovered()
        verdict = flow.stop()
    assert verdict.is_good, verdict


@LONG_ONLY
def test_a_rolling_restart_loses_nothing(three: Cluster, injected: Injected) -> None:
    with traffic(three) as flow:
        flow.recovered()
        for i in range(3):
            three.restart(i)
            injected("rolling restart of three brokers", recovery_s=flow.recovered())
            three.wait_in_sync()
        flow.recovered()
        verdict = flow.stop()
    assert verdict.is_good, verdict


def test_with_two_of_three_brokers_down_appends_wait_and_none_is_lost(three: Cluster, injected: Injected) -> None:
    with traffic(three) as flow:
        flow.recovered()
        three.kill(0)
        three.kill(1)
        flow.has_stopped_for(2)  # what was on its way
        assert flow.has_stopped_for(15 if LONG else 5)
        three.restart_all(0, 1)
        injected("two of three brokers down", recovery_s=flow.recovered())
        verdict = flow.stop()
    three.wait_in_sync()
    assert verdict.is_good, verdict


def test_lost_acknowledgements_lose_nothing(behind_proxy: tuple[Cluster, TcpProxy], injected: Injected) -> None:
    cluster, proxy = behind_proxy
    with traffic(cluster) as flow:
        flow.recovered()
        for _ in range(3):
            before = proxy.num_dropped_bytes
            proxy.drop_answers()
            assert flow.has_stopped_for(2)
            proxy.mend()
            assert proxy.num_dropped_bytes > before
            injected("acknowledgements lost", recovery_s=flow.recovered())
        verdict = flow.stop()
    assert verdict.is_good, verdict


def test_a_network_that_breaks_and_crawls_loses_nothing(
    behind_proxy: tuple[Cluster, TcpProxy], injected: Injected
) -> None:
    cluster, proxy = behind_proxy
    with traffic(cluster) as flow:
        flow.recovered()
        for _ in range(5):
            proxy.break_connections()
            injected("network breaks or crawls", recovery_s=flow.recovered(50))
        proxy.cut()
        stand_still(3)
        proxy.mend()
        injected("network breaks or crawls", recovery_s=flow.recovered(50))
        proxy.delay(0.1)
        injected("network breaks or crawls", recovery_s=flow.recovered(50))
        proxy.mend()
        verdict = flow.stop()
    assert verdict.is_good, verdict
