"""deploy/compose.yaml, as far as it can be held to its promises without Docker."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kafka_cluster import Cluster, free_ports, why_not

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_pinned_watched_and_keeps_its_data(name: str) -> None:
    service = SERVICES[name]
    tag = service["image"].rpartition(":")[2]
    assert tag != "latest" and any(part.isdigit() for part in tag.split("."))
    assert service["healthcheck"]["test"][0] == "CMD"
    assert [volume for volume in service["volumes"] if volume.split(":")[0] in COMPOSE["volumes"]]


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_listens_beyond_loopback(name: str) -> None:
    service = SERVICES[name]
    if service.get("network_mode") == "host":
        options = [*service.get("command", []), *service.get("environment", {}).values()]
        assert [option for option in options if "127.0.0.1" in option]
    else:
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_file_that_is_mounted_is_there(name: str) -> None:
    for volume in SERVICES[name]["volumes"]:
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or any((ROOT / "deploy" / source).iterdir())


def test_the_brokers_settings_start_a_broker(tmp_path: Path) -> None:
    """The image makes `a.b` of KAFKA_A_B; ports and folder are this test's own."""
    if why_not():
        pytest.skip(str(why_not()))
    cluster = Cluster(tmp_path)
    ports = {"9092": cluster.internal.rpartition(":")[2], "9093": str(cluster.ports[0]), "9094": str(free_ports(1)[0])}
    for name, value in SERVICES["kafka"]["environment"].items():
        for port, own in ports.items():
            value = value.replace(f":{port}", f":{own}")
        if name.startswith("KAFKA_"):
            cluster.settings[name.removeprefix("KAFKA_").lower().replace("_", ".")] = value
    cluster.settings["log.dirs"] = str(tmp_path / "data")
    with cluster:
        server = f"localhost:{ports['9092']}"
        assert cluster.tool("org.apache.kafka.tools.TopicCommand", "--bootstrap-server", server, "--list").strip() == ""
