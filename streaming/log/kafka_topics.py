"""The topics of a run on a Kafka cluster: what each has to look like, what differs, and how it is mended.

`wanted_topics` and `compare` are values in, values out; `differences` talks to the cluster. Creates what is missing
when asked to; never changes or deletes a topic that is there.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import (
    InvalidReplicationFactorError,
    KafkaError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)

from streaming import topics
from streaming.config import LogConfig
from streaming.errors import NotReadyError
from streaming.log.kafka_client import bootstrap_servers, client_settings
from streaming.topics import Topic

WORK = {topics.PROMPTS.name, topics.CANDIDATES.name, topics.SCORED.name}
"""Shared out among processes that come and go: each needs a partition of its own."""

CHECKPOINTED_PARTITIONS = 8
"""Of pairs and feedback: their offsets lie in checkpoints, so their number must never have to grow."""

ENVELOPE_BYTES = 64 * 1024
"""What a batch of one record takes beside its value at most: key, headers, and a compression that gains nothing."""

SEGMENT_S = 3600
"""Kafka compacts closed segments only, and closes one a week by default: readers of a compacted topic, who start at
its beginning, would go through a week of heartbeats."""

CREATE_S = 60
"""How long the cluster may take to create topics."""

FOR_EVER = -1
"""Kafka's word for no limit of retention."""

Rule = Literal["exactly", "at least", "at most"]


class Setting(NamedTuple):
    """What a topic's setting has to be."""

    name: str
    value: str
    rule: Rule = "exactly"

    def holds(self, found: str) -> bool:
        if self.rule == "exactly":
            return found == self.value
        if self.rule == "at most":
            return int(found) <= int(self.value)
        return int(found) == FOR_EVER or (int(self.value) != FOR_EVER and int(found) >= int(self.value))


class Wanted(NamedTuple):
    """A topic as it has to be. `is_ordered`: its records keep one order over all keys, so it has one partition."""

    name: str
    partitions: int
    replication_factor: int
    settings: tuple[Setting, ...]

    @property
    def is_ordered(self) -> bool:
        return self.partitions == 1


class Found(NamedTuple):
    """A topic as it is. `settings` is None where the user may not see them."""

    partitions: int
    replication_factor: int
    settings: Mapping[str, str] | None


class Difference(NamedTuple):
    """One thing to mend."""

    topic: str
    setting: str
    found: str
    wanted: str
    mend: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.setting} is {self.found}, wanted {self.wanted}\n    {self.mend}"


def topic_name(run: str, topic: str) -> str:
    """A topic's name in the cluster: two runs on one cluster never mix."""
    return f"{run}.{topic}"


def wanted_topics(rows: Iterable[Topic], run: str, config: LogConfig) -> list[Wanted]:
    """Every topic of a run as its settings want it."""
    return [_wanted(row, run, config) for row in rows]


def _wanted(row: Topic, run: str, config: LogConfig) -> Wanted:
    if row.name in WORK:
        partitions = config.kafka.partitions
    elif row.name == topics.FEEDBACK.name or row.name.startswith("pairs."):
        partitions = CHECKPOINTED_PARTITIONS
    else:
        partitions = row.partitions
    retention_ms = FOR_EVER if row.retention_s is None else row.retention_s * 1000
    settings = [
        Setting("cleanup.policy", "compact" if row.compacted else "delete"),
        Setting("max.message.bytes", str(config.max_record_bytes + ENVELOPE_BYTES), "at least"),
        Setting("min.insync.replicas", str(config.kafka.min_insync_replicas), "at least"),
        Setting("retention.ms", str(retention_ms), "at least"),
        Setting("retention.bytes", str(FOR_EVER)),
        Setting("unclean.leader.election.enable", "false"),
        # The broker's clock: with the writer's, a clock that jumps makes records go early or brokers refuse them.
        Setting("message.timestamp.type", "LogAppendTime"),
    ]
    if row.compacted:
        settings.append(Setting("segment.ms", str(SEGMENT_S * 1000), "at most"))
    return Wanted(topic_name(run, row.name), partitions, config.kafka.replication_factor, tuple(settings))


