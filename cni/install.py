"""Putting the plugin onto a node: the executable, then the configuration that makes it used.

Each file appears whole or not at all, and one that is right already is not touched, since
runtimes reload when their directories change. What an installation that died left is used up by
the next, or removed with the rest. Nothing in these files expires: who may ask the daemon is
decided at its socket, so there is no token to renew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from cni.attachment import DEFAULT_NETWORK
from cni.config import POLICY_WAIT, VERSIONS, parse_configuration
from cni.errors import CniError

PLUGIN = "manx"
IPAM_PLUGIN = "manx-ipam"  # the same executable: addresses alone, for other main plugins
CONFIGURATION = "10-manx.conflist"

_CLIENT = Path(__file__).parent / "client"
_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra")
# musl first: a static program of glibc spends 0.12 ms on asking the CPU what it can, which in a
# virtual machine the hypervisor answers; half of what the whole client takes.
_COMPILERS = ("musl-gcc", "cc", "gcc", "clang")
_COMPILE_SECONDS = 60
_VERSION_SECONDS = 10
_OF_LISTS = VERSIONS[VERSIONS.index("0.3.0") :]  # before, there were no lists
_COMMON = "1.0.0"  # of the spec: what every runtime in use speaks
# Debian's has everything that the fallback imports built in, and starts in 6 ms.
_PYTHON = Path("/usr/bin/python3")
_SOCKET = Path("/run/manx/cni.sock")  # in fallback.py
_TYPE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")  # the name of an executable
_SOCKET_PATH = re.compile(r"/[a-zA-Z0-9_./-]{1,106}")

_USUAL: tuple[Mapping[str, Any], ...] = (
    {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
)

_log = logging.getLogger(__name__)


# Of the list, not of an entry in it; and the name of our executable.
_OF_THE_LIST = ("name", "cniVersion", "cniVersions", "type")


def install(
    bin_dir: Path,
    conf_dir: Path,
    socket: Path,
    *,
    mtu: int = 0,
    config: str = "",
    chain: Iterable[str] = (),
) -> list[Path]:
    """Install, or bring up to date; returns the files.

    ``socket``: where the daemon listens. ``mtu`` in bytes, 0: what the uplink carries.
    ``config``: what else the plugin's configuration shall have, a JSON object; its values win,
    objects in it are merged. ``chain``: configurations (JSON) of plugins to run after this one.
    Raises ValueError for a wrong one, OSError.
    """
    if not _SOCKET_PATH.fullmatch(str(socket)):
        raise ValueError(
            f"socket {str(socket)!r}: expected an absolute path of at most 107 letters, digits,"
            " '_', '.', '-', '/', since it becomes part of the executable"
        )
    own = plugin_configuration(mtu, config)
    configuration = configuration_list(own, [_chained(text) for text in chain], bin_dir)
    for directory in (bin_dir, conf_dir):
        directory.mkdir(parents=True, exist_ok=True)
    plugins, conflist = [bin_dir / PLUGIN, bin_dir / IPAM_PLUGIN], conf_dir / CONFIGURATION
    client = executable(socket)
    # The executable first: from the moment the configuration is there it may be run.
    for plugin in plugins:
        _write(plugin, client, 0o755)
    _write(conflist, configuration, 0o644)
    return [*plugins, conflist]


def usual_chain(bin_dir: Path, chain: Iterable[str]) -> list[str]:
    """What follows where it is installed: the reference plugin ``portmap``.

    It does something for pods that ask for it (``hostPort``), of which the runtime tells it. Not
    ``bandwidth``: felix limits what pods ask for, and only one can do that. None that ``chain``
    has already. Raises ValueError for a ``chain`` that is none.
    """
    present = {_chained(text)["type"] for text in chain}
    return [
        orjson.dumps(plugin).decode()
        for plugin in _USUAL
        if plugin["type"] not in present and (bin_dir / str(plugin["type"])).is_file()
    ]


def rivals(chain: Iterable[str]) -> list[str]:
    """What to know about plugins that shall run after ours. Raises ValueError."""
    if all(_chained(text)["type"] != "bandwidth" for text in chain):
        return []
    return [
        "chained plugin bandwidth: felix limits pods that ask for it by annotation, and their ADDs"
        " fail where this plugin wants to do it, too"
    ]


def uninstall(bin_dir: Path, conf_dir: Path) -> list[Path]:
    """Remove what ``install`` made; returns what was there. Raises OSError."""
    removed = []
    # The configuration first: as long as it is there the executable may be run.
    for path in (conf_dir / CONFIGURATION, bin_dir / PLUGIN, bin_dir / IPAM_PLUGIN):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _sole(path.parent):
            _unfinished(path).unlink(missing_ok=True)
            path.unlink()
            removed.append(path)
    return removed


def preferred(conf_dir: Path) -> list[Path]:
    """Configurations of others that a runtime takes before ours: the first name wins."""
    found = (path for path in conf_dir.iterdir() if path.suffix in (".conf", ".conflist", ".json"))
    return sorted(path for path in found if path.name < CONFIGURATION)


def plugin_configuration(mtu: int, config: str) -> dict[str, Any]:
    """Our entry in the list. Raises ValueError where the daemon would refuse it."""
    plugin: dict[str, Any] = {
        "type": PLUGIN,
        "mtu": mtu,
        "policy_setup_timeout_seconds": POLICY_WAIT,
        "ipam": {"type": IPAM_PLUGIN},
        "capabilities": {"ips": True, "mac": True},
    }
    if not config.strip():
        return plugin
    try:
        wanted = orjson.loads(config)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"config {config!r}: not JSON: {error}") from None
    if not isinstance(wanted, dict):
        raise ValueError(f"config {config!r}: expected an object")
    for key in _OF_THE_LIST:
        if key in wanted:
            raise ValueError(
                f"config: {key}: {wanted[key]!r}: expected absent: it is not to choose"
            )
    plugin = _merged(plugin, wanted)
    known = {"name": DEFAULT_NETWORK, "cniVersion": _COMMON}
    try:
        parse_configuration(orjson.dumps(plugin | known), "ADD")
    except CniError as error:
        raise ValueError(f"config: {error.msg}") from None
    return plugin


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both objects' members; of two with the same name the other's, unless both are objects."""
    result = dict(one)
    for key, value in other.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merged(before, value)
        result[key] = value
    return result


