"""Every error this project raises on purpose.

StreamDPOError        exit code 1
  ConfigError               2   the settings are wrong; nothing was changed
  NotReadyError             3   a model, file, broker or GPU is missing or unreachable
  DataError                 2   the user's prompts or reward function break their contract
  RecordError                   these bytes are not a record: the stage dead-letters them
  LogError                      the log refused a request
    TrimmedError                the offset asked for has passed retention: data is gone, never skipped silently
    TooLargeError               the record is larger than the log takes
    LeaseLostError              another member owns the partition now: its work will be done again there
  WeightsError                  a version does not match its checksum, or did not load: it is not applied
  EngineError                   the engine died or broke its promise: it is restarted, its requests sampled again
  SupersededError               a newer start of this role has taken over: this one stops, and that one goes on
  NonFiniteError                the loss was not finite several times in a row: the checkpoint is intact
"""

from collections.abc import Callable


class StreamDPOError(Exception):
    """Says what went wrong, where, and what to do about it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str, do: str) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.do = do

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n  {self.do}"

    def __reduce__(self) -> "tuple[Callable[..., StreamDPOError], tuple[object, ...]]":
        # An exception with keyword-only arguments does not survive pickling, and Ray pickles exceptions.
        return _rebuild, (type(self), self.what, self.where, self.do)


def _rebuild(kind: type[StreamDPOError], what: str, where: str, do: str) -> StreamDPOError:
    return kind(what, where=where, do=do)


class ConfigError(StreamDPOError):
    exit_code = 2


class NotReadyError(StreamDPOError):
    exit_code = 3


class DataError(StreamDPOError):
    exit_code = 2


class RecordError(StreamDPOError):
    pass


class LogError(StreamDPOError):
    pass


class TrimmedError(LogError):
    pass


class TooLargeError(LogError):
    pass


class LeaseLostError(LogError):
    pass


class WeightsError(StreamDPOError):
    pass


class EngineError(StreamDPOError):
    pass


class SupersededError(StreamDPOError):
    pass


class NonFiniteError(StreamDPOError):
    pass
