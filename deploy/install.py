"""Install everything that `make demo` and `make test` need into a virtual environment. Standard library only.

Run by the Makefile with the system's Python, before anything of ours can be imported. A stamp of the lock file
and pyproject.toml in the environment makes a second run return at once.

missing tool -> what to install, exit 3; otherwise: venv -> torch (CPU build) -> every pinned package -> ourselves
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "locks" / "cpu.txt"
TESTED = ((3, 11), (3, 12))
"""Python versions that the lock file was tested with."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("environment", type=Path)
    arguments.add_argument("--torch-cpu-index", required=True, help="tried where no CPU build of torch is found first")
    chosen = arguments.parse_args()
    stamp = chosen.environment / ".streamdpo-installed"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    if missing := missing_tools():
        print("Cannot install yet:", *missing, sep="\n  ", file=sys.stderr)
        return 3
    print(f"Installing into {chosen.environment} (about two minutes, once) ...", flush=True)
    python = chosen.environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(chosen.environment)], check=True)
    try:
        install(python, chosen.torch_cpu_index)
    except subprocess.CalledProcessError as error:
        print(error.stderr or "", f"Installing failed: {' '.join(map(str, error.cmd))}", sep="\n", file=sys.stderr)
        print("  Check the network and pip's settings, then run the same command again.", file=sys.stderr)
        return 3
    stamp.write_text(wanted)
    return 0


def fingerprint() -> str:
    """Changes with the lock file, pyproject.toml and Python's version."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for path in (LOCK, ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def missing_tools() -> list[str]:
    """What the machine lacks, each with what to install."""
    missing = []
    if sys.version_info[:2] not in TESTED:
        missing.append(f"Python 3.11 or 3.12 (this is {sys.version.split()[0]}): give it as `make PYTHON=python3.11`.")
    for module, package in (("venv", "python3-venv"), ("ensurepip", "python3-venv")):
        if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode:
            missing.append(f"Python's module {module}: install {package} (Debian, Ubuntu).")
    if shutil.which("g++") is None:
        missing.append("g++: install g++ (Debian, Ubuntu) or gcc-c++ (Fedora); DeepSpeed compiles a small operator.")
    return missing


def install(python: Path, torch_cpu_index: str) -> None:
    """Raises subprocess.CalledProcessError where a step fails."""
    if shutil.which("nvidia-smi"):
        pip(python, "install", "--editable", f"{ROOT}[gpu,dev]")
        return
    torch = next(line for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
    install_cpu_torch(python, torch, torch_cpu_index)
    pip(python, "install", "--no-deps", "--requirement", str(LOCK))
    pip(python, "install", "--no-deps", "--editable", str(ROOT))


def install_cpu_torch(python: Path, torch: str, cpu_index: str) -> None:
    """The first index that has a CPU build wins; the CUDA build works without a GPU too and is the last resort."""
    if builds_for_cpu(python, torch):
        pip(python, "install", torch)
        return
    try:
        pip(python, "install", "--retries", "0", "--index-url", cpu_index, torch)
    except subprocess.CalledProcessError:
        print(f"No CPU build of {torch} at {cpu_index}: taking the package index's build (several GB).", flush=True)
        pip(python, "install", torch)


def builds_for_cpu(python: Path, torch: str) -> bool:
    """Whether pip, as it is set up here, would take a build of torch without CUDA. Downloads nothing large."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        try:
            pip(python, "install", "--dry-run", "--ignore-installed", "--report", str(report), "--no-deps", torch)
        except subprocess.CalledProcessError:
            return False
        found = json.loads(report.read_text())["install"][0]["metadata"]
    return "+cpu" in found["version"] or not any("nvidia" in need for need in found.get("requires_dist", []))


def pip(python: Path, *arguments: str) -> None:
    """Raises subprocess.CalledProcessError, with what pip said, where it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)


if __name__ == "__main__":
    sys.exit(main())
