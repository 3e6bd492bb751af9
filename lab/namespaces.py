"""Mount, UTS and PID namespaces, and processes inside a set of them.

See namespaces(7), mount_namespaces(7). Network namespaces by themselves: ``kernel.netns``.

A mount namespace can only be entered by a task that shares its working directory with no
other, so everything here happens in a fresh thread that first gives up that sharing
(``unshare(CLONE_FS)``), acts, and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from kernel.netns import in_fresh_thread

T = TypeVar("T")

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000

_OWN = Path("/proc/thread-self/ns")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """unshare(2) of the calling thread. Raises OSError."""
    _check(_libc.unshare(flags), "unshare (root is needed)")


@dataclass(slots=True)
class Namespaces:
    """Descriptors of the namespaces of a member of a lab. They keep the namespaces alive.

    ``pid`` is that of the whole lab: processes started inside die with the lab.
    """

    mnt: int
    net: int
    uts: int
    pid: int

    def fds(self) -> list[int]:
        """The descriptors in the order of the fields, as ``from_fds`` takes them."""
        return [self.mnt, self.net, self.uts, self.pid]

    @classmethod
    def from_fds(cls, fds: Sequence[int]) -> Namespaces:
        """The other way round from ``fds``."""
        mnt, net, uts, pid = fds
        return cls(mnt, net, uts, pid)

    def duplicate(self, *, net: int | None = None) -> Namespaces:
        """The same namespaces, or with another network namespace, by descriptors of their own."""
        return Namespaces(
            os.dup(self.mnt),
            os.dup(self.net if net is None else net),
            os.dup(self.uts),
            os.dup(self.pid),
        )

    def close(self) -> None:
        """Let go of the descriptors. May be called again."""
        for name in ("mnt", "net", "uts", "pid"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def enter(self) -> None:
        """Move the calling thread inside, for good: as ``nsenter --mount --net --uts --pid``.

        The PID namespace takes effect for the thread's children only.
        """
        unshare(CLONE_FS)
        for fd, kind in (
            (self.pid, CLONE_NEWPID),
            (self.uts, CLONE_NEWUTS),
            (self.net, CLONE_NEWNET),
            (self.mnt, CLONE_NEWNS),
        ):
            _check(_libc.setns(fd, kind), f"setns, flag {kind:#x}")

    def call(self, function: Callable[[], T]) -> T:
        """The result of ``function``, called in a thread inside. It must start no thread."""

        def enter_and_call() -> T:
            self.enter()
            return function()

        return in_fresh_thread(enter_and_call)

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        start_new_session: bool = False,
        text: bool = False,
    ) -> subprocess.Popen[Any]:
        """Start a process inside, in ``cwd`` where that can be seen there, else in /.

        Raises OSError, as ``subprocess.Popen``.
        """

        def start() -> subprocess.Popen[Any]:
            return subprocess.Popen(
                argv,
                env=None if env is None else dict(env),
                cwd=cwd if Path(cwd).is_dir() else "/",
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=start_new_session,
                text=text,
            )

        return self.call(start)


def make_namespaces(
    hostname: str, binds: Mapping[Path, Path], pid: int, net_path: Path
) -> Namespaces:
    """New mount, network and UTS namespaces, furnished.

    The mount namespace is a copy of the caller's with ``binds`` applied (mount point → the
    directory shown there) and a /sys that shows the new network namespace. That one is
    also mounted on ``net_path`` in the caller's mount namespace, as ``ip netns add`` does.
    ``pid`` is duplicated into the result.
    """
    net_path.parent.mkdir(parents=True, exist_ok=True)
    net_path.touch(mode=0o444, exist_ok=False)

    def make() -> Namespaces:
        unshare(CLONE_NEWNET)
        bind(_OWN / "net", net_path)
        unshare(CLONE_FS | CLONE_NEWNS | CLONE_NEWUTS)
        raw = hostname.encode()
        _check(_libc.sethostname(raw, len(raw)), f"set host name {hostname}")
        mount_keeping_below(Path("/sys"), lambda: mount("sysfs", Path("/sys"), "sysfs"))
        # /run last: the directories shown elsewhere lie beneath it
        for target in sorted(binds, key=lambda path: (path == Path("/run"), path)):
            bind(binds[target], target)
        mnt, net, uts = (
            os.open(_OWN / name, os.O_RDONLY | os.O_CLOEXEC) for name in ("mnt", "net", "uts")
        )
        return Namespaces(mnt, net, uts, os.dup(pid))

    return in_fresh_thread(make)


def make_pod_namespace(node: Namespaces, path: Path) -> int:
    """A network namespace mounted on ``path`` inside the node, as ``ip netns add`` there.

    Returns its descriptor. Raises FileExistsError, OSError.
    """

    def make() -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o444, exist_ok=False)
        try:
            unshare(CLONE_NEWNET)
            bind(_OWN / "net", path)
        except OSError:
            path.unlink()
            raise
        return os.open(_OWN / "net", os.O_RDONLY | os.O_CLOEXEC)

    return node.call(make)


def remove_pod_namespace(node: Namespaces, path: Path) -> None:
    """Undo ``make_pod_namespace``; nothing to do is no error."""

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            detach(path)
            path.unlink()

    node.call(remove)


def make_private() -> None:
    """No mount made here is seen outside: ``mount --make-rprivate /``."""
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "make mounts private")


def mount(source: str, target: Path, kind: str, options: str = "", flags: int = 0) -> None:
    """``mount -t KIND -o OPTIONS SOURCE TARGET``. Raises OSError."""
    result = _libc.mount(
        source.encode(), os.fsencode(target), kind.encode(), flags, options.encode() or None
    )
    _check(result, f"mount {kind} on {target}")


def bind(source: Path, target: Path) -> None:
    """``mount --rbind SOURCE TARGET``. Raises OSError."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), b"none", _MS_BIND | _MS_REC, None
    )
    _check(result, f"bind {source} to {target}")


def detach(target: Path) -> None:
    """``umount --lazy TARGET``; FileNotFoundError when there is no such path."""
    _check(_libc.umount2(os.fsencode(target), 2), f"umount {target}")


def mount_keeping_below(target: Path, mount_it: Callable[[], None]) -> None:
    """Mount over ``target``, and show again what was mounted beneath it before."""
    kept = [(point, os.open(point, os.O_PATH | os.O_CLOEXEC)) for point in _outermost_below(target)]
    try:
        mount_it()
        for point, fd in kept:
            if point.exists():
                bind(Path(f"/proc/self/fd/{fd}"), point)
    finally:
        for _, fd in kept:
            os.close(fd)


def _outermost_below(target: Path) -> list[Path]:
    """Mount points under ``target`` that lie under no other mount point of it; proc(5)."""
    points: set[Path] = set()
    for line in Path("/proc/thread-self/mountinfo").read_text().splitlines():
        # mountinfo escapes space, tab, newline and backslash as octal
        raw = line.split(" ")[4].encode().decode("unicode_escape")
        path = Path(raw.encode("latin-1").decode())
        if target in path.parents:
            points.add(path)
    return sorted(point for point in points if not points.intersection(point.parents))
