"""BFD's process: what 200 peers cost, and how long the death of one goes unseen.

Both ends are real processes in namespaces of their own, joined by a veth pair; the peers are 200
addresses of one machine, each with a session of its own. ``detect_s``: from the moment that
nothing of a peer arrives any more until the agent is told, the slowest of the tries.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from api.net import V4, host_net, parse_net
from bird_glue.bfd import SINGLE_HOP_PORT, Session, Settings, State, parse
from bird_glue.detector import Detector, Failure, FromDetector, Timing, Watch, find, kill
from kernel.netns import Namespace, inside
from tests.support.netns import connect, eventually, fresh_namespace
from tests.support.netns import run as run_in

PEERS = 200
_OWN = "172.30.0.1"
_FIRST = parse_net("172.30.1.0").address
_MEASURED_SECONDS = 20.0
_TRIES = 5
_TICK = os.sysconf("SC_CLK_TCK")


class _Peers:
    """The other ends, in a thread of this process: as many addresses, sockets and sessions."""

    def __init__(self, namespace: Namespace, count: int) -> None:
        self.addresses = [host_net(V4, _FIRST + n) for n in range(1, count + 1)]
        self.silent: set[str] = set()
        settings = Settings(500_000, 5, active=False)
        now = time.monotonic()
        self._sessions: dict[str, tuple[Session, socket.socket]] = {}
        with inside(namespace.fd):
            for number, net in enumerate(self.addresses, 1):
                text = str(net).partition("/")[0]
                made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                made.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)
                made.bind((text, SINGLE_HOP_PORT))
                self._sessions[text] = Session(settings, number, now), made
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(0.05):
            now = time.monotonic()
            for text, (session, end) in self._sessions.items():
                answers: list[bytes | None] = []
                with contextlib.suppress(BlockingIOError):
                    while True:
                        answers.append(session.receive(parse(end.recv(100)), now))
                if session.due <= now:
                    answers.append(session.advance(now, 0.5))
                for data in answers:
                    if data is not None and text not in self.silent:
                        end.sendto(data, (_OWN, SINGLE_HOP_PORT))

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        for _, end in self._sessions.values():
            end.close()


@contextlib.contextmanager
def _fabric() -> Iterator[tuple[Namespace, Namespace]]:
    with fresh_namespace() as near, fresh_namespace() as far:
        connect(near, "eth0", far, "eth0", [f"{_OWN}/16", "172.30.0.2/16"])
        lines = "".join(
            f"address add {host_net(V4, _FIRST + n)} dev eth0\n" for n in range(1, PEERS + 1)
        )
        run_in(far, "ip", "-batch", "-", stdin=lines)
        yield near, far


def run() -> dict[str, float]:
    """The figures."""
    with tempfile.TemporaryDirectory() as directory:
        return _measure(Path(directory))


def _measure(directory: Path) -> dict[str, float]:
    with _fabric() as (near, far), contextlib.ExitStack() as stack:
        peers = _Peers(far, PEERS)
        stack.callback(peers.close)
        told: queue.SimpleQueue[FromDetector] = queue.SimpleQueue()
        detector = Detector(directory, told.put, Timing())
        stack.callback(kill, directory)
        stack.callback(detector.close)
        own = parse_net(_OWN)
        detector.configure(
            {net: Watch(net, own, active=True, multihop=False) for net in peers.addresses}
        )
        failures: list[Failure] = []

        def turned(condition: Callable[[], bool]) -> Callable[[], bool]:
            def turn() -> bool:
                now = time.monotonic()
                with inside(near.fd):
                    detector.step(now)
                while not told.empty():
                    failures.extend(detector.handle(told.get(), now))
                return condition()

            return turn

        def all_up() -> bool:
            found = [detector.get(net) for net in peers.addresses]
            return all(peer is not None and peer.state is State.UP for peer in found)

        eventually(turned(all_up), 30)
        pid = find(directory)
        until = time.monotonic() + _MEASURED_SECONDS
        before = _seconds(pid)
        eventually(turned(lambda: time.monotonic() >= until), 60)
        cpu = (_seconds(pid) - before) / _MEASURED_SECONDS * 100
        slowest = 0.0
        for net in peers.addresses[:_TRIES]:
            failures.clear()
            peers.silent.add(str(net).partition("/")[0])
            began = time.monotonic()
            eventually(turned(lambda: bool(failures)), 10)
            slowest = max(slowest, time.monotonic() - began)
        return {
            "peers": float(PEERS),
            "cpu_pct": cpu,
            "rss_mb": _memory(pid),
            "detect_s": slowest,
        }


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _memory(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
