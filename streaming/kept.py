"""Which published weight versions stay, wherever they lie: the newest, and those that a live role names."""

import re
from collections.abc import Iterable

from streaming.records import RoleState, Version

LIVE_S = 30.0
"""A role that has not beaten for so long (30 beats) leases nothing any more."""

_VERSION = re.compile(r"(\d+)\.(\d+)")


def leased(states: Iterable[RoleState], *, now_s: float) -> set[Version]:
    """Versions that a live role still names."""
    live = [state for state in states if state.health != "stopped" and now_s - state.time_s <= LIVE_S]
    return {version for state in live for version in state.leases}


def prunable(versions: Iterable[Version], leases: set[Version], *, keep: int) -> list[Version]:
    """Versions that may go: older than the newest `keep`, and leased by nobody."""
    oldest_first = sorted(versions)
    return [version for version in oldest_first[: max(0, len(oldest_first) - keep)] if version not in leases]


def parse_version(name: str) -> Version | None:
    """The version that a directory is named after; None for any other name."""
    match = _VERSION.fullmatch(name)
    return None if match is None else Version(int(match[1]), int(match[2]))
