"""The walls of the project: import direction, heavy imports, lengths, forbidden calls. An exception is a line here."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "streaming": {"streaming"},
    "actors": {"streaming", "actors"},
    "learner": {"streaming", "learner"},
    "deploy": {"streaming", "actors", "learner", "deploy"},
}
HEAVY = {"torch", "vllm", "ray", "deepspeed", "transformers", "kafka", "datasets", "pyarrow"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONGER_FUNCTIONS: dict[str, str] = {}
"""path:function -> why cutting it would hurt."""

FORBIDDEN = {
    "pickle": "records are msgpack with a schema",
    "cloudpickle": "records are msgpack with a schema",
    "dill": "records are msgpack with a schema",
}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_downwards_only(room: str) -> None:
    for path in sources(room):
        for line, module in imports_of(path):
            top = module.split(".")[0]
            assert top not in MAY_IMPORT or top in MAY_IMPORT[room], f"{path}:{line} imports {module}"


def test_streaming_loads_no_heavy_library() -> None:
    code = "import sys, streaming.records, streaming.config, streaming.stage, streaming.selector, streaming.log.sqlite"
    command = [sys.executable, "-c", f"{code}; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY.isdisjoint(loaded), HEAVY.intersection(loaded)


def test_the_command_line_loads_no_heavy_library() -> None:
    command = [sys.executable, "-c", "import sys, deploy.cli; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY.isdisjoint(loaded), HEAVY.intersection(loaded)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_files_and_functions_stay_short(room: str) -> None:
    for path in sources(room):
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_FILE_LINES, f"{path}: {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                name = f"{path.relative_to(ROOT)}:{node.name}"
                assert length <= MAX_FUNCTION_LINES or name in LONGER_FUNCTIONS, f"{name}: {length} lines"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_nothing_is_unpickled_or_evaluated(room: str) -> None:
    for path in sources(room):
        for line, module in imports_of(path):
            top = module.split(".")[0]
            assert top not in FORBIDDEN, f"{path}:{line} imports {module}: {FORBIDDEN[top]}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in FORBIDDEN_CALLS, f"{path}:{node.lineno} calls {called}"


def test_no_test_folder_hides_a_room() -> None:
    assert not {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()} & set(MAY_IMPORT)


def test_the_top_level_holds_what_was_agreed_and_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {line.split("/")[0] for line in listed.splitlines()}
    agreed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci", ".gitignore"}
    assert tops == agreed | {"actors", "learner", "streaming", "tests", "deploy"}
