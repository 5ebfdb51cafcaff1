"""deploy/install.py: what a bare machine lacks is named, and torch comes from where a CPU build is."""

import stat
import sys
from pathlib import Path

from deploy.install import install_cpu_torch, missing_tools

PIP = """#!{python}
import json, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
if "--index-url" in arguments and {index_is_down}:
    sys.exit("no such host")
if "--report" in arguments:
    needs = ["nvidia-cublas; platform_system == 'Linux'"] if {only_cuda} else []
    found = {{"install": [{{"metadata": {{"version": "2.13.0", "requires_dist": needs}}}}]}}
    with open(arguments[arguments.index("--report") + 1], "w") as file:
        json.dump(found, file)
"""


def pip_calls(folder: Path, *, only_cuda: bool, index_is_down: bool) -> list[str]:
    """The installs that `install_cpu_torch` asked of a pip that answers like this."""
    python, log = folder / "python", folder / "calls"
    text = PIP.format(python=sys.executable, log=str(log), only_cuda=only_cuda, index_is_down=index_is_down)
    python.write_text(text)
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    install_cpu_torch(python, "torch==2.13.0", "https://cpu.invalid/whl")
    return [line.split("--quiet ")[1] for line in log.read_text().splitlines() if "--dry-run" not in line]


def test_a_cpu_build_of_the_package_index_is_taken_first(tmp_path: Path) -> None:
    assert pip_calls(tmp_path, only_cuda=False, index_is_down=True) == ["install torch==2.13.0"]


def test_where_there_is_only_cuda_the_cpu_index_is_asked(tmp_path: Path) -> None:
    calls = pip_calls(tmp_path, only_cuda=True, index_is_down=False)
    assert calls == ["install --retries 0 --index-url https://cpu.invalid/whl torch==2.13.0"]


def test_the_cuda_build_is_the_last_resort_and_no_failure(tmp_path: Path) -> None:
    assert pip_calls(tmp_path, only_cuda=True, index_is_down=True)[-1] == "install torch==2.13.0"


def test_this_machine_lacks_nothing_that_the_tests_need() -> None:
    assert missing_tools() == []
