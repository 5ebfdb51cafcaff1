"""Real Apache Kafka brokers on this machine, for tests: started, killed, paused and restarted one by one.

Cluster.start -> kill | terminate | pause | resume | restart of one broker ... -> Cluster.stop

Every broker has three listeners: CLIENT (plaintext, TLS with SCRAM, or mutual TLS: `bootstrap`), INTERNAL (plaintext;
brokers among themselves, and the tests' own administration: `internal`) and CONTROLLER. The jars are those of an
unpacked Kafka download: KAFKA_HOME, or shared/kafka beside the checkout. Java 17 or newer runs them.
"""

import atexit
import base64
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from tests.certificates import Authority

Security = Literal["plaintext", "tls_scram", "mtls"]

PROTOCOLS: dict[Security, str] = {"plaintext": "PLAINTEXT", "tls_scram": "SASL_SSL", "mtls": "SSL"}

START_S = 120.0
"""A broker serves after 2 s, after a SIGKILL 10 s; on a busy machine both take several times as long."""

STOP_S = 60.0
"""A broker that is alone in its cluster waits for a controller that is gone before it gives up."""

PORTS = range(20_000, 32_000)
"""Below the ports that systems give to outgoing connections: on those a client that asks for a dead broker's port
can get that very port itself, and talk to itself."""

COMMON = """\
process.roles=broker,controller
controller.listener.names=CONTROLLER
inter.broker.listener.name=INTERNAL
offsets.topic.num.partitions=3
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
unclean.leader.election.enable=false
"""

SECURED = """\
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
ssl.keystore.type=PEM
ssl.truststore.type=PEM
"""


def home() -> Path:
    """The unpacked Kafka download: KAFKA_HOME, else shared/kafka beside the checkout."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "kafka"
    return Path(os.environ.get("KAFKA_HOME") or beside)


def java() -> str | None:
    """The Java to run brokers with: that of JAVA_HOME, else that of the PATH."""
    return shutil.which("java", path=f"{os.environ['JAVA_HOME']}/bin" if os.environ.get("JAVA_HOME") else None)


def why_not() -> str | None:
    """Why no broker can be started here and what to set; None where one can."""
    if not any((home() / "libs").glob("kafka_2.13-*.jar")):
        return f"no Kafka in {home()}: set KAFKA_HOME to an unpacked Kafka 4 download, or KAFKA_BOOTSTRAP to a broker"
    command = java()
    if command is None:
        return "no Java for Kafka: install Java 17 (openjdk-17-jre-headless) or set JAVA_HOME, or KAFKA_BOOTSTRAP"
    text = subprocess.run([command, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', text)
    if found is None or int(found[1]) < 17:
        return f"Kafka needs Java 17, {command} is {found[1] if found else text!r}: set JAVA_HOME, or KAFKA_BOOTSTRAP"
    return None


LOGINS = {"SCRAM-SHA-512": "scram.ScramLoginModule", "OAUTHBEARER": "oauthbearer.OAuthBearerLoginModule"}
"""SASL mechanism -> who checks it. Of a token the broker checks its times and no signature: that is Kafka's default."""


class Address(NamedTuple):
    """A broker that is there to be used."""

    bootstrap: str


