"""What `streamdpo forget` can delete on a cluster, and what it says of the rest: the other half of unit/test_forget."""

import os
import time
from pathlib import Path

from kafka import KafkaAdminClient

from deploy.config import load_config
from deploy.forget import forget, told
from streaming import topics
from streaming.log import open_log
from streaming.log.protocol import Output
from streaming.records import DeadLetter, Source, encode
from tests.builders import make_group, make_prompt
from tests.kafka_cluster import Address

DAY_MS = topics.DAY_S * 1000


def test_on_a_cluster_blobs_are_deleted_and_the_rest_is_kept_until_a_date(kafka: Address, tmp_path: Path) -> None:
    """The date left out that a segment is deleted as a whole: a week later than retention, with Kafka's defaults."""
    name = f"forget-{os.getpid()}"
    kept = {"prompts": {"retention.ms": 3 * DAY_MS, "segment.ms": 2 * DAY_MS}, "dead-letter": {"retention.ms": -1}}
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap) as admin:
        rows = {f"{name}.{row.name}": row for row in topics.all_topics("policy")}
        admin.create_topics({n: {"num_partitions": 1, "configs": kept.get(row.name, {})} for n, row in rows.items()})
        admin.wait_for_topics(list(rows))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"{{name: {name}, model: model, prompts: {{path: prompts.jsonl}}, rewards: [{{name: a, function: a:b}}],"
        f" log: {{url: 'kafka://{kafka.bootstrap}', blobs: '{tmp_path}/blobs', max_record_bytes: 65536}}}}"
    )
    config, began_s = load_config(path), time.time()
    source = Source(topic="prompts", partition=0, offset=0)
    value = encode(make_prompt(7))
    letter = DeadLetter(stage="generator", source=source, key=b"p7", value=value, reason="r", attempts=1, time_s=0.0)
    settings = config.log
    with open_log(
        settings.url, run=name, blobs=settings.blobs, max_record_bytes=settings.max_record_bytes, kafka=settings.kafka
    ) as log:
        log.append(
            [
                Output("prompts", b"p7", encode(make_prompt(7))),
                Output("dead-letter", b"p7", encode(letter)),
                Output("candidates", b"g", encode(make_group(["a" * 70_000, "b"], number=7))),
            ]
        )
        found = forget(config, "p7", log, tmp_path)
    assert found.deleted == {"candidates": 1}
    assert not [path for path in tmp_path.glob("blobs/**/*") if path.is_file() and b"aaaa" in path.read_bytes()]
    dates = {time.strftime("%Y-%m-%d", time.localtime(s + 6 * topics.DAY_S)) for s in (began_s, time.time())}
    assert {f"1 records of topic prompts: kept until {date} at the longest" for date in dates} & set(found.left)
    assert "NOT deleted: 1 records of topic dead-letter: kept for ever, its retention.ms is -1" in told(found)
