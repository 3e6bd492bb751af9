"""Network namespaces for tests: anonymous, so that nothing is left whatever happens.

The fixtures are offered to all rooms by ``tests/conftest.py``.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from api.net import parse_interface
from kernel.addresses import Address, address_add
from kernel.links import Link, Links, link_up, parse_link, veth
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside


@contextmanager
def fresh_namespace() -> Iterator[Namespace]:
    """A namespace of its own, with ``lo`` up, for the block."""
    with Namespace.create() as namespace:
        with NetlinkSocket(netns_fd=namespace.fd) as netlink:
            assert netlink.batch([link_up(1)]) == []
        yield namespace


def run(
    namespace: Namespace, *command: str, check: bool = True, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the namespace; its output is text. At most 60 seconds."""
    with inside(namespace.fd):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    with process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=60)
        except BaseException:
            process.kill()
            raise
    assert not check or process.returncode == 0, f"{command}: {process.returncode}: {stderr}"
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def connect(
    one: Namespace, name: str, other: Namespace, peer: str, addresses: Sequence[str] = ()
) -> tuple[Link, Link]:
    """A veth pair between two namespaces, both ends up; returns both ends.

    ``addresses`` are text such as ``10.0.0.1/24``: the first for ``one``, the second for
    ``other``, and so on in turn.
    """
    with (
        NetlinkSocket(netns_fd=one.fd) as near,
        NetlinkSocket(netns_fd=other.fd) as far,
    ):
        made = parse_link(near.request(veth(name, peer, peer_netns_fd=other.fd)))
        assert far.batch([link_up(made.peer_index)]) == []
        for turn, text in enumerate(addresses):
            host, network = parse_interface(text)
            socket, index = (far, made.peer_index) if turn % 2 else (near, made.index)
            address = Address(index, host, network.length)
            assert socket.batch([address_add(address)]) == []
        return Links(near).get(name), Links(far).get(peer)


# Seconds: of what must not take as long as a hold timer.
PROMPTLY = 20.0


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until ``condition`` is true. Fails after ``seconds``: more than a busy machine needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A fresh anonymous namespace with ``lo`` up."""
    with fresh_namespace() as made:
        yield made


@pytest.fixture
def netlink(namespace: Namespace) -> Iterator[NetlinkSocket]:
    """A netlink socket that speaks to ``namespace``."""
    with NetlinkSocket(netns_fd=namespace.fd) as socket:
        yield socket
