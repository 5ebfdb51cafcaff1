"""Tests of faults, as rows of the table: `@pytest.mark.fault(KIND, backend=...)` makes one, `injected` says more of it.

Loaded by conftest.py as a plugin. Rows are written into the file that STREAMDPO_FAULT_ROWS names.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fault_table import Row, merged, write_rows

TOLD = pytest.StashKey[list[Row]]()
ALL = pytest.StashKey[list[Row]]()


class Injected:
    """What a test did to the program. Called once for each kind of fault."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def __call__(self, kind: str | None = None, **fields: Any) -> None:
        """`kind` and backend are the marker's where they are not given."""
        known = _row(self._item)
        told = msgspec.structs.replace(known, **({"kind": kind} if kind else {}), **fields)
        self._item.stash.setdefault(TOLD, []).append(told)


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Injected:
    """Say how many faults a test has injected, over how many seeds, and how long the recovery took."""
    return Injected(request.node)


def _row(item: pytest.Item) -> Row:
    """By the marker next to the test; the backend may be a parameter of it."""
    marker = item.get_closest_marker("fault")
    assert marker is not None, f"{item.nodeid} injects faults and has no mark that says which"
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend = marker.kwargs.get("backend", parameters.get("backend", ""))
    return Row(kind=marker.args[0], backend=str(backend))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if report.when == "call" and not report.skipped and item.get_closest_marker("fault"):
        rows = item.stash.get(TOLD, None) or [_row(item)]
        rows = [msgspec.structs.replace(row, seeds=1) for row in merged(rows)]  # one test is one run
        if report.failed and not any(row.violations for row in rows):
            rows = [msgspec.structs.replace(row, violations=1) for row in rows]
        item.config.stash.setdefault(ALL, []).extend(rows)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("STREAMDPO_FAULT_ROWS")
    if path:
        write_rows(Path(path), session.config.stash.get(ALL, []))
