"""`python -m tests.simulation SEED` replays a seed with its trace; `--seeds N` runs many and prints what fails."""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fault_table import Row, write_rows
from tests.simulation.schedule import Outcome, simulate, simulate_all, story


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    arguments.add_argument("seed", type=int, nargs="?", help="the seed to replay")
    arguments.add_argument("--seeds", type=int, default=1000, help="how many seeds to run")
    arguments.add_argument("--first", type=int, default=0, help="the first of them")
    arguments.add_argument("--processes", type=int, default=1)
    arguments.add_argument("--all", action="store_true", help="faults too whose violations are known")
    arguments.add_argument("--rows", type=Path, help="file for the rows of the fault suite's table")
    chosen = arguments.parse_args()
    return replay(chosen.seed, is_all=chosen.all) if chosen.seed is not None else run(chosen)


def replay(seed: int, *, is_all: bool) -> int:
    outcome = (simulate_all if is_all else simulate)(seed, is_traced=True)
    print(*outcome.trace or [], story(outcome), sep="\n")
    return 1 if outcome.violations else 0


def run(chosen: argparse.Namespace) -> int:
    began_s = time.monotonic()
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    outcomes: list[Outcome] = []
    with multiprocessing.get_context("forkserver").Pool(chosen.processes) as pool:
        for outcome in pool.imap_unordered(simulate_all if chosen.all else simulate, seeds, chunksize=10):
            outcomes.append(outcome)
            if outcome.violations:
                print(story(outcome), flush=True)
    failed = sorted(outcome.seed for outcome in outcomes if outcome.violations)
    results = {
        "seeds": len(outcomes),
        "failed": failed,
        "steps": sum(outcome.num_steps for outcome in outcomes),
        "faults": dict(sorted(sum((outcome.faults for outcome in outcomes), Counter()).items())),
        "longest_recovery_s": round(max((outcome.recovery_s for outcome in outcomes), default=0.0), 1),
        "seconds": round(time.monotonic() - began_s, 1),
    }
    print(json.dumps(results, indent=1))
    if chosen.rows is not None:
        write_rows(chosen.rows, rows(outcomes))
    return 1 if failed else 0


def rows(outcomes: list[Outcome]) -> list[Row]:
    """By kind of fault: a seed that failed counts for every kind that it had."""
    return [
        Row(
            kind=kind,
            backend="simulated",
            injected=outcome.faults[kind],
            violations=len(outcome.violations),
            recovery_s=outcome.recovery_s,
        )
        for outcome in outcomes
        for kind in outcome.faults or ["none"]
    ]


if __name__ == "__main__":
    sys.exit(main())
