"""One launcher per run: `streamdpo run` twice on one directory would start every role twice.

The lock is the kernel's: it is gone with the process that held it, however that died.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streaming.errors import NotReadyError

NAME = "launcher.lock"

_CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without locks say. There, a second launcher's learner still ends the first one's."""


@contextmanager
def only_launcher(directory: Path) -> Iterator[None]:
    """Be the only launcher of the run in this directory inside the block.

    Raises NotReadyError where another process is; nothing was changed then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            file.seek(0)
            raise NotReadyError(
                f"this run is running already ({file.read().strip() or 'just started'})",
                where=str(directory),
                do="`streamdpo status` shows it. To start it anew, stop that process first (Ctrl-C or SIGTERM); for a "
                "second run beside it give another `directory` and `name`.",
            ) from cause
        except OSError as cause:
            if cause.errno not in _CANNOT_LOCK:
                raise
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
