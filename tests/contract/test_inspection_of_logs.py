"""What looks into a log, on either backend: it uses nothing but the protocol."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.export import export
from deploy.redrive import Wanted, carry_out, plan
from deploy.replay import replay
from deploy.trace import trace
from streaming import topics
from streaming.audit import audit_log
from streaming.books import carry, newest_carried
from streaming.config import KafkaConfig, LogConfig
from streaming.log import open_log
from streaming.log.kafka_topics import differences, wanted_topics
from streaming.log.protocol import Log, Output
from streaming.records import encode
from streaming.stage import dead_letter
from tests.builders import make_entry, make_feedback, make_group, make_prompt
from tests.kafka_cluster import Address
from tests.recorded import append, record_request, record_step
from tests.unit.test_replay import config


@pytest.fixture(params=["sqlite", "kafka"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    run = f"look-{uuid.uuid4().hex[:8]}"
    url, settings = f"sqlite:///{tmp_path}/log.db", KafkaConfig(replication_factor=1, min_insync_replicas=1)
    if request.param == "kafka":
        address: Address = request.getfixturevalue("kafka")
        url = f"kafka://{address.bootstrap}"
        cluster = LogConfig(url=url, kafka=settings)
        differences(cluster, wanted_topics(topics.all_topics("policy"), run, cluster), create=True)
    with open_log(url, run=run, max_record_bytes=2**20, max_bytes=2**30, kafka=settings) as opened:
        yield opened


def test_a_recorded_run_is_traced_exported_replayed_redriven_and_audited(log: Log, tmp_path: Path) -> None:
    pairs = [record_request(log, number) for number in range(12)]
    for pair in pairs[:8]:
        assert pair is not None
        record_step(log, pair, step=pair.request_number)
    assert pairs[5] is not None and pairs[5].pair_id
    [found] = trace(log, ["policy"], pairs[5].pair_id[:12])
    assert found.step is not None and found.step.step == 5
    assert found.asked is not None and found.group is not None and found.scored is not None
    [found] = trace(log, ["policy"], "11")
    assert found.pair is not None and found.ending is None

    written = export(log, "policy", tmp_path / "pairs.jsonl")
    assert (list(written.files.values()), written.num_untrained) == ([8], 4)
    settings = config(tmp_path)
    assert replay(log, settings, settings.every_policy[0], settings, "candidates", None).num_groups == 12

    request = make_prompt(12)
    append(log, "prompts", request.prompt_id, request)
    group = make_group(request=request)
    lost = append(log, "candidates", group.group_id, group)
    entry = make_entry(group, topic="candidates", partition=lost.partition, offset=lost.offset)
    log.append([dead_letter(entry, "MemoryError: full", "scorer")])
    append(log, "feedback", group.group_id, make_feedback(12, ending="dead_lettered", stage="scorer", reason="failed"))
    with log.subscribe("scorer", ["candidates"]) as consumer:
        while not consumer.positions():
            consumer.read(max_records=1, timeout_s=1)
        consumer.commit(log.end_offsets("candidates"))
    assert audit_log(log, policy="policy").not_ended == [8, 9, 10, 11]
    assert carry_out(log, plan(log, ["policy"], Wanted())) == 1
    assert [one.left for one in plan(log, ["policy"], Wanted())] == ["it went before"]
    assert audit_log(log, policy="policy").not_ended == [8, 9, 10, 11, 12]

    before = audit_log(log, policy="policy")
    carry(log, ["policy"])
    for topic in ("prompts", "feedback"):
        log.trim(log.end_offsets(topic))
    after = audit_log(log, policy="policy")
    assert (after.endings, after.not_ended) == (before.endings, before.not_ended)
    assert after.is_whole and newest_carried(log, "policy") is not None
    log.append([Output("feedback", b"k", encode(make_feedback(12, step=3)))])
    assert audit_log(log, policy="policy").count("trained") == 9
