"""Fixtures that every test may ask for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from streaming.log import open_log
from streaming.log.protocol import Log

# The same examples on every machine, however slow it is at the moment.
settings.register_profile("ours", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """An empty log of run "test" in a file of its own."""
    with open_log(f"sqlite:///{tmp_path}/log.db", run="test", max_record_bytes=2**20, max_bytes=2**30) as opened:
        yield opened
