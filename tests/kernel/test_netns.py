"""Namespaces: made, entered, left and removed."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kernel.netns import (
    Namespace,
    call_inside,
    in_namespace,
    inside,
    is_network_namespace,
    own_namespace,
    same_namespace,
)
from tests.support.netns import run


def inode(path: str = "/proc/thread-self/ns/net") -> int:
    return Path(path).stat().st_ino


def test_inside_is_for_one_thread_and_one_block(namespace: Namespace) -> None:
    home = inode()
    seen: list[int] = []
    with inside(namespace.fd):
        assert inode() == os.fstat(namespace.fd).st_ino != home
        # a new thread starts where its creator is; another existing one is not moved
        assert inode(f"/proc/{os.getpid()}/ns/net") in (home, inode())
        child = subprocess.run(
            ["readlink", "/proc/self/ns/net"], capture_output=True, text=True, check=True
        )
        seen.append(int(child.stdout.strip()[5:-1]))
    assert inode() == home
    assert seen == [os.fstat(namespace.fd).st_ino]


def test_inside_comes_back_after_an_exception(namespace: Namespace) -> None:
    home = inode()
    with pytest.raises(KeyError), inside(namespace.fd):
        raise KeyError
    assert inode() == home


def test_inside_nests(namespace: Namespace) -> None:
    with Namespace.create() as other, inside(namespace.fd):
        with inside(other.fd):
            assert inode() == os.fstat(other.fd).st_ino
        assert inode() == os.fstat(namespace.fd).st_ino
        with in_namespace(None):
            assert inode() == os.fstat(namespace.fd).st_ino


def test_threads_do_not_disturb_each_other() -> None:
    wrong: list[tuple[int, int]] = []

    def work() -> None:
        with Namespace.create() as own:
            for _ in range(200):
                with inside(own.fd):
                    pair = inode(), os.fstat(own.fd).st_ino
                    if pair[0] != pair[1]:
                        wrong.append(pair)

    home = inode()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert inode() == home


def test_a_file_that_is_no_namespace_cannot_be_entered(tmp_path: Path) -> None:
    home = inode()
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(OSError, match="setns"), inside(file.fileno()):
            pass
        assert not is_network_namespace(file.fileno())
    with pytest.raises(ValueError, match="not a network namespace"):
        Namespace.open(tmp_path / "file")
    assert inode() == home


def test_a_thread_that_cannot_come_back_ends_the_process() -> None:
    # Without privileges in its own user namespace a thread cannot return.
    script = """
import os
from kernel.netns import Namespace, inside
with Namespace.create() as namespace:
    with inside(namespace.fd):
        os.setresuid(65534, 65534, 65534)
    print("still alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode < 0
    assert "still alive" not in done.stdout
    assert "cannot return to the own network namespace" in done.stderr


def test_call_inside_gives_results_and_errors(namespace: Namespace) -> None:
    home = inode()
    assert call_inside(namespace.fd, inode) == os.fstat(namespace.fd).st_ino
    with pytest.raises(ZeroDivisionError):
        call_inside(namespace.fd, lambda: 1 // 0)
    assert inode() == home


def test_an_anonymous_namespace_is_new_and_empty() -> None:
    with Namespace.create() as one, Namespace.create() as other:
        assert one.path is None
        assert is_network_namespace(one.fd)
        assert not same_namespace(one.fd, other.fd)
        links = run(one, "ip", "-br", "link").stdout.splitlines()
        assert [line.split()[:2] for line in links] == [["lo", "DOWN"]]
    with pytest.raises(ValueError, match="closed"):
        _ = one.fd
    one.close()


def test_a_mounted_namespace_lives_on_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "netns" / "one"
    made = Namespace.create(path)
    try:
        with Namespace.open(path) as again:
            assert same_namespace(made.fd, again.fd)
            own = own_namespace()
            assert not same_namespace(made.fd, own)
            os.close(own)
        with pytest.raises(FileExistsError):
            Namespace.create(path)
        made.close()
        assert inode(str(path)) != inode()
    finally:
        made.remove()
    assert not path.exists()
    made.remove()


def test_what_a_crash_left_of_a_mount_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "half"
    path.touch()
    Namespace(-1, path).remove()
    assert not path.exists()
