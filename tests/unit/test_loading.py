from pathlib import Path

import pytest

from streaming.errors import DataError
from streaming.rewards.loading import load_function


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_and_its_function_are_found(tmp_path: Path) -> None:
    path = write(tmp_path, "def reward(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    loaded = load_function(f"{path}:reward")
    assert loaded.function(completions=["a"]) == [1.0]
    assert loaded.version.startswith("reward@")


def test_the_version_changes_with_the_code(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = load_function(write(tmp_path, "def reward(completions):\n    return [0]\n") + ":reward")
    second = load_function(write(tmp_path / "other", "def reward(completions):\n    return [1]\n") + ":reward")
    assert first.version != second.version


def test_a_file_finds_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 4.0\n", name="neighbour_of_mine.py")
    path = write(tmp_path, "import neighbour_of_mine\ndef reward(completions):\n    return [neighbour_of_mine.VALUE]\n")
    assert load_function(f"{path}:reward").function([""]) == [4.0]


def test_two_functions_of_one_file_share_its_state(tmp_path: Path) -> None:
    path = write(tmp_path, "CACHE = {}\ndef first():\n    return CACHE\ndef second():\n    return CACHE\n")
    assert load_function(f"{path}:first").function() is load_function(f"{path}:second").function()


def test_a_module_and_its_function_are_found() -> None:
    assert load_function("streaming.rewards.rules:exact_answer").function.__name__ == "exact_answer"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reward", "does not name a function"),
        (":reward", "does not name a function"),
        ("there/is/no/such.py:reward", "there is no file"),
        ("no_such_package.rewards:reward", "there is no module no_such_package"),
        ("streaming.rewards.no_such_module:reward", "there is no module streaming.rewards.no_such_module"),
        ("streaming.rewards.rules:exact_anser", "has no exact_anser"),
        ("streaming.rewards.rules:_NUMBER", "is a Pattern, not a function"),
        ("fractions:Fraction", "is a class, not a function"),
    ],
)
def test_a_wrong_name_is_refused_and_says_why(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_function(spec)
    assert spec in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def reward(:\n", "SyntaxError"),
        ("import no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise ValueError('not today')\n", "ValueError: not today"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_with_its_own_error(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            load_function(f"{path}:reward")


def test_an_unknown_function_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path, "def correct(completions):\n    return [1.0]\n")
    with pytest.raises(DataError, match="It has: correct"):
        load_function(f"{path}:corect")