def compare(wanted: Wanted, found: Found | None, *, servers: str) -> list[Difference]:
    """What differs between a topic as it should be and as it is (None: it is not there); empty where all is well."""
    if found is None:
        return [Difference(wanted.name, "topic", "missing", "a topic", "streamdpo check CONFIG --create-topics")]
    differences = _compare_shape(wanted, found, servers)
    for setting in wanted.settings if found.settings is not None else ():
        value = (found.settings or {}).get(setting.name, "unknown to this broker")
        if not value.lstrip("-").isalnum() or not setting.holds(value):
            mend = _configs(servers, wanted.name, f"{setting.name}={setting.value}")
            rule = "" if setting.rule == "exactly" else f"{setting.rule} "
            differences.append(Difference(wanted.name, setting.name, value, f"{rule}{setting.value}", mend))
    return differences


def _compare_shape(wanted: Wanted, found: Found, servers: str) -> list[Difference]:
    differences = []
    partitions = Difference(wanted.name, "partitions", str(found.partitions), f"at least {wanted.partitions}", "")
    if wanted.is_ordered and found.partitions != 1:
        mend = "Kafka takes no partition away: with the run stopped, delete the topic and create it again."
        differences.append(partitions._replace(wanted="1", mend=mend))
    elif found.partitions < wanted.partitions:
        command = f"kafka-topics.sh --bootstrap-server {servers} --alter --topic {wanted.name}"
        mend = f"With the run stopped (keys move to other partitions): {command} --partitions {wanted.partitions}"
        differences.append(partitions._replace(mend=mend))
    if found.replication_factor < wanted.replication_factor:
        mend = f"kafka-reassign-partitions.sh --bootstrap-server {servers} --execute --reassignment-json-file FILE "
        mend += f"(every partition of {wanted.name} on {wanted.replication_factor} brokers)"
        found_wanted = (str(found.replication_factor), f"at least {wanted.replication_factor}")
        differences.append(Difference(wanted.name, "replication factor", *found_wanted, mend))
    in_sync = (found.settings or {}).get("min.insync.replicas")
    if in_sync is not None and int(in_sync) > found.replication_factor:
        mend = _configs(servers, wanted.name, f"min.insync.replicas={found.replication_factor}")
        most = f"at most {found.replication_factor}, its replication factor: every append would wait for ever"
        differences.append(Difference(wanted.name, "min.insync.replicas", in_sync, most, mend))
    return differences


def _configs(servers: str, topic: str, setting: str) -> str:
    command = f"kafka-configs.sh --bootstrap-server {servers} --alter --entity-type topics --entity-name {topic}"
    return f"{command} --add-config {setting}"


def differences(config: LogConfig, wanted: Sequence[Wanted], *, create: bool) -> tuple[list[str], list[Difference]]:
    """Look at the topics of a cluster: the names of those created, where `create` is set, and what differs then.

    A topic that this user may not see differs in nothing. Raises NotReadyError where the cluster does not answer.
    """
    servers = ",".join(bootstrap_servers(config.url))
    try:
        with open_admin(config) as admin:
            created = create_topics(admin, wanted) if create else []
            found = read_topics(admin, [topic.name for topic in wanted])
    except KafkaError as cause:
        raise NotReadyError(f"no answer: {cause!r}", where=config.url, do="Look at the brokers' logs.") from cause
    differing = [compare(topic, found[topic.name], servers=servers) for topic in wanted if topic.name in found]
    return created, [one for several in differing for one in several]


def open_admin(config: LogConfig) -> KafkaAdminClient:
    """A client for administration: a context manager. Raises KafkaError where no broker answers."""
    return KafkaAdminClient(**client_settings(config.url, config.kafka))


