"""What `streamdpo check` finds out about the log of a run, on the command line and against real brokers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.check_log import log_checks
from deploy.cli import execute
from deploy.config import RunConfig, load_config
from streaming.errors import ConfigError, StreamDPOError
from streaming.log.kafka_acls import ROLES
from streaming.log.kafka_topics import open_admin
from streaming.topics import all_topics
from tests.builders import LEAST
from tests.kafka_cluster import Address, free_ports

NUM_TOPICS = len(all_topics("policy"))


def run_on(folder: Path, name: str, servers: str, **kafka: Any) -> Path:
    """A run's file; nothing of it but the log is there."""
    copies = {"replication_factor": 1, "min_insync_replicas": 1}
    settings = {
        **LEAST,
        "name": name,
        "model": "nowhere/model",
        "generation": {"engine": {"kind": "transformers"}},
        "log": {"url": f"kafka://{servers}", "kafka": {**copies, **kafka}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def looked_at(config: RunConfig, **options: Any) -> dict[str, str]:
    """What was found, or the error, by subject."""
    found = {}
    for subject, check in log_checks(config, **options):
        try:
            found[subject] = check()
        except StreamDPOError as error:
            found[subject] = f"{type(error).__name__}: {error}"
    return found


def test_missing_topics_are_told_and_created_when_asked_to(tmp_path: Path, kafka: Address) -> None:
    config = load_config(run_on(tmp_path, "create", kafka.bootstrap))
    missing = looked_at(config)["topics"]
    assert "not there: create.prompts, create.candidates" in missing
    assert "streamdpo check CONFIG --create-topics" in missing
    assert looked_at(config, create_topics=True)["topics"].startswith(
        f"{NUM_TOPICS} as wanted, created: create.prompts"
    )
    assert looked_at(config)["topics"] == f"{NUM_TOPICS} as wanted, none created"


def test_a_topic_that_differs_is_told_with_the_command_that_mends_it(tmp_path: Path, kafka: Address) -> None:
    config = load_config(run_on(tmp_path, "differ", kafka.bootstrap))
    with open_admin(config.log) as admin:
        admin.create_topics({"differ.weights": {"num_partitions": 1}}, wait_for_metadata=True)
    text = looked_at(config, create_topics=True)["topics"]
    assert "differ.weights: cleanup.policy is delete, wanted compact\n" in text
    assert "--entity-name differ.weights --add-config cleanup.policy=compact" in text
    assert "not there" not in text


def test_a_cluster_that_cannot_be_used_is_told_once(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    found = looked_at(load_config(run_on(tmp_path, "nowhere", f"127.0.0.1:{port}")))
    assert list(found) == ["log"]
    assert "connection refused" in found["log"]


def test_rights_are_asked_for_every_role_or_for_one(tmp_path: Path, kafka: Address) -> None:
    config = load_config(run_on(tmp_path, "rights", kafka.bootstrap))
    looked_at(config, create_topics=True)
    assert looked_at(config)["rights"].endswith("for every role")
    assert looked_at(config, role="scorer")["rights"].endswith("for scorer")
    assert "Name one of: scheduler" in looked_at(config, role="scorre")["rights"]


def test_the_command_line_creates_topics_and_says_so(tmp_path: Path, kafka: Address, capsys: Any) -> None:
    execute(["check", str(run_on(tmp_path, "command", kafka.bootstrap)), "--create-topics"])
    assert f"ok    topics: {NUM_TOPICS} as wanted, created: command.prompts" in capsys.readouterr().out


def test_the_command_line_prints_the_rights_of_each_role(tmp_path: Path, capsys: Any) -> None:
    assert execute(["check", str(run_on(tmp_path, "mine", "broker:9092")), "--show-acls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("# ") for line in lines if line.startswith("#")] == list(ROLES)
    assert (
        "kafka-acls.sh --bootstrap-server broker:9092 --add --allow-principal User:scorer --operation Read "
        "--topic mine.candidates --topic mine.scored --topic mine.dead-letter --topic mine.prompts "
        "--topic mine.feedback --topic mine.weights --topic mine.roles --group mine.scorer"
    ) in lines


def test_a_url_that_names_no_log_is_refused(tmp_path: Path) -> None:
    config = load_config(run_on(tmp_path, "none", "broker:9092"), ["log.url=redis://here"])
    with pytest.raises(ConfigError, match="redis://here"):
        dict(log_checks(config))["log"]()
