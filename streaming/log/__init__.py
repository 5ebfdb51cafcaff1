"""The log behind one URL: `open_log`."""

from pathlib import Path

from streaming.config import LogConfig
from streaming.errors import ConfigError
from streaming.log.protocol import Log
from streaming.log.sqlite import SQLiteLog

_DEFAULTS = LogConfig()


def open_log(
    url: str,
    *,
    run: str,
    max_record_bytes: int = _DEFAULTS.max_record_bytes,
    max_bytes: int = _DEFAULTS.max_bytes,
) -> Log:
    """Open a run's log; it is made where it is missing. Raises ConfigError for a URL that names no log.

    sqlite:///FILE is relative to the working directory, sqlite:////FILE absolute.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and rest != "/":
        return SQLiteLog(Path(rest[1:]), run=run, max_record_bytes=max_record_bytes, max_bytes=max_bytes)
    if scheme == "kafka":
        raise ConfigError(
            f"kafka:// is not available in this release (found {url!r})",
            where="log.url",
            do="Use sqlite:///FILE; it serves all processes of one machine.",
        )
    raise ConfigError(
        f"this names no log: {url!r}", where="log.url", do="Write sqlite:///FILE, as in sqlite:///log.db."
    )
