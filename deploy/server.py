"""A role's HTTP endpoint: /metrics for Prometheus, /healthz for probes. Loopback unless the settings say otherwise.

listening (from construction) -> closed
"""

import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client.exposition import choose_encoder

from streaming.errors import NotReadyError
from streaming.metrics import Metrics
from streaming.records import RoleState

HEALTHY = frozenset({"starting", "ready", "degraded", "stopping"})
"""Health at which a probe passes: a degraded role works, and a restart would not mend it."""

_POLL_S = 0.05
"""How often the listening thread looks whether it shall stop."""


class MetricsServer:
    """Serves one role's metrics until it is closed. `address` is where: http://HOST:PORT."""

    def __init__(self, metrics: Metrics, state: Callable[[], RoleState], *, host: str, port: int | None) -> None:
        handler = _handler(metrics, state)
        try:
            self._server = ThreadingHTTPServer((host, port or 0), handler)
        except OSError as cause:
            raise NotReadyError(
                f"the metrics endpoint cannot listen on {host}:{port or 0}: {cause.strerror or cause}",
                where="metrics.port",
                do="Choose another port, or leave metrics.port out: then each role takes a free one.",
            ) from cause
        self._server.daemon_threads = True
        self.address = f"http://{_printable(host)}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _printable(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _handler(metrics: Metrics, state: Callable[[], RoleState]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                metrics.time.seconds()  # brings the seconds of the present state up to now
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, content_type, encode(metrics.registry))
            elif path == "/healthz":
                now = state()
                status = HTTPStatus.OK if now.health in HEALTHY else HTTPStatus.SERVICE_UNAVAILABLE
                body = {"role": now.role_id, "health": now.health, "message": now.message}
                self._answer(status, "application/json", json.dumps(body).encode())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics and /healthz are here\n")

        def log_message(self, format: str, *args: object) -> None:
            """A scrape every few seconds is not worth a line in the role's log."""

        def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
