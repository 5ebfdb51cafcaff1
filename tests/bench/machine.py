"""The machine that a number was measured on, as results name it."""

import os
import shutil
import subprocess


def machine() -> str:
    """'2 cores, no GPU', or the GPU's name."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return f"{len(os.sched_getaffinity(0))} cores, no GPU"
