"""A local object store that speaks S3 (moto), in a process of its own, so that it can be away for a while."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

WAIT_S = 60.0


class S3Server:
    """Buckets in memory, behind HTTP, until it is closed."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Begin to serve, with no bucket in it."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up_s = time.monotonic() + WAIT_S
        while time.monotonic() < give_up_s:
            try:
                with urllib.request.urlopen(f"{self.url}/moto-api/"):
                    return
            except OSError:
                assert self._process.poll() is None, "the server ended"
                self._process_is_starting()
        raise AssertionError(f"no answer from {self.url}")

    def make_bucket(self, name: str) -> str:
        """An empty bucket; returns its URL."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT")):
            return f"s3://{name}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "S3Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _process_is_starting(self) -> None:
        try:
            self._process.wait(0.05)
        except subprocess.TimeoutExpired:
            return


@contextmanager
def served_here(server: S3Server) -> Iterator[None]:
    """s3:// means this server: by the variables that every AWS client reads."""
    variables = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