class Cluster:
    """One broker or three, in `folder`; a context manager that always stops them, and so does the end of the process.

    `users` are SCRAM names with their passwords. `advertised` are ports that the brokers tell clients instead of their
    own: those of proxies. `settings` go into every broker's properties.
    """

    def __init__(
        self,
        folder: Path,
        num_brokers: int = 1,
        security: Security = "plaintext",
        *,
        users: Mapping[str, str] | None = None,
        advertised: Sequence[int] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.num_brokers = num_brokers
        self.security = security
        self.users = dict(users or {})
        self.ports = free_ports(num_brokers)
        self._internal = free_ports(num_brokers, but=self.ports)
        self._controllers = free_ports(num_brokers, but=[*self.ports, *self._internal])
        self._advertised = list(advertised or self.ports)
        self.settings = dict(settings or {})
        self._brokers: list[_Process | None] = [None] * num_brokers
        self.authority: Authority | None = None

    @property
    def bootstrap(self) -> str:
        """Where clients connect, by the listener that `security` names."""
        return _addresses(self._advertised)

    @property
    def internal(self) -> str:
        """Where the tests administer: plaintext, every right."""
        return _addresses(self._internal)

    @property
    def pids(self) -> list[int]:
        """Of the brokers that are up."""
        return [process.pid for process in self._brokers if process is not None]

    def start(self) -> None:
        """Format every broker's folder, start all, and wait until all serve."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.security != "plaintext":
            self.authority = Authority(self.folder / "certificates")
            self.authority.issue("broker", addresses=["127.0.0.1"], names=["localhost"])
        cluster_id = base64.urlsafe_b64encode(random.Random(str(self.folder)).randbytes(16)).decode().rstrip("=")
        for i in range(self.num_brokers):
            self._properties(i).write_text(self._describe(i))
            self._format(i, cluster_id)
        for i in range(self.num_brokers):
            self._launch(i)
        for i in range(self.num_brokers):
            self._wait(i)

    def stop(self) -> None:
        """End every broker, paused ones too; all at once, because the last of three cannot stop in order."""
        for process in self._brokers:
            if process is not None:
                process.kill()
        self._brokers = [None] * self.num_brokers

    def kill(self, i: int) -> None:
        """SIGKILL, and wait until it is dead."""
        self._running(i).kill()
        self._brokers[i] = None

    def terminate(self, i: int) -> None:
        """SIGTERM: the broker hands its partitions over and ends in order. Waits for it."""
        self._running(i).terminate()
        self._brokers[i] = None

    def pause(self, i: int) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self._running(i).signal(signal.SIGSTOP)

    def resume(self, i: int) -> None:
        """SIGCONT."""
        self._running(i).signal(signal.SIGCONT)

    def restart(self, i: int) -> None:
        """Start a broker that is down (one that runs is terminated first), and wait until it serves."""
        if self._brokers[i] is not None:
            self.terminate(i)
        self._launch(i)
        self._wait(i)

    def restart_all(self, *numbers: int) -> None:
        """Start several brokers that are down at once: alone, one may find no majority to join."""
        for i in numbers:
            self._launch(i)
        for i in numbers:
            self._wait(i)

    def wait_in_sync(self) -> None:
        """Wait until every replica holds all records again: only then may the next broker go without harm."""
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with KafkaAdminClient(bootstrap_servers=self.internal, request_timeout_ms=5000) as admin:
                    behind = [
                        topic["name"]
                        for topic in admin.describe_topics()
                        for partition in topic["partitions"]
                        if len(partition["isr_nodes"]) < len(partition["replica_nodes"])
                    ]
            except KafkaError as error:
                behind = [repr(error)]
            if not behind:
                return
            time.sleep(0.2)
        raise AssertionError(f"not in sync after {START_S} s: {behind}")

    def tool(self, name: str, *arguments: str, timeout_s: float = START_S) -> str:
        """The output of one of Kafka's own tools, by its Java class. Raises AssertionError where it fails."""
        command = [java() or "java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", _jars(), name]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode:
            raise AssertionError(f"{name} {arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def _running(self, i: int) -> "_Process":
        process = self._brokers[i]
        assert process is not None, f"broker {i} is down"
        return process

    def _properties(self, i: int) -> Path:
        return self.folder / f"broker-{i}.properties"

    def _describe(self, i: int) -> str:
        copies = min(3, self.num_brokers)
        voters = ",".join(f"{j + 1}@127.0.0.1:{port}" for j, port in enumerate(self._controllers))
        client = PROTOCOLS[self.security]
        settings = {
            "node.id": i + 1,
            "controller.quorum.voters": voters,
            "listeners": f"CLIENT://127.0.0.1:{self.ports[i]},INTERNAL://127.0.0.1:{self._internal[i]},"
            f"CONTROLLER://127.0.0.1:{self._controllers[i]}",
            "advertised.listeners": f"CLIENT://127.0.0.1:{self._advertised[i]},"
            f"INTERNAL://127.0.0.1:{self._internal[i]}",
            "listener.security.protocol.map": f"CLIENT:{client},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": self.folder / f"data-{i}",
            "default.replication.factor": copies,
            "min.insync.replicas": min(2, copies),
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": min(2, copies),
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": min(2, copies),
            **self._secured(),
            **self.settings,
        }
        return COMMON + "".join(f"{name}={value}\n" for name, value in settings.items())

    def _secured(self) -> dict[str, str]:
        if self.authority is None:
            return {}
        settings = dict(line.split("=", 1) for line in SECURED.splitlines())
        settings["ssl.keystore.location"] = str(self.authority.bundle("broker"))
        settings["ssl.truststore.location"] = str(self.authority.file)
        if self.security == "mtls":
            settings["listener.name.client.ssl.client.auth"] = "required"
            settings["ssl.principal.mapping.rules"] = "RULE:^CN=(.*?)$/$1/,DEFAULT"
        else:
            settings["sasl.enabled.mechanisms"] = ",".join(LOGINS)
            for mechanism, module in LOGINS.items():
                name = f"listener.name.client.{mechanism.lower()}.sasl.jaas.config"
                settings[name] = f"org.apache.kafka.common.security.{module} required;"
        return settings

    def _format(self, i: int, cluster_id: str) -> None:
        users = [
            part
            for name, password in self.users.items()
            for part in ("--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]")
        ]
        self.tool(
            "kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(self._properties(i)), *users
        )

    def _launch(self, i: int) -> None:
        command = [java() or "java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", _jars()]
        self._brokers[i] = _Process([*command, "kafka.Kafka", str(self._properties(i))], self._log(i))

    def _log(self, i: int) -> Path:
        return self.folder / f"broker-{i}.log"

    def _wait(self, i: int) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if not self._running(i).is_alive:
                break
            if self._is_serving(i):
                return
            time.sleep(0.1)
        raise AssertionError(f"broker {i} does not serve. Its log, {self._log(i)}:\n{self._log(i).read_text()[-4000:]}")

    def _is_serving(self, i: int) -> bool:
        """It answers by itself, and the cluster counts it among the living."""
        # Here, because every test loads this file: only those that start a broker wait for the import.
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        address = f"127.0.0.1:{self._internal[i]}"
        try:
            with socket.create_connection(("127.0.0.1", self._internal[i]), timeout=1):
                pass
            admin = KafkaAdminClient(bootstrap_servers=address, bootstrap_timeout_ms=2000, request_timeout_ms=5000)
        except (OSError, KafkaError):
            return False
        try:
            return i + 1 in {broker["broker_id"] for broker in admin.describe_cluster()["brokers"]}
        except KafkaError:
            return False
        finally:
            admin.close()

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Process:
    """One broker's process, with a guard beside it that kills it when this process is gone.

    The guard waits on a pipe whose other end is ours: it closes however we die. (PR_SET_PDEATHSIG would fire when the
    THREAD that started the broker ends, and tests restart brokers from threads.)
    """

    def __init__(self, command: list[str], log: Path) -> None:
        with log.open("ab") as file:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=log.parent, start_new_session=True
            )
        guard = ["sh", "-c", f"cat > /dev/null; kill -9 {self._popen.pid}"]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        atexit.register(self.kill)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """Safe to call again: a process that was waited for is not signalled."""
        self._popen.kill()
        self._reap()

    def terminate(self) -> None:
        """In order; by force where it does not end."""
        self._popen.terminate()
        try:
            self._popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
        self._reap()

    def _reap(self) -> None:
        # The guard first, so that it can never kill another process that got the broker's id.
        if self._guard.poll() is None:
            os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
            assert self._guard.stdin is not None
            self._guard.stdin.close()
        self._popen.wait()
        atexit.unregister(self.kill)


def free_ports(num: int, *, but: Sequence[int] = ()) -> list[int]:
    """Loopback ports that nobody listens on at the moment; another number at every call."""
    found: list[int] = []
    draw = random.SystemRandom()
    while len(found) < num:
        port = draw.choice(PORTS)
        with socket.socket() as probe:
            if port in found or port in but or probe.connect_ex(("127.0.0.1", port)) == 0:
                continue
        found.append(port)
    return found


def _addresses(ports: Sequence[int]) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in ports)


def _jars() -> str:
    return f"{home()}/libs/*"
