"""The log behind one URL: `open_log`."""

from pathlib import Path

from streaming.config import KafkaConfig, LogConfig
from streaming.errors import ConfigError
from streaming.log.by_reference import with_blobs
from streaming.log.protocol import Log
from streaming.log.sqlite import SQLiteLog
from streaming.metrics import Metrics

_DEFAULTS = LogConfig()


def open_log(
    url: str,
    *,
    run: str,
    max_record_bytes: int = _DEFAULTS.max_record_bytes,
    max_bytes: int = _DEFAULTS.max_bytes,
    blobs: str | None = None,
    max_blob_bytes: int = _DEFAULTS.max_blob_bytes,
    metrics: Metrics | None = None,
    kafka: KafkaConfig = _DEFAULTS.kafka,
) -> Log:
    """Open a run's log; it is made where it is missing. Raises ConfigError for a URL that names no log.

    sqlite:///FILE is relative to the working directory, sqlite:////FILE absolute. Values above `max_record_bytes` lie
    below the directory or fsspec URL `blobs` (blobs/ beside the file by default; refused on Kafka without it).
    A Kafka log connects at once: NotReadyError where no broker lets it in.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and rest != "/":
        file = Path(rest[1:])
        log: Log = SQLiteLog(file, run=run, max_record_bytes=max_record_bytes, max_bytes=max_bytes, metrics=metrics)
        beside = blobs or str(file.parent / "blobs")
        return with_blobs(
            log, beside, run=run, max_record_bytes=max_record_bytes, max_blob_bytes=max_blob_bytes, metrics=metrics
        )
    if scheme == "kafka" and rest:
        # Here and not above: kafka-python is heavy, and a run on one machine does without it.
        from streaming.log.kafka import KafkaLog

        log = KafkaLog(url, run=run, max_record_bytes=max_record_bytes, config=kafka, metrics=metrics)
        return with_blobs(
            log,
            blobs or "",
            run=run,
            max_record_bytes=max_record_bytes,
            max_blob_bytes=max_blob_bytes if blobs else 0,
            metrics=metrics,
        )
    raise ConfigError(
        f"this names no log: {url!r}",
        where="log.url",
        do="Write sqlite:///FILE, as in sqlite:///log.db, or kafka://HOST:PORT,HOST:PORT.",
    )
