import urllib.error
import urllib.request

import pytest

from deploy.server import MetricsServer
from streaming.errors import NotReadyError
from streaming.metrics import Metrics
from streaming.records import RoleState


def state(health: str = "ready") -> RoleState:
    return RoleState(role="scorer", role_id="scorer-0", pid=1, host="h", time_s=0.0, health=health)  # type: ignore[arg-type]


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_are_served_with_the_seconds_up_to_now():
    metrics = Metrics("scorer")
    metrics.count("dead_letters_total", stage="scorer")
    with MetricsServer(metrics, state, host="127.0.0.1", port=None) as server:
        status, body = get(server.address + "/metrics")
    assert server.address.startswith("http://127.0.0.1:")
    assert status == 200
    assert 'streamdpo_dead_letters_total{role="scorer",stage="scorer"} 1.0' in body
    assert 'streamdpo_role_seconds_total{role="scorer",state="waiting"}' in body


@pytest.mark.parametrize(("health", "status"), [("ready", 200), ("starting", 200), ("degraded", 200), ("failed", 503)])
def test_a_probe_fails_only_where_the_role_failed(health, status):
    with MetricsServer(Metrics("scorer"), lambda: state(health), host="127.0.0.1", port=None) as server:
        assert get(server.address + "/healthz")[0] == status


def test_an_unknown_path_is_not_found():
    with MetricsServer(Metrics("scorer"), state, host="127.0.0.1", port=None) as server:
        assert get(server.address + "/else")[0] == 404


def test_a_taken_port_is_named_with_the_setting_to_change():
    with MetricsServer(Metrics("scorer"), state, host="127.0.0.1", port=None) as first:
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(NotReadyError, match=rf"metrics.port: .*127.0.0.1:{port}"):
            MetricsServer(Metrics("scorer"), state, host="127.0.0.1", port=port)
