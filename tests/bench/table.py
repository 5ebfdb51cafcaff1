"""Write the README's table of measurements from build/bench/*.json: `python -m tests.bench.table`."""

import json
from pathlib import Path
from typing import Any

README = Path("README.md")
BEGIN = "<!-- measurements: written by `python -m tests.bench.table` -->"
END = "<!-- end of measurements -->"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows."""
    lines = ["| what | ours | peer | ratio | goal | holds | machine |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        peer = "" if row["peer"] is None else f"{row['peer']} {row['unit']}"
        ratio = "" if row["ratio"] is None else row["ratio"]
        goal = row["goal"] or ""
        holds = ("yes" if row["holds"] else "**no**") if goal else ""
        ours = f"{row['ours']} {row['unit']}"
        lines.append(f"| {row['name']} | {ours} | {peer} | {ratio} | {goal} | {holds} | {row['machine']} |")
    return "\n".join(lines)


def write(readme: Path, folder: Path) -> None:
    """Replace what stands between the marks in the README."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    head, rest = readme.read_text().split(BEGIN)
    _, tail = rest.split(END)
    readme.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}")


if __name__ == "__main__":
    write(README, Path("build/bench"))