def configuration_list(
    plugin: Mapping[str, Any], chain: Sequence[Mapping[str, Any]], bin_dir: Path
) -> bytes:
    """The network configuration list, in versions that every plugin of the chain speaks."""
    spoken = [_versions(bin_dir / chained["type"]) for chained in chain]
    versions = [version for version in _OF_LISTS if all(version in each for each in spoken)]
    if not versions:
        raise ValueError("the chained plugins have no version of CNI in common with this one")
    configuration = {
        "name": DEFAULT_NETWORK,
        # Runtimes that know nothing newer than 1.0.0 do not look at cniVersions either.
        "cniVersion": _COMMON if _COMMON in versions else versions[-1],
        "cniVersions": versions,
        "plugins": [plugin, *chain],
    }
    return orjson.dumps(configuration, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _versions(plugin: Path) -> Sequence[str]:
    """The versions a chained plugin speaks; up to 1.0.0 if it can't be asked.

    A runtime takes the newest of the list for the whole chain.
    """
    try:
        done = subprocess.run(
            [plugin],
            env={"CNI_COMMAND": "VERSION"},
            input=orjson.dumps({"cniVersion": _COMMON}),
            capture_output=True,
            check=True,
            timeout=_VERSION_SECONDS,
        )
        return tuple(map(str, orjson.loads(done.stdout)["supportedVersions"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        _log.warning("chained plugin %s: can't be asked for its versions: %s", plugin, why)
        return VERSIONS[: VERSIONS.index(_COMMON) + 1]


def executable(socket: Path) -> bytes:
    """The client: compiled where there is a C compiler, else the one in Python."""
    for compiler in filter(None, map(shutil.which, _COMPILERS)):
        try:
            return compiled(compiler, socket)
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or error
            _log.warning("%s can't compile the CNI client: %s", compiler, output)
    return interpreted(socket)


def interpreted(socket: Path) -> bytes:
    """The client in Python, as a script."""
    python = _PYTHON if _PYTHON.exists() else Path(sys.executable).resolve()
    source = (_CLIENT / "fallback.py").read_text()
    source = source.replace(f'SOCKET = "{_SOCKET}"', f'SOCKET = "{socket}"')
    return f"#!{python} -IS\n{source}".encode()


def compiled(compiler: str, socket: Path, flags: Sequence[str] = ()) -> bytes:
    """The client as ``compiler`` makes it, from the cache if it did so before."""
    source = _CLIENT / "manx.c"
    command = [compiler, *_FLAGS, *flags, f'-DMANX_CNI_SOCKET="{socket}"', str(source), "-o"]
    kind = "\0".join((platform.machine(), *command)).encode()
    key = hashlib.sha256(source.read_bytes() + kind).hexdigest()
    cached = _cache() / f"cni-client-{key[:32]}"
    with contextlib.suppress(OSError):
        return cached.read_bytes()
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / PLUGIN
        try:
            _run([*command, str(output), "-static"])
        except subprocess.CalledProcessError:  # no static libc on this machine
            _run([*command, str(output)])
        data = output.read_bytes()
    with contextlib.suppress(OSError):  # a node without a writable home compiles each time
        cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(cached, data, 0o600)
    return data


def _chained(text: str) -> Any:
    try:
        plugin = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"chained plugin {text!r}: not JSON: {error}") from None
    kind = plugin.get("type") if isinstance(plugin, dict) else None
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind):
        raise ValueError(f"chained plugin {text!r}: expected an object with a type")
    return plugin


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)


def _cache() -> Path:
    """The user's own cache directory: what lies there ends up being run as root."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manx"


def _write(path: Path, data: bytes, mode: int) -> None:
    """Replace a file in one step, unless it is right already; it is on the disk before its name."""
    with _sole(path.parent) as directory:
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == data and path.stat().st_mode & 0o7777 == mode:
                return
        temporary = _unfinished(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.fsync(directory)


def _unfinished(path: Path) -> Path:
    """Where a file is written; no runtime takes the name for a configuration."""
    return path.with_name(f".{path.name}.new")


@contextlib.contextmanager
def _sole(directory: Path) -> Iterator[int]:
    """One installer at a time in a directory; its descriptor."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
