"""The program around it all: its socket, its lock, its arguments, a node that isn't there yet."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from bird_glue.agent import Agent
from bird_glue.settings import parse_router_id
from bird_glue.status import Request, StatusError, query
from datastore.connect import connect as connect_store
from kernel.netns import Namespace, inside
from tests.bird_glue.world import world
from tests.support.netns import connect, eventually


def ask(path: Path, line: bytes) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(line)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as reader:
            answer: dict[str, object] = orjson.loads(reader.readline())
    return answer


def program(run_dir: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bird_glue", *arguments],
        env={**os.environ, "MANX_RUN_DIR": str(run_dir), "MANX_NODENAME": "n1", **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_node_without_a_node_object_and_without_peers(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        node = made.node("n1")
        connect(node.namespace, "eth0", made.host("x").namespace, "eth0", ["172.31.1.11/24"])
        node.start()
        missing = "Node n1: metadata.name: 'n1': a Node object with this name"
        eventually(lambda: bool((s := node.status()) and s.problems == [missing]))
        made.store.block("n1", "10.1.0.0/26")
        made.store.node("n1", "172.31.1.11/24")
        eventually(lambda: node.routes() == ["blackhole 10.1.0.0/26 metric 1024"])
        status = node.status()
        assert status
        assert (status.problems, status.peers, status.pid) == ([], [], None)
        assert (status.asn, status.router_id) == (64512, "172.31.1.11")

        path = node.run_dir / "bgp.sock"
        for junk in (
            b"\n",
            b"{",
            b"[]\n",
            b'{"command": 5}\n',
            b'{"command": "x"}\n',
            b"\xff" * 9000,
        ):
            assert "error" in ask(path, junk)
        second = program(node.run_dir)
        assert second.returncode == 1
        assert "another manx-bird-glue is running" in second.stderr
        # an address the machine doesn't have
        made.store.node("n1", "172.31.1.99/24")
        made.store.node("n2", "172.31.1.12/24")
        wrong = "Node n1: spec.bgp.ipv4Address: '172.31.1.99': an address of an interface of this"
        eventually(lambda: bool((s := node.status()) and wrong in "".join(s.problems)))


def test_what_is_not_needed_is_not_in_memory(tmp_path: Path) -> None:
    """On each node, that is: OpenSSL, where the datastore is no server; in the children, more."""
    with world(tmp_path) as made:
        node = made.node("n1")
        connect(node.namespace, "eth0", made.host("x").namespace, "eth0", ["172.31.1.11/24"])
        made.store.node("n1", "172.31.1.11/24")
        made.store.node("n2", "172.31.1.12/24")
        node.start()
        eventually((node.run_dir / "exabgp.sock").exists)  # by then it has all it imports
        for pid in (node.agent.pid, node.exabgp()):
            mapped = Path(f"/proc/{pid}/maps").read_text()
            assert not any(f"lib{name}." in mapped for name in ("crypto", "ssl"))
    names = "import sys; sys.path.append(sys.argv[1]); import bird_glue.bfd_main, bird_glue.relay"
    command = [sys.executable, "-I", "-S", "-c", f"{names}; print(*sys.modules)"]
    root = str(Path(__file__).parents[2])
    loaded = subprocess.run(
        [*command, root], check=True, capture_output=True, text=True, timeout=30
    )
    unneeded = {"asyncio", "dataclasses", "hashlib", "inspect", "logging", "pathlib", "random"}
    assert not unneeded & set(loaded.stdout.split())


def test_leaving_where_the_kernel_gives_no_answer(tmp_path: Path, namespace: Namespace) -> None:
    """What holds passwords goes all the same, and who asked is told what didn't."""
    files = [tmp_path / name for name in ("bgp.passwords", "bgp.objects", "exabgp.conf")]
    for path in files:
        path.write_text("[]")
    request, threshold = Request("leave"), gc.get_threshold()
    with contextlib.closing(connect_store(f"sqlite://{tmp_path}/store.db")) as store:
        with inside(namespace.fd):
            agent = Agent("n1", tmp_path, store)
        agent._netlink.close()
        agent._queue.put(request)
        try:
            agent.run()
        finally:
            gc.unfreeze()
            gc.set_threshold(*threshold)
    words = "; ".join(
        f"not all {what} could be removed: [Errno 9] Bad file descriptor"
        for what in ("routes", "addresses")
    )
    assert request.wait(0) == {"error": words}
    assert not any(path.exists() for path in files)


def test_nobody_to_ask(tmp_path: Path) -> None:
    with pytest.raises(StatusError, match="does manx-bird-glue run"):
        query(tmp_path)
    result = program(tmp_path, "leave")
    assert result.returncode == 1
    assert "does manx-bird-glue run" in result.stderr


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("fly", 2)])
def test_arguments(tmp_path: Path, argument: str, code: int) -> None:
    result = program(tmp_path, argument)
    assert result.returncode == code
    assert "manx-bird-glue leave" in result.stderr


@pytest.mark.parametrize("text", ["abc", "2001:db8::1", "0.0.0.0", "224.0.0.1", "10.0.0.0/24", "1"])
def test_router_ids_that_are_none_end_it_before_anything_is_touched(
    tmp_path: Path, text: str
) -> None:
    result = program(tmp_path, MANX_ROUTER_ID=text)
    assert result.returncode == 1
    assert f"MANX_ROUTER_ID={text!r}: expected 0.0.0.1 to 223" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "hash", "10.0.0.1", "223.255.255.255"])
def test_router_ids(text: str) -> None:
    assert parse_router_id(text) == text
