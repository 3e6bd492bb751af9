"""An installation that dies at any step, that others disturb, and that is kept up to date."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cni import install
from tests.cni.rig import ROOT
from tests.support.netns import eventually

SOCKET = Path("/run/elsewhere/cni.sock")
OTHERS = ("05-other.conflist", "99-other.conf", "loopback")

# Installs or uninstalls, one job a line, each in a process of its own that dies right before its
# n-th step on the file system. Prints how each ended.
MORTAL = """
import os, signal, sys
from pathlib import Path
from cni import install

def work(verb, directory, mtu, die):
    steps = 0
    def count(event, arguments):
        nonlocal steps
        watched = event in ("os.rename", "os.remove", "os.mkdir", "os.chmod", "open")
        if watched and directory in str(arguments[0]):
            steps += 1
            if steps == int(die):
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    paths = Path(directory, "bin"), Path(directory, "net.d")
    if verb == "install":
        install.install(*paths, Path("/run/elsewhere/cni.sock"), mtu=int(mtu))
    else:
        install.uninstall(*paths)

for line in sys.stdin:
    child = os.fork()
    if not child:
        work(*line.split())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Mortals:
    """Those who install and die."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, verb: str, directory: Path, mtu: int, die: int) -> bool:
        """Whether it came to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{verb} {directory} {mtu} {die}\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code == 0


@pytest.fixture
def mortals() -> Iterator[Mortals]:
    with subprocess.Popen(
        [sys.executable, "-c", MORTAL],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Mortals(process)
        assert process.stdin is not None
        process.stdin.close()


def whole(directory: Path) -> int | None:
    """The configured MTU; None without configuration. Fails when any file is not whole."""
    client = install.executable(SOCKET)
    conflist = directory / "net.d" / "10-manx.conflist"
    for name in ("manx", "manx-ipam"):
        plugin = directory / "bin" / name
        if plugin.exists() or conflist.exists():
            assert plugin.read_bytes() == client
            assert os.access(plugin, os.X_OK)
    if not conflist.exists():
        return None
    mtu: int = json.loads(conflist.read_text())["plugins"][0]["mtu"]
    return mtu


def test_killed_before_every_step(mortals: Mortals, tmp_path: Path) -> None:
    """Old or new, never neither; and the next installation leaves nothing behind."""
    for die in range(1, 100):
        directory = tmp_path / str(die)
        done = mortals.do("install", directory, 1400, die)
        if directory.exists():
            assert whole(directory) in (None, 1400)
        install.install(directory / "bin", directory / "net.d", SOCKET, mtu=1300)
        assert whole(directory) == 1300
        mortals.do("install", directory, 1400, die)
        assert whole(directory) in (1300, 1400)
        mortals.do("uninstall", directory, 0, die)
        whole(directory)
        install.uninstall(directory / "bin", directory / "net.d")
        left = [path for path in directory.rglob("*") if path.is_file()]
        assert left == []
        if done:
            assert die > 6
            return
    raise AssertionError("installing never ends")


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    for name in OTHERS:
        (tmp_path / name).write_text(name)
    before = {name: (tmp_path / name).stat().st_ino for name in OTHERS}
    install.install(tmp_path, tmp_path, SOCKET)
    assert install.preferred(tmp_path) == [tmp_path / OTHERS[0]]
    install.uninstall(tmp_path, tmp_path)
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before
    assert all((tmp_path / name).read_text() == name for name in OTHERS)


def test_installers_at_once(tmp_path: Path) -> None:
    """All of them end well, and the last to write wins as a whole."""
    command = [sys.executable, "-m", "cni", "install", "--bin-dir", str(tmp_path / "bin")]
    processes = [
        subprocess.Popen(
            [*command, "--conf-dir", str(tmp_path / "net.d"), "--mtu", str(1400 + number)],
            cwd=ROOT,
            env={**os.environ, "MANX_RUN_DIR": str(SOCKET.parent)},
            stdout=subprocess.DEVNULL,
        )
        for number in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert whole(tmp_path) in range(1400, 1404)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"manx", "manx-ipam", "10-manx.conflist"}


@contextmanager
def keeping(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    directories = ["--bin-dir", str(directory / "bin"), "--conf-dir", str(directory / "net.d")]
    command = [sys.executable, "-m", "cni", "install", "--keep", *directories, *arguments]
    environment = {**os.environ, "MANX_RUN_DIR": str(SOCKET.parent)}
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log) as process,
    ):
        try:
            eventually((directory / "net.d" / "10-manx.conflist").exists)
            yield process
        finally:
            process.kill()


def test_kept(tmp_path: Path) -> None:
    """What others remove comes back, settings are followed, wrong ones change nothing."""
    chained = tmp_path / "chained.json"
    chained.write_text('{"type": "tuning"}')
    conflist = tmp_path / "net.d" / "10-manx.conflist"

    def types() -> list[str]:
        try:
            return [plugin["type"] for plugin in json.loads(conflist.read_text())["plugins"]]
        except FileNotFoundError:
            return []

    with keeping(tmp_path, "--chain", f"@{chained}", "--no-usual-chain") as process:
        assert types() == ["manx", "tuning"]
        conflist.unlink()
        (tmp_path / "bin" / "manx").write_bytes(b"#!/bin/false\n")
        eventually(lambda: whole_or_not(tmp_path))
        # as a ConfigMap is changed: another file takes the name
        new = tmp_path / "new.json"
        new.write_text('{"type": "firewall"}')
        new.replace(chained)
        eventually(lambda: types() == ["manx", "firewall"])
        chained.write_text("{")
        eventually(lambda: "not JSON" in (tmp_path / "log").read_text())
        assert types() == ["manx", "firewall"]
        (tmp_path / "net.d" / "00-first.conflist").touch()
        chained.write_text('{"type": "tuning"}')
        eventually(lambda: types() == ["manx", "tuning"])
        eventually(lambda: "00-first.conflist comes first" in (tmp_path / "log").read_text())
        process.terminate()
        assert process.wait(60) == 0
    assert types() == ["manx", "tuning"]


def test_settings_are_kept(tmp_path: Path) -> None:
    """What somebody edits in the configuration is put back; the place to say it is followed."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"ipam": {"assign_ipv6": true}}')
    conflist = tmp_path / "net.d" / "10-manx.conflist"

    def plugin() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(conflist.read_text())["plugins"][0]
        return found

    with keeping(tmp_path, "--config", f"@{settings}"):
        assert plugin()["ipam"] == {"type": "manx-ipam", "assign_ipv6": True}
        before = conflist.read_text()
        conflist.write_text(before.replace("manx-ipam", "edited"))
        eventually(lambda: conflist.read_text() == before)
        new = tmp_path / "new.json"
        new.write_text('{"policy_setup_timeout_seconds": 30}')
        new.replace(settings)
        eventually(lambda: plugin()["policy_setup_timeout_seconds"] == 30)
        assert plugin()["ipam"] == {"type": "manx-ipam"}
        new.write_text('{"ipam": {"assign_ipv4": "perhaps"}}')
        new.replace(settings)  # nobody reads the half of it
        eventually(lambda: "ipam.assign_ipv4" in (tmp_path / "log").read_text())
        assert plugin()["policy_setup_timeout_seconds"] == 30


def whole_or_not(directory: Path) -> bool:
    try:
        return whole(directory) is not None
    except AssertionError:
        return False
