"""Fixtures that every test may ask for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.log import open_log
from streaming.log.protocol import Log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """An empty log of run "test" in a file of its own."""
    with open_log(f"sqlite:///{tmp_path}/log.db", run="test", max_record_bytes=2**20, max_bytes=2**30) as opened:
        yield opened
