"""Network namespaces: make, open, remove, and act inside. See network_namespaces(7)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 0x2
_NS_GET_NSTYPE = 0xB703
_OWN = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _setns(fd: int) -> None:
    _check(_libc.setns(fd, _CLONE_NEWNET), f"setns to fd {fd}")


def own_namespace() -> int:
    """A new file descriptor of the calling thread's network namespace."""
    return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def inside(fd: int, home: int | None = None) -> Iterator[None]:
    """The calling thread, and it alone, is in the namespace ``fd`` for the block.

    ``home``: a descriptor of the thread's own namespace, where one is at hand.

    Sockets made and processes started within belong to that namespace. Never await or
    yield within. A thread that cannot come back would do to the wrong namespace what is
    meant for its own, so the process is aborted.
    """
    back = own_namespace() if home is None else home
    try:
        _setns(fd)
        try:
            yield
        finally:
            _return_to(back)
    finally:
        if home is None:
            os.close(back)


def in_namespace(
    fd: int | None, home: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """``inside(fd, home)``, or, for None, where the thread is."""
    return contextlib.nullcontext() if fd is None else inside(fd, home)


def _return_to(home: int) -> None:
    try:
        _setns(home)
    except OSError as error:
        print(f"cannot return to the own network namespace: {error}; aborting", file=sys.stderr)
        sys.stderr.flush()
        os.abort()


def call_inside(fd: int, function: Callable[[], T]) -> T:
    """The result of ``function``, called in a fresh thread that lives in the namespace ``fd``."""

    def enter_and_call() -> T:
        _setns(fd)
        return function()

    return in_fresh_thread(enter_and_call)


def in_fresh_thread(function: Callable[[], T]) -> T:
    """The result of ``function``, called in a thread of its own, which then ends."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def is_network_namespace(fd: int) -> bool:
    """Whether a file descriptor means a network namespace. See ioctl_ns(2)."""
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


def same_namespace(one: int, other: int) -> bool:
    """Whether two file descriptors mean the same namespace."""
    first, second = os.fstat(one), os.fstat(other)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


class Namespace:
    """A network namespace held open by ``fd``; ``path`` is where it is mounted, if it is.

    An anonymous one (no path) ends with its last process, socket and descriptor, so a
    crash of its owner leaves nothing behind.
    """

    def __init__(self, fd: int, path: Path | None = None) -> None:
        self._fd = fd
        self.path = path

    @classmethod
    def create(cls, path: Path | None = None) -> Namespace:
        """Make a namespace and mount it on ``path``, as ``ip netns add`` does, if given.

        Its loopback interface is down, as the kernel makes it. Raises FileExistsError,
        OSError.
        """
        if path is None:
            return cls(in_fresh_thread(_unshare))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o444, exist_ok=False)
        try:
            return cls(in_fresh_thread(lambda: _unshare(path)), path)
        except BaseException:
            path.unlink()
            raise

    @classmethod
    def open(cls, path: Path) -> Namespace:
        """The namespace mounted on ``path``, also ``/proc/PID/ns/net``.

        Raises OSError, ValueError where ``path`` is something else.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not is_network_namespace(fd):
            os.close(fd)
            raise ValueError(f"{path}: is not a network namespace")
        return cls(fd, path)

    @property
    def fd(self) -> int:
        """The descriptor. Raises ValueError after ``close``."""
        if self._fd < 0:
            raise ValueError(f"network namespace {self.path or '(anonymous)'} is closed")
        return self._fd

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the descriptor; the mount, if any, stays. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Let go of descriptor and mount, as ``ip netns del`` does. May be called again."""
        self.close()
        if self.path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if _libc.umount2(os.fsencode(self.path), _MNT_DETACH) != 0:
                code = ctypes.get_errno()
                # EINVAL: not a mount point, left by a crash between creating and mounting
                if code != errno.EINVAL:
                    raise OSError(code, f"umount {self.path}: {os.strerror(code)}")
            self.path.unlink()


def _unshare(path: Path | None = None) -> int:
    """Move the calling thread to a new namespace; its descriptor, and a mount on ``path``."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare network namespace")
    fd = own_namespace()
    if path is not None:
        source = _OWN.encode()
        if _libc.mount(source, os.fsencode(path), b"none", _MS_BIND, None) != 0:
            code = ctypes.get_errno()
            os.close(fd)
            raise OSError(code, f"mount namespace on {path}: {os.strerror(code)}")
    return fd
