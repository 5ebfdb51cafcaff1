"""What a run's topics have to look like in a Kafka cluster, compared with what is there."""

from collections.abc import Iterator

import pytest
from kafka import KafkaAdminClient

from streaming import topics
from streaming.config import KafkaConfig, LogConfig
from streaming.errors import NotReadyError
from streaming.log.kafka_topics import Found, Wanted, compare, create_topics, open_admin, read_topics, wanted_topics
from tests.kafka_cluster import Address

ROWS = topics.all_topics("policy")


def config(url: str = "kafka://127.0.0.1:1", *, copies: int = 1, partitions: int = 3) -> LogConfig:
    kafka = KafkaConfig(replication_factor=copies, min_insync_replicas=copies, partitions=partitions)
    return LogConfig(url=url, kafka=kafka)


def wanted(name: str, run: str = "r") -> Wanted:
    return next(topic for topic in wanted_topics(ROWS, run, config(copies=2)) if topic.name == f"{run}.{name}")


def right(topic: Wanted) -> Found:
    settings = {setting.name: setting.value for setting in topic.settings}
    return Found(topic.partitions, topic.replication_factor, settings)


def differing(topic: Wanted, found: Found | None) -> list[str]:
    return [one.setting for one in compare(topic, found, servers="b:1")]


@pytest.fixture
def admin(kafka: Address) -> Iterator[KafkaAdminClient]:
    with open_admin(config(f"kafka://{kafka.bootstrap}")) as client:
        yield client


@pytest.mark.parametrize("topic", wanted_topics(ROWS, "r", config(copies=2)), ids=lambda topic: topic.name)
def test_a_topic_that_is_as_wanted_differs_in_nothing(topic: Wanted) -> None:
    assert differing(topic, right(topic)) == []


def test_a_missing_topic_is_told_with_the_command_that_creates_it() -> None:
    (difference,) = compare(wanted("prompts"), None, servers="b:1")
    assert "--create-topics" in str(difference)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cleanup.policy", "compact"),
        ("cleanup.policy", "compact,delete"),
        ("max.message.bytes", "1048588"),
        ("min.insync.replicas", "1"),
        ("retention.ms", "1000"),
        ("retention.bytes", "1000000"),
        ("unclean.leader.election.enable", "true"),
        ("message.timestamp.type", "CreateTime"),
    ],
)
def test_a_setting_that_would_lose_records_is_told_with_its_command(setting: str, value: str) -> None:
    topic = wanted("pairs.policy")
    found = right(topic)
    bad = found._replace(settings={**(found.settings or {}), setting: value})
    (difference,) = compare(topic, bad, servers="b:1")
    assert difference[:3] == ("r.pairs.policy", setting, value)
    value_wanted = difference.wanted.removeprefix("at least ")
    assert difference.mend.endswith(f"--entity-name r.pairs.policy --add-config {setting}={value_wanted}")


@pytest.mark.parametrize(("setting", "value"), [("retention.ms", "-1"), ("max.message.bytes", "99999999")])
def test_a_setting_that_keeps_more_than_wanted_is_fine(setting: str, value: str) -> None:
    found = right(wanted("pairs.policy"))
    assert differing(wanted("pairs.policy"), found._replace(settings={**(found.settings or {}), setting: value})) == []


def test_records_that_are_kept_for_ever_may_not_be_kept_for_less() -> None:
    found = right(wanted("weights"))
    shorter = found._replace(settings={**(found.settings or {}), "retention.ms": "99999999999"})
    assert differing(wanted("weights"), shorter) == ["retention.ms"]


def test_too_few_partitions_and_copies_are_told() -> None:
    topic = wanted("prompts")
    assert differing(topic, right(topic)._replace(partitions=2)) == ["partitions"]
    assert differing(topic, right(topic)._replace(replication_factor=1)) == [
        "replication factor",
        "min.insync.replicas",
    ]
    assert differing(topic, right(topic)._replace(partitions=9, replication_factor=3)) == []


def test_a_topic_with_one_order_may_not_have_a_second_partition() -> None:
    assert differing(wanted("weights"), right(wanted("weights"))._replace(partitions=2)) == ["partitions"]


def test_settings_that_the_user_may_not_see_are_not_told_as_wrong() -> None:
    assert differing(wanted("prompts"), right(wanted("prompts"))._replace(settings=None)) == []


def test_created_topics_are_as_wanted_and_are_created_once(admin: KafkaAdminClient, kafka: Address) -> None:
    all_wanted = wanted_topics(ROWS, "created-once", config())
    names = [topic.name for topic in all_wanted]
    assert sorted(create_topics(admin, all_wanted)) == sorted(names)
    assert create_topics(admin, all_wanted) == []
    found = read_topics(admin, names)
    assert [differing(topic, found.get(topic.name)) for topic in all_wanted] == [[]] * len(all_wanted)


def test_a_topic_that_someone_else_made_differs_where_it_does(admin: KafkaAdminClient) -> None:
    admin.create_topics({"other.weights": {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
    (topic,) = wanted_topics([topics.WEIGHTS], "other", config())
    found = read_topics(admin, ["other.weights", "other.prompts"])
    assert found["other.prompts"] is None
    assert differing(topic, found["other.weights"]) == [
        "partitions",
        "cleanup.policy",
        "max.message.bytes",
        "retention.ms",
        "message.timestamp.type",
        "segment.ms",
    ]


def test_more_copies_than_brokers_are_refused_with_advice(admin: KafkaAdminClient) -> None:
    with pytest.raises(NotReadyError, match=r"few\.prompts(.|\n)*log\.kafka\.replication_factor"):
        create_topics(admin, wanted_topics([topics.PROMPTS], "few", config(copies=2)))
