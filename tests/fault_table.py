"""What the fault suite did, as one table: a row per kind of fault and backend.

    pytest (a row per test of a fault) -> FILE   \
    simulation (a row per kind)        -> FILE    >  merged -> printed, and build/faults.json

`python -m tests.fault_table FOLDER FILE` merges the folder's files of rows, prints the table and writes FILE. It fails
where a promise was broken.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

COLUMNS = ("fault", "backend", "injected", "seeds", "violations", "longest recovery (s)")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of fault on one backend."""

    kind: str
    backend: str = ""  # sqlite | kafka | simulated; empty where it has nothing to do with the log
    injected: int = 1
    seeds: int = 1
    violations: int = 0
    recovery_s: float | None = None  # from a fault until its role writes again, or the log takes records again


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row per kind and backend, in alphabetical order."""
    together: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        together[row.kind, row.backend].append(row)
    return [
        Row(
            kind=kind,
            backend=backend,
            injected=sum(row.injected for row in found),
            seeds=sum(row.seeds for row in found),
            violations=sum(row.violations for row in found),
            recovery_s=max((row.recovery_s for row in found if row.recovery_s is not None), default=None),
        )
        for (kind, backend), found in sorted(together.items())
    ]


def table(rows: Iterable[Row]) -> str:
    """For people."""
    lines = [COLUMNS, *((_cells(row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(_aligned(i, cell, widths[i]) for i, cell in enumerate(line)).rstrip() for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    recovery = "" if row.recovery_s is None else f"{row.recovery_s:.1f}"
    return row.kind, row.backend, str(row.injected), str(row.seeds), str(row.violations), recovery


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(merged(rows)), indent=1))


def read_rows(path: Path) -> list[Row]:
    return msgspec.json.decode(path.read_bytes(), type=list[Row])


def main() -> int:
    """Whether something was told, and no promise broken, as an exit code."""
    arguments = argparse.ArgumentParser(prog="python -m tests.fault_table", description=__doc__)
    arguments.add_argument("folder", type=Path, help="where the parts' files of rows lie")
    arguments.add_argument("file", type=Path, help="where the merged rows go")
    chosen = arguments.parse_args()
    rows = merged(row for path in sorted(chosen.folder.glob("*.json")) for row in read_rows(path))
    write_rows(chosen.file, rows)
    print(table(rows))
    broken = sum(row.violations for row in rows)
    print(f"{sum(row.injected for row in rows)} faults, {broken} violations; the same as JSON: {chosen.file}")
    return 1 if broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
