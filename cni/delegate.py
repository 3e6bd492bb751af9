"""Addresses from another IPAM plugin: ``ipam.type`` names an executable in CNI_PATH.

CNI spec 1.1.0, section 4: the plugin gets the command, environment and configuration that
came to us, and its result or error is passed on. ``host-local`` may name the node's own range
as ``usePodCidr`` and ``usePodCidrIPv6``, as in Calico: the Node's ``status.podCIDRs``.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from api.errors import Problem
from api.net import Net, parse_interface, parse_net
from cni.attachment import Attachment
from cni.config import Result
from cni.errors import ADDRESSES, TRY_AGAIN_LATER, CniError, invalid_configuration
from cni.result import of_families

SECONDS = 30.0  # for one run of the plugin; the client waits for three times as long
# Each occupies a worker of the server meanwhile, and some must be left for others' requests.
AT_ONCE = 32
PATIENCE = 5.0  # seconds, while that many run

HOST_LOCAL = "host-local"
# What stands for the node's range of a family in host-local's configuration (letter case is of
# no account), and what satisfies the plugin where it only wants to see some range.
_POD_CIDRS = {"usepodcidr": (4, "0.0.0.0/0"), "usepodcidripv6": (6, "::/0")}

RUNS = threading.BoundedSemaphore(AT_ONCE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lease:
    """What the plugin gave: addresses as host Nets, destinations to route, DNS settings."""

    addresses: tuple[Net, ...]
    routes: tuple[Net, ...] = ()
    dns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delegate:
    """The plugin ``kind`` as it is to be called for one request.

    ``variables``: the request's CNI_…; ``configuration``: what came on stdin. ``pod_cidrs``
    reads the node's ranges, and is asked only where they are named.
    Every method raises CniError.
    """

    kind: str
    variables: Mapping[str, str]
    configuration: bytes
    pod_cidrs: Callable[[], Iterable[str]]

    def add(self) -> Lease:
        """Addresses for the attachment.

        A plugin that still has some for it since an ADD that was cut off may refuse: it is told
        to release them, and asked once more.
        """
        stdin = self._stdin(dummy=False)
        try:
            answer = self._run("ADD", stdin)
        except CniError as error:
            if error.code == TRY_AGAIN_LATER:
                raise
            self.delete()
            answer = self._run("ADD", stdin)
        try:
            return parse_lease(answer)
        except ValueError as error:
            raise CniError(ADDRESSES, f"IPAM plugin {self.kind}: its result: {error}") from None

    def delete(self) -> None:
        """Release what the attachment has; nothing is no error."""
        self._run("DEL", self._stdin(dummy=True))

    def check(self) -> None:
        """Whether the attachment has what ``prevResult`` says."""
        self._run("CHECK", self._stdin(dummy=False))

    def status(self) -> None:
        """Whether it could serve an ADD."""
        self._run("STATUS", self._stdin(dummy=False))

    def collect_garbage(self) -> None:
        """Have it release what is not in the configuration's ``cni.dev/valid-attachments``."""
        self._run("GC", self._stdin(dummy=True))

    def of(self, attachment: Attachment) -> Delegate:
        """The same for another attachment, whose container may be gone."""
        of_container = ("CNI_ARGS", "CNI_NETNS")
        kept = {name: text for name, text in self.variables.items() if name not in of_container}
        variables = kept | {
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_IFNAME": attachment.ifname,
        }
        return replace(self, variables=variables)

    def executable(self) -> Path:
        """Where it lies: the first directory of CNI_PATH that has it."""
        path = self.variables.get("CNI_PATH", "")
        for directory in filter(None, path.split(":")):
            found = Path(directory) / self.kind
            if os.access(found, os.X_OK) and found.is_file():
                return found
        expected = f"expected manx-ipam, or an executable in CNI_PATH ({path or 'not set'})"
        raise invalid_configuration([Problem("ipam.type", self.kind, expected)])

    def _run(self, command: str, stdin: bytes) -> Any:
        program = self.executable()
        environment = {"PATH": os.environ.get("PATH", os.defpath)}
        environment |= {k: v for k, v in self.variables.items() if k.startswith("CNI_")}
        environment["CNI_COMMAND"] = command
        if not RUNS.acquire(timeout=PATIENCE):
            raise CniError(
                TRY_AGAIN_LATER,
                f"IPAM plugin {self.kind}: {AT_ONCE} of its runs have not ended; see what they"
                " wait for",
            )
        try:
            code, output, log = _execute(program, environment, stdin)
        except subprocess.TimeoutExpired:
            raise CniError(
                TRY_AGAIN_LATER,
                f"IPAM plugin {self.kind} {command}: no end within {SECONDS:.0f} s; killed",
            ) from None
        except OSError as error:
            raise CniError(ADDRESSES, f"IPAM plugin {program}: {error.strerror}") from error
        finally:
            RUNS.release()
        if log:
            _log.info("IPAM plugin %s %s says: %s", self.kind, command, log)
        return self._answer(command, code, output)

    def _answer(self, command: str, code: int, output: bytes) -> Any:
        """The result; an error object of the plugin is passed on as it is, with its name."""
        what = f"IPAM plugin {self.kind}"
        try:
            answer = orjson.loads(output) if output.strip() else {}
        except orjson.JSONDecodeError:
            text = output.decode(errors="replace").strip()
            raise CniError(ADDRESSES, f"{what} {command}: printed {text[:200]!r}") from None
        if code == 0:
            return answer
        told = answer if isinstance(answer, dict) else {}
        number, msg = told.get("code"), told.get("msg")
        if not isinstance(number, int) or number <= 0 or not msg:
            raise CniError(ADDRESSES, f"{what} {command}: exit status {code}")
        raise CniError(number, f"{what}: {msg}", str(told.get("details") or ""))

    def _stdin(self, *, dummy: bool) -> bytes:
        """The configuration for the plugin, with ranges in place of the words for them.

        ``dummy``: any range does, so that releasing also works when the Node is gone.
        """
        if self.kind != HOST_LOCAL:
            return self.configuration
        document = orjson.loads(self.configuration)
        ipam = document["ipam"]
        named = [(ipam, "ipam.subnet")]
        ranges = ipam.get("ranges")
        for i, alternatives in enumerate(ranges if isinstance(ranges, list) else []):
            for j, each in enumerate(alternatives if isinstance(alternatives, list) else []):
                named.append((each, f"ipam.ranges[{i}][{j}].subnet"))
        for holder, path in named:
            text = holder.get("subnet") if isinstance(holder, dict) else None
            if isinstance(text, str) and text.lower() in _POD_CIDRS:
                version, anything = _POD_CIDRS[text.lower()]
                holder["subnet"] = anything if dummy else self._pod_cidr(version, path, text)
        return orjson.dumps(document)

    def _pod_cidr(self, version: int, path: str, text: str) -> str:
        for cidr in self.pod_cidrs():
            if parse_net(cidr).version == version:
                return cidr
        expected = f"expected a range of IPv{version} in status.podCIDRs of this node's Node"
        raise invalid_configuration([Problem(path, text, expected)])


def _execute(program: Path, environment: Mapping[str, str], stdin: bytes) -> tuple[int, bytes, str]:
    """Exit status, output, log. It has a session of its own, and dies with all it started.

    Raises OSError, TimeoutExpired.
    """
    with subprocess.Popen(
        [program],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            output, log = process.communicate(stdin, timeout=SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output, log.decode(errors="replace").strip()


def parse_lease(answer: object) -> Lease:
    """What a result says (CNI spec, section 5). Raises ValueError."""
    try:
        result = Result.model_validate(of_families(answer))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{where}: {first['msg']}") from None
    addresses = tuple(sorted({parse_interface(entry.address)[0] for entry in result.ips or []}))
    if not addresses:
        raise ValueError("no address in ips")
    families = {net.version for net in addresses}
    routes = [parse_net(str(route.get("dst")), strict=False) for route in result.routes or []]
    return Lease(
        addresses,
        tuple(dict.fromkeys(net for net in routes if net.version in families)),
        {key: value for key, value in (result.dns or {}).items() if value},
    )
