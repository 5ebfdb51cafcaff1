"""What processes have used so far, as the kernel counts it."""

import os
from collections.abc import Iterable
from pathlib import Path


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time."""
    ticks = 0
    for pid in pids:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])  # utime and stime of proc(5), counted behind the name
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_kib(pids: Iterable[int]) -> int:
    """What they hold; what several share is divided among them."""
    return sum(
        int(line.split()[1])
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    )
