"""A reader that is slower than its writers holds little of what waits for it, however much that is."""

import os
import resource
import sys
import threading
from pathlib import Path

import pytest

from streaming.config import KafkaConfig
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import Log, Output
from tests.fault_rows import Injected
from tests.learner_process import CONTEXT, PATIENCE_S
from tests.log_process import LONG_LEASE_S, MAX_RECORD_BYTES, open_test_log

pytestmark = [pytest.mark.slow, pytest.mark.fault("slow consumer")]

NUM_RECORDS = 256
RECORD_BYTES = 256 * 1024
WAITING_BYTES = NUM_RECORDS * RECORD_BYTES

MOST_BYTES = WAITING_BYTES // 3
"""What a reader may grow by: a few fetches, and whatever the allocator makes of them."""

FETCH_BYTES = 256 * 1024

NUM_READ = 20
BETWEEN_S = 0.05
"""Between two records: in this second a reader without a bound has fetched everything."""


def crawl(url: str, run: str, growth: Path) -> None:
    """Read some records slowly, one by one, and write down by how much this process has grown at most."""
    with open_slow_log(url, run) as log:
        before = most_bytes()
        consumer = log.subscribe("slow", ["in"])
        num = 0
        while num < NUM_READ:
            num += len(consumer.read(max_records=1, timeout_s=5))
            threading.Event().wait(BETWEEN_S)
        consumer.close()
        growth.write_text(str(most_bytes() - before))


def open_slow_log(url: str, run: str) -> Log:
    if url.startswith("sqlite"):
        return open_test_log(url, run, lease_s=LONG_LEASE_S)
    return KafkaLog(url, run=run, max_record_bytes=MAX_RECORD_BYTES, config=KafkaConfig(fetch_bytes=FETCH_BYTES))


def most_bytes() -> int:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


@pytest.mark.parametrize("backend", ["sqlite", "kafka"])
def test_a_slow_reader_holds_little_of_what_waits(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest, injected: Injected
) -> None:
    url, run = f"sqlite:///{tmp_path}/log.db", "slow"
    if backend == "kafka":
        url = f"kafka://{request.getfixturevalue('kafka').bootstrap}"
        make_topic(url.removeprefix("kafka://"), run)
    with open_test_log(url, run, lease_s=LONG_LEASE_S) as log:
        fill(log)
    process = CONTEXT.Process(target=crawl, args=(url, run, tmp_path / "growth"))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    injected(injected=1)
    assert int((tmp_path / "growth").read_text()) < MOST_BYTES


def fill(log: Log) -> None:
    """No record is like another, so that none becomes small on its way."""
    for first in range(0, NUM_RECORDS, 16):
        log.append([Output("in", b"%d" % i, os.urandom(RECORD_BYTES)) for i in range(first, first + 16)])


def make_topic(servers: str, run: str) -> None:
    from kafka import KafkaAdminClient

    with KafkaAdminClient(bootstrap_servers=servers) as admin:
        admin.create_topics({f"{run}.in": {"num_partitions": 4, "replication_factor": 1}})
