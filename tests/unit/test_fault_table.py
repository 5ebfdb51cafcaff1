"""The fault suite's table: rows of one kind and backend become one, and a broken promise is never lost among them."""

from pathlib import Path

import pytest

from tests.fault_table import Row, main, merged, read_rows, table, write_rows

KILLED = Row(kind="kill", backend="sqlite", injected=3, recovery_s=1.5)


def test_rows_of_one_kind_and_backend_become_one() -> None:
    others = [Row(kind="kill", backend="sqlite", injected=2, violations=1, recovery_s=4.0), Row(kind="kill")]
    assert merged([KILLED, *others]) == [
        Row(kind="kill"),
        Row(kind="kill", backend="sqlite", injected=5, seeds=2, violations=1, recovery_s=4.0),
    ]


def test_people_see_a_line_for_each() -> None:
    header, line = table([KILLED]).splitlines()
    assert header.split("  ")[0] == "fault"
    assert line.split() == ["kill", "sqlite", "3", "1", "0", "1.5"]


@pytest.mark.parametrize(("violations", "code"), [(0, 0), (1, 1)])
def test_the_files_of_all_parts_make_one_and_a_broken_promise_fails(
    violations: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "parts" / "a.json", [KILLED])
    write_rows(tmp_path / "parts" / "b.json", [KILLED, Row(kind="freeze", violations=violations)])
    monkeypatch.setattr("sys.argv", ["fault_table", str(tmp_path / "parts"), str(tmp_path / "faults.json")])
    assert main() == code
    found = read_rows(tmp_path / "faults.json")
    assert [(row.kind, row.injected, row.violations) for row in found] == [("freeze", 1, violations), ("kill", 6, 0)]
    assert f"7 faults, {violations} violations" in capsys.readouterr().out
