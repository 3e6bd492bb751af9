"""What a container runtime does about networking: runs CNI plugins for a pod.

A small libcni: the conflist from /etc/cni/net.d, one plugin after the other with the
result of the one before as ``prevResult``, the last result cached for DEL in
/var/lib/cni/results. CNI specification 1.1.0, sections 2, 3 and 4.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.namespaces import Namespaces

JSON = dict[str, Any]

CONF_DIR = Path("/etc/cni/net.d")
BIN_DIR = Path("/opt/cni/bin")
CACHE_DIR = Path("/var/lib/cni/results")
INTERFACE = "eth0"
TIMEOUT = 60.0  # seconds for one plugin


class CniError(LabError):
    """A plugin refused. ``code`` as in section 5 of the specification, 0 when it gave none."""

    def __init__(self, plugin: str, command: str, error: JSON, log: str) -> None:
        self.code = int(error.get("code", 0))
        text = f"{plugin} {command}: error {self.code}: {error.get('msg', 'no message')}"
        if error.get("details"):
            text += f": {error['details']}"
        super().__init__(text, log)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container to connect: its ID, its namespace's path in the node, the ``CNI_ARGS``."""

    container_id: str
    netns: str
    args: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Added:
    """What ADD gave: the result, when it began (monotonic clock) and how long it took, in s."""

    result: JSON
    started: float
    seconds: float

    def addresses(self) -> list[str]:
        """The container's addresses without their prefix lengths."""
        return [str(ip["address"]).partition("/")[0] for ip in self.result.get("ips", [])]


class Runtime:
    """The runtime of one node. ``conf``, ``cache``: its folders as the caller sees them."""

    def __init__(self, node: Namespaces, env: Mapping[str, str], conf: Path, cache: Path) -> None:
        self._node = node
        self._env = dict(env)
        self._conf = conf
        self._cache = cache

    def conflist(self) -> JSON | None:
        """The first network configuration list by file name; None while there is none.

        Raises LabError when it can't be used.
        """
        files = sorted(self._conf.glob("*.conflist"))
        if not files:
            return None
        try:
            conflist = json.loads(files[0].read_text())
            if not all((conflist["name"], conflist["plugins"], _version(conflist))):
                raise ValueError("empty")
            if not all(isinstance(plugin["type"], str) for plugin in conflist["plugins"]):
                raise ValueError("type")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LabError(
                f"{CONF_DIR / files[0].name}: expected a CNI configuration list with cniVersion, "
                "name and plugins, each with a type"
            ) from error
        return dict(conflist)

    def status(self) -> None:
        """Whether ADD can be expected to work (section 2, STATUS). Raises LabError."""
        conflist = self._required()
        if _version(conflist) < (1, 1):
            return
        for plugin in conflist["plugins"]:
            self._run("STATUS", conflist, plugin, {})

    def add(self, attachment: Attachment) -> Added:
        """Connect a container. When a plugin refuses, all is undone. Raises LabError."""
        conflist = self._required()
        result: JSON | None = None
        started = time.monotonic()
        try:
            for plugin in conflist["plugins"]:
                extra = {} if result is None else {"prevResult": result}
                result = self._run("ADD", conflist, plugin | extra, self._variables(attachment))
        except LabError as error:
            try:
                self._delete(conflist, attachment, result)
            except LabError as undo:
                error.message += f"; undoing it failed too: {undo.message}"
            raise
        seconds = time.monotonic() - started
        self._save(attachment, conflist, result or {})
        return Added(result or {}, started, seconds)

    def delete(self, attachment: Attachment) -> None:
        """Disconnect a container with what it was added with. Raises LabError."""
        path = self._cached(attachment)
        try:
            cached = json.loads(path.read_text())
            conflist, result = cached["config"], cached["result"]
        except FileNotFoundError:
            conflist, result = self._required(), None
        self._delete(conflist, attachment, result)
        path.unlink(missing_ok=True)

    def _delete(self, conflist: JSON, attachment: Attachment, result: JSON | None) -> None:
        for plugin in reversed(conflist["plugins"]):
            extra = {} if result is None else {"prevResult": result}
            self._run("DEL", conflist, plugin | extra, self._variables(attachment))

    def _required(self) -> JSON:
        conflist = self.conflist()
        if conflist is None:
            raise LabError(f"no CNI configuration in {CONF_DIR}: is a plugin installed?")
        return conflist

    def _variables(self, attachment: Attachment) -> dict[str, str]:
        return {
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": INTERFACE,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in attachment.args.items()),
        }

    def _run(self, command: str, conflist: JSON, plugin: JSON, variables: dict[str, str]) -> JSON:
        """Execute one plugin; its result, empty where the verb has none. Raises LabError."""
        name = str(plugin["type"])
        env = {**self._env, **variables, "CNI_COMMAND": command, "CNI_PATH": str(BIN_DIR)}
        config = {"cniVersion": conflist["cniVersion"], "name": conflist["name"], **plugin}
        try:
            process = self._node.popen(
                [str(BIN_DIR / name)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise LabError(f"{BIN_DIR / name}: {error.strerror}") from error
        try:
            output, log = process.communicate(json.dumps(config).encode(), timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise LabError(f"{name} {command}: no answer within {TIMEOUT:.0f} s") from None
        return _answer(name, command, process.returncode, output, log.decode(errors="replace"))

    def _cached(self, attachment: Attachment) -> Path:
        return self._cache / f"{attachment.container_id}-{INTERFACE}"

    def _save(self, attachment: Attachment, conflist: JSON, result: JSON) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        path = self._cached(attachment)
        half = path.with_suffix(".new")
        half.write_text(json.dumps({"config": conflist, "result": result}))
        half.rename(path)


def _answer(plugin: str, command: str, code: int, output: bytes, log: str) -> JSON:
    try:
        answer = json.loads(output) if output.strip() else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        text = output.decode(errors="replace").strip()
        raise LabError(f"{plugin} {command}: answered {text!r}, expected a JSON object", log)
    if code != 0:
        raise CniError(plugin, command, {"msg": f"exit status {code}"} | answer, log)
    if command == "ADD" and not answer:
        raise LabError(f"{plugin} ADD: exit status 0 without a result", log)
    return answer


def _version(conflist: JSON) -> tuple[int, ...]:
    return tuple(int(part) for part in str(conflist["cniVersion"]).split(".")[:2])
