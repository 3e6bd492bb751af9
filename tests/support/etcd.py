"""Real etcd for tests (Debian's etcd-server): one node, or a cluster with mutual TLS.

The fixtures are offered to all rooms by ``tests/conftest.py``. A test that changes what the
server is (users, compaction that others would feel, killed members) starts one of its own with
``single_node`` or ``three_nodes``.
"""

from __future__ import annotations

import json
import re
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import HOST, Daemon, PortReservation
from tests.support.pki import Authority, Certificate

READY_S = 100


@contextmanager
def fast_directory(prefix: str) -> Iterator[Path]:
    """A temporary directory, in memory where that is possible: etcd waits for its disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=shm if shm.is_dir() else None) as text:
        yield Path(text)


@dataclass
class EtcdMember:
    """One etcd process. ``endpoint`` is ``127.0.0.1:port``."""

    name: str
    endpoint: str
    peer: str
    daemon: Daemon
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"{'https' if self.tls else 'http'}://{self.endpoint}"

    def call(self, path: str, body: Any = None, seconds: float = 60) -> Any:
        """The JSON answer of etcd's HTTP gateway: POST with a body, else GET. Raises OSError.

        It is waited for ``seconds``.
        """
        data = None if body is None else json.dumps(body).encode()
        return json.loads(self._read(path, data, seconds))

    def asked(self) -> int:
        """How many calls to read or write it has had; those of the HTTP gateway count, too."""
        counted = re.findall(
            rb'^grpc_server_started_total{.*="etcdserverpb.KV".*} (\d+)$',
            self._read("/metrics", None, 60),
            re.MULTILINE,
        )
        return sum(map(int, counted))

    def ready(self) -> bool:
        """Whether it serves, which takes a leader."""
        try:
            return bool(self.call("/health", seconds=5)["health"] == "true")
        except (OSError, ValueError):
            return False

    def _read(self, path: str, data: bytes | None, seconds: float) -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", data)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls)
        )
        with opener.open(request, timeout=seconds) as answer:
            found: bytes = answer.read()
            return found

    def start(self) -> None:
        """Start, or start again, with the data it had; returns when it serves."""
        self.daemon.start()
        self.daemon.wait(self.ready, READY_S)

    def kill(self) -> None:
        """SIGKILL."""
        self.daemon.kill()


@dataclass
class Etcd:
    """A cluster of one or more members. ``certificate`` is for clients; None: plain HTTP."""

    members: list[EtcdMember]
    certificate: Certificate | None = None
    _reservations: list[PortReservation] = field(default_factory=list)

    @property
    def endpoints(self) -> list[str]:
        """``127.0.0.1:port`` of every member."""
        return [member.endpoint for member in self.members]

    @property
    def urls(self) -> list[str]:
        """The URL for clients of every member."""
        return [member.url for member in self.members]

    def leader(self) -> EtcdMember:
        """The member that leads. Raises RuntimeError while there is none."""
        for member in self.members:
            if member.daemon.running:
                try:
                    status = member.call("/v3/maintenance/status", {}, seconds=5)
                except (OSError, ValueError):
                    continue
                if status.get("leader") == status["header"]["member_id"]:
                    return member
        raise RuntimeError("no leader")

    def start(self) -> None:
        """Start the members that do not run; returns when all serve."""
        stopped = [member for member in self.members if not member.daemon.running]
        for member in stopped:
            member.daemon.start()
        for member in stopped:
            member.daemon.wait(member.ready, READY_S)

    def kill(self) -> None:
        """SIGKILL to every member."""
        for member in self.members:
            member.kill()


def _member(
    directory: Path, name: str, ports: tuple[int, int], tls: Certificate | None, cluster: str
) -> EtcdMember:
    scheme = "https" if tls else "http"
    endpoint, peer = (f"{HOST}:{port}" for port in ports)
    command = [
        *("etcd", "--name", name, "--data-dir", str(directory / name)),
        *("--listen-client-urls", f"{scheme}://{endpoint}"),
        *("--advertise-client-urls", f"{scheme}://{endpoint}"),
        *("--listen-peer-urls", f"{scheme}://{peer}"),
        *("--initial-advertise-peer-urls", f"{scheme}://{peer}"),
        *("--initial-cluster", cluster, "--initial-cluster-token", directory.name),
        *("--logger", "zap", "--log-outputs", "stderr"),
    ]
    if tls:
        for prefix in ("", "peer-"):
            command += [f"--{prefix}client-cert-auth", f"--{prefix}trusted-ca-file={tls.ca}"]
            command += [f"--{prefix}cert-file={tls.cert}", f"--{prefix}key-file={tls.key}"]
    daemon = Daemon(command, directory / f"{name}.log")
    return EtcdMember(name, endpoint, peer, daemon, tls.client_context() if tls else None)


@contextmanager
def _cluster(size: int, *, tls: bool) -> Iterator[Etcd]:
    if shutil.which("etcd") is None:
        raise RuntimeError("etcd is missing: apt-get install etcd-server")
    with fast_directory("manx-etcd-") as directory, ExitStack() as stack:
        certificate = Authority(directory).issue("root") if tls else None
        reservations = [PortReservation() for _ in range(2 * size)]
        for reservation in reservations:
            stack.callback(reservation.close)
        numbers = [reservation.port for reservation in reservations]
        pairs = dict(
            zip(
                (f"m{n}" for n in range(size)),
                zip(numbers[::2], numbers[1::2], strict=True),
                strict=True,
            )
        )
        scheme = "https" if tls else "http"
        initial = ",".join(f"{name}={scheme}://{HOST}:{peer}" for name, (_, peer) in pairs.items())
        members = [
            _member(directory, name, ports, certificate, initial) for name, ports in pairs.items()
        ]
        etcd = Etcd(members, certificate, reservations)
        stack.callback(etcd.kill)
        etcd.start()
        yield etcd


@contextmanager
def single_node() -> Iterator[Etcd]:
    """One member, plain HTTP; serves after about half a second."""
    with _cluster(1, tls=False) as etcd:
        yield etcd


@contextmanager
def three_nodes() -> Iterator[Etcd]:
    """Three members, mutual TLS between all; the client's certificate is of user ``root``."""
    with _cluster(3, tls=True) as etcd:
        yield etcd


@pytest.fixture(scope="session")
def etcd() -> Iterator[Etcd]:
    """One etcd for the whole session: use keys of your own, and leave it running."""
    with single_node() as made:
        yield made


@pytest.fixture
def etcd_cluster() -> Iterator[Etcd]:
    """Three members with mutual TLS, for this test alone: kill what you like."""
    with three_nodes() as made:
        yield made
