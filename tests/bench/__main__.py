"""Run the benchmarks: `make bench` for all, `make bench ONLY=name` for one. Each writes build/bench/NAME.json.

A row is {name, ours, peer, ratio, goal, holds, unit, machine}; a goal that does not hold is written as not held.
"""

import importlib
import json
import sys
from pathlib import Path

NAMES = (
    *("log", "kafka", "stages", "rates", "kafka_run", "stall", "busy", "loop"),
    *("costs", "generators", "sizing"),  # sizing reads what costs wrote
)
FOLDER = Path("build/bench")


def main(only: str | None) -> int:
    if only is not None and only not in NAMES:
        print(f"no benchmark is called {only!r}: choose one of {', '.join(NAMES)}", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in [only] if only else NAMES:
        rows = importlib.import_module(f"tests.bench.bench_{name}").run()
        (FOLDER / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
        for row in rows:
            held = "holds" if row["holds"] else "DOES NOT HOLD"
            print(f"{row['name']}: {row['ours']} {row['unit']} (peer {row['peer']}), goal {row['goal']}: {held}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