def read_topics(admin: KafkaAdminClient, names: Sequence[str]) -> dict[str, Found | None]:
    """The topics among `names` that this user may see; None for one that is not there."""
    described = {topic["name"]: topic for topic in admin.describe_topics(list(names))}
    there = [name for name, topic in described.items() if not topic["error_code"]]
    settings = _read_settings(admin, there)
    found: dict[str, Found | None] = {
        name: None for name, topic in described.items() if for_code(topic["error_code"]) is UnknownTopicOrPartitionError
    }
    for name in there:
        partitions = described[name]["partitions"]
        copies = min(len(partition["replica_nodes"]) for partition in partitions)
        found[name] = Found(len(partitions), copies, settings.get(name))
    return found


def longest_kept_s(config: LogConfig, run: str, rows: Sequence[Topic]) -> dict[str, float | None]:
    """By topic, how long a record may stay at most: its retention, and as long as its segment still grows before.

    None: for ever. Without the topics whose settings this user may not see. Raises NotReadyError where the cluster does
    not answer.
    """
    try:
        with open_admin(config) as admin:
            found = read_topics(admin, [topic_name(run, row.name) for row in rows])
    except KafkaError as cause:
        raise NotReadyError(f"no answer: {cause!r}", where=config.url, do="Look at the brokers' logs.") from cause
    seen = {row.name: one.settings for row in rows if (one := found.get(topic_name(run, row.name))) is not None}
    return {name: _longest_kept_s(settings) for name, settings in seen.items() if settings}


def _longest_kept_s(settings: Mapping[str, str]) -> float | None:
    """Kafka deletes whole segments, when their newest record is past retention."""
    retention_ms = int(settings["retention.ms"])
    return None if retention_ms == FOR_EVER else (retention_ms + int(settings["segment.ms"])) / 1000


def _read_settings(admin: KafkaAdminClient, names: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """By topic; without those whose settings this user may not see."""
    if not names:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    described = admin.describe_configs(resources, config_filter="all").get("topic", {})
    return {
        name: {key: str(entry["value"]) for key, entry in entries.items()}
        for name, entries in described.items()
        if entries  # a refused topic comes back without an entry
    }


def create_topics(admin: KafkaAdminClient, wanted: Iterable[Wanted]) -> list[str]:
    """Create these topics and return the names of those that were not there. Raises NotReadyError where one fails."""
    options = {
        topic.name: {
            "num_partitions": topic.partitions,
            "replication_factor": topic.replication_factor,
            "configs": {setting.name: setting.value for setting in topic.settings},
        }
        for topic in wanted
    }
    if not options:
        return []
    answer = admin.create_topics(options, timeout_ms=CREATE_S * 1000, raise_errors=False)
    errors = {one["name"]: (for_code(one["error_code"]), one["error_message"]) for one in answer["topics"]}
    failed = {
        name: f"{error.__name__}: {message}"
        for name, (error, message) in errors.items()
        if issubclass(error, KafkaError) and error is not TopicAlreadyExistsError and error.errno
    }
    if failed:
        kinds = {error for error, _ in errors.values()}
        what = "not created:\n" + "\n".join(f"{name}: {message}" for name, message in failed.items())
        raise NotReadyError(what, where="topics", do=_advice(kinds))
    created = [name for name, (error, _) in errors.items() if error is not TopicAlreadyExistsError]
    if created:
        admin.wait_for_topics(created, timeout_ms=CREATE_S * 1000)
    return created


def _advice(kinds: set[type[KafkaError]]) -> str:
    if TopicAuthorizationFailedError in kinds:
        return "Create them as a user with the right `create` on the cluster or on topics with this prefix."
    if InvalidReplicationFactorError in kinds:
        return "Lower log.kafka.replication_factor (1 on a cluster of one broker), or start more brokers."
    return "Mend what the brokers say and run it again: what was created stays."
