"""Kernel settings under /proc/sys. See sysctl(8), proc(5).

A path is a tuple, ``("net", "ipv4", "conf", "cali1.2", "rp_filter")``, because interface
names may hold dots. What is below ``net`` belongs to the network namespace of the thread
that opens the file, whichever /proc is mounted, so wrap a call in ``kernel.netns.inside``
to act on another namespace.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/proc/sys")


def read(path: tuple[str, ...]) -> str:
    """The value, without the newline. Raises OSError (FileNotFoundError), ValueError."""
    return _file(path).read_text().strip()


def write(path: tuple[str, ...], value: str | int) -> bool:
    """Set the value unless it is that already; whether it was changed.

    Raises OSError (FileNotFoundError where the kernel has no such setting), ValueError.
    """
    if read(path) == str(value):
        return False
    file = _file(path)
    try:
        file.write_text(f"{value}\n")
    except OSError as error:
        raise OSError(error.errno, f"{file} = {value}: {error.strerror}") from error
    return True


def _file(path: tuple[str, ...]) -> Path:
    for part in path:
        if not part or "/" in part or part in (".", ".."):
            raise ValueError(f"sysctl {'.'.join(path)}: {part!r} is not a name in /proc/sys")
    return _ROOT.joinpath(*path)
