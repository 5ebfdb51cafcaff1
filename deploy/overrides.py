"""`--set a.b=c`: one value of a run's file, given on the command line. Knows nothing of what the settings mean."""

from typing import Any

import yaml

from streaming.errors import ConfigError


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one value by its path; a number in the path is a place in a list.

    Raises ConfigError for what is no override, and for a path that leads nowhere.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise _bad_override(override, "has no value", "Write --set a.b=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as cause:
        raise _bad_override(override, f"has a value that is not YAML: {cause}", "Quote the value.") from cause
    *parents, last = key.split(".")
    here: Any = values
    for part in parents:
        here = _descend(here, part, override)
    if isinstance(here, list):
        here[_place(here, last, override)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise _bad_override(override, f"{last!r} lies in a value, not in a section", "Check the path.")


def _descend(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_place(here, part, override)]
    if not isinstance(here, dict):
        raise _bad_override(override, f"{part!r} lies in a value, not in a section", "Check the path.")
    if here.get(part) is None:
        here[part] = {}
    return here[part]


def _place(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise _bad_override(override, f"{part!r} is no place in a list of {len(items)}", "Count from 0.")
    return int(part)


def _bad_override(override: str, what: str, do: str) -> ConfigError:
    return ConfigError(f"--set {override}: {what}", where="command line", do=do)
