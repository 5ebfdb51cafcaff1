"""A TCP proxy between a client and a broker that can cut, delay and drop: what a network does on its bad days.

Every connection has a thread for each direction. What was read from one side is passed to the other whole, unless the
proxy was told otherwise; a fault applies to connections that are open as well as to new ones.
"""

import contextlib
import socket
import threading
from types import TracebackType


class TcpProxy:
    """Listens on `listen`, forwards to `target`. A context manager; `port` is where clients connect."""

    def __init__(self, target: tuple[str, int], *, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self._target = target
        self._server = socket.create_server(listen)
        self.port: int = self._server.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._delay_s = 0.0
        self._is_cut = False
        self._is_deaf = False
        self._wake = threading.Event()
        self.num_dropped_bytes = 0
        """Bytes of answers that were dropped so far."""
        threading.Thread(target=self._accept, name="tcp-proxy", daemon=True).start()

    def cut(self) -> None:
        """Break every connection and refuse new ones, until `mend`."""
        self._is_cut = True
        self.break_connections()

    def break_connections(self) -> None:
        """Break every connection once; new ones are welcome."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            _close(*pair)

    def drop_answers(self) -> None:
        """Pass requests on and drop every answer, until `mend`: acknowledgements are lost, the records are not."""
        self._is_deaf = True

    def delay(self, seconds: float) -> None:
        """Hold every piece back for so long, in both directions, until `mend`."""
        self._delay_s = seconds

    def mend(self) -> None:
        """Pass everything again. Connections whose answers were dropped are broken: their rest makes no sense."""
        was_deaf, self._is_deaf, self._is_cut, self._delay_s = self._is_deaf, False, False, 0.0
        if was_deaf:
            self.break_connections()

    def close(self) -> None:
        self._wake.set()
        self.cut()
        _close(self._server)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return  # closed
            if self._is_cut:
                _close(client)
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            broker = socket.create_connection(self._target, timeout=10)
        except OSError:
            _close(client)  # the broker is down: so is this connection
            return
        broker.settimeout(None)
        pair = (client, broker)
        with self._lock:
            self._pairs.add(pair)
        answers = threading.Thread(target=self._pass, args=(broker, client, True), daemon=True)
        answers.start()
        self._pass(client, broker, False)
        answers.join()
        with self._lock:
            self._pairs.discard(pair)

    def _pass(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):  # one side broke: so does the other
            while piece := source.recv(64 * 1024):
                if self._delay_s:
                    self._wake.wait(self._delay_s)
                if is_answer and self._is_deaf:
                    self.num_dropped_bytes += len(piece)
                else:
                    sink.sendall(piece)
        _close(source, sink)

    def __enter__(self) -> "TcpProxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(*sockets: socket.socket) -> None:
    """Close for both sides at once: a thread that waits in `recv` or `accept` wakes up."""
    for one in sockets:
        with contextlib.suppress(OSError):  # closed by the other side, or never connected
            one.shutdown(socket.SHUT_RDWR)
        one.close()
