"""From `package.module:function` or `file.py:function` to the function, with an error for each way to go wrong."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from streaming.errors import DataError
from streaming.records import stable_id


class LoadedFunction(NamedTuple):
    """A reward function and the version that goes into records: its name and a hash of its module's source."""

    function: Callable[..., Any]
    version: str


def load_function(spec: str) -> LoadedFunction:
    """The callable that `spec` names.

    Raises DataError where the file, module or attribute is not there, where importing it raises, or where it is
    not callable. A file's folder is put at the end of the import path, so that it finds its neighbours.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise _wrong(spec, "does not name a function", "Write package.module:function or file.py:function.")
    module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise _wrong(spec, f"{place} has no {attribute}", f"It has: {', '.join(_callables(module)) or 'nothing'}.")
        found = getattr(found, name)
    if not callable(found) or isinstance(found, type):
        kind = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        raise _wrong(spec, f"{attribute} is {kind}, not a function", "Name a function, or an instance with __call__.")
    home = sys.modules.get(getattr(found, "__module__", None) or "", module)  # it may only be named here
    return LoadedFunction(found, f"{attribute}@{_source_hash(home)}")


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise _wrong(spec, f"there is no file {path.absolute()}", "Correct the path.")
    name = f"streamdpo_reward_{path.stem}_{stable_id(str(path.resolve()))}"
    if name in sys.modules:  # two functions of one file share its state
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None, "a .py file has a loader"
    _make_importable(path.resolve().parent)
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as cause:
        del sys.modules[name]
        raise _raised(spec, str(path), cause) from cause
    return module


def _load_module(spec: str, name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        if cause.name is None or not (name == cause.name or name.startswith(cause.name + ".")):
            raise _raised(spec, name, cause) from cause
        raise _wrong(
            spec, f"there is no module {cause.name}", "Install it, or name a file: file.py:function."
        ) from cause
    except Exception as cause:
        raise _raised(spec, name, cause) from cause


def _make_importable(folder: Path) -> None:
    # At the end: a person's file must not hide an installed package of the same name.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _source_hash(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return stable_id(Path(file).read_bytes()) if file else stable_id(module.__name__)


def _raised(spec: str, place: str, cause: Exception) -> DataError:
    return _wrong(
        spec, f"importing {place} raised {type(cause).__name__}: {cause}", "Mend it, or install what it needs."
    )


def _wrong(spec: str, what: str, do: str) -> DataError:
    return DataError(what, where=f"reward function {spec!r}", do=do)
