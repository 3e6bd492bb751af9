"""A request of the runtime: command, attachment, what it asks for (CNI spec 1.1.0, section 2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from api.errors import Problem
from api.net import Net, parse_interface
from cni.attachment import CONTAINER_ID_LENGTH, Attachment
from cni.config import (
    NAME,
    NOTHING_TOLD,
    Arguments,
    Dns,
    NetworkConfiguration,
    Result,
    RuntimeConfiguration,
    parse_often,
    validate,
)
from cni.errors import CniError, invalid_configuration, invalid_environment
from cni.features import NOTHING_ASKED, Asked, is_unicast, parse_mac

COMMANDS = ("ADD", "DEL", "CHECK", "STATUS", "GC")  # VERSION is answered by the client
WITH_ATTACHMENT = ("ADD", "DEL", "CHECK")

# The kernel would take eth%d for a pattern to number.
_IFNAME = re.compile(r"[^/:%\s\0]{1,15}")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Call:
    """A request that may be carried out. ``attachment`` is None for STATUS and GC.

    ``previous`` is there for ADD and CHECK, where the runtime gave it: a DEL does not need it
    and must not fail because of it.
    ``netns`` is the path as the runtime wrote it: only for the result, since the namespace
    itself comes as a descriptor. ``asked`` and ``dns``: what the runtime wants an ADD to give, and
    to tell.
    """

    command: str
    configuration: NetworkConfiguration
    attachment: Attachment | None
    netns: str
    previous: Result | None = None
    asked: Asked = NOTHING_ASKED
    dns: Dns = field(default_factory=Dns)


def parse_call(environment: Mapping[str, str], configuration: bytes) -> Call:
    """Validate a request. Raises CniError with code 1, 4, 6 or 7."""
    command = environment.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise invalid_environment(
            "CNI_COMMAND", command, f"expected {', '.join(COMMANDS)} or VERSION"
        )
    parsed = parse_often(configuration, command)
    attachment = None
    arguments: dict[str, str] = {}
    if command in WITH_ATTACHMENT:
        arguments = _arguments(environment.get("CNI_ARGS", ""))
        attachment = _attachment(environment, arguments, parsed.name)
    previous = None
    if command in ("ADD", "CHECK") and parsed.previous is not None:
        previous = validate(Result, parsed.previous, "prevResult")
    elif command == "CHECK":
        raise invalid_configuration([Problem("prevResult", None, "required")])
    netns = environment.get("CNI_NETNS", "")
    if command != "ADD":
        return Call(command, parsed, attachment, netns, previous)
    runtime = NOTHING_TOLD
    if parsed.runtime:
        runtime = validate(RuntimeConfiguration, parsed.runtime, "runtimeConfig")
    asked = _asked(arguments, parsed, runtime)
    return Call(command, parsed, attachment, netns, previous, asked, _dns(parsed, runtime))


def _attachment(
    environment: Mapping[str, str], arguments: Mapping[str, str], network: str
) -> Attachment:
    container_id = environment.get("CNI_CONTAINERID", "")
    if not NAME.fullmatch(container_id) or len(container_id) > CONTAINER_ID_LENGTH:
        raise invalid_environment(
            "CNI_CONTAINERID",
            container_id,
            f"expected 1 to {CONTAINER_ID_LENGTH} letters, digits, '_', '.', '-', the first a"
            " letter or digit",
        )
    ifname = environment.get("CNI_IFNAME", "")
    if not _IFNAME.fullmatch(ifname) or ifname in (".", "..") or len(ifname.encode()) > 15:
        raise invalid_environment(
            "CNI_IFNAME",
            ifname,
            "expected an interface name: 1 to 15 bytes without '/', ':', '%' and white space,"
            " not '.' or '..'",
        )
    namespace, pod = _pod(arguments)
    return Attachment(network, container_id, ifname, namespace, pod)


def _arguments(arguments: str) -> dict[str, str]:
    """CNI_ARGS, ``KEY=VALUE;…``."""
    pairs: dict[str, str] = {}
    for pair in filter(None, arguments.split(";")):
        key, separator, value = pair.partition("=")
        if not separator:
            raise invalid_environment("CNI_ARGS", pair, "expected KEY=VALUE;KEY=VALUE;…")
        pairs[key] = value
    return pairs


def _asked(
    arguments: Mapping[str, str], parsed: NetworkConfiguration, runtime: RuntimeConfiguration
) -> Asked:
    """Addresses and MAC address that the runtime wants, wherever it says so. Raises CniError."""
    if not (arguments.keys() & {"IP", "MAC"} or runtime.ips or runtime.mac or parsed.args):
        return NOTHING_ASKED
    args = validate(Arguments, parsed.args or {}, "args")
    told = [("CNI_ARGS", text) for text in filter(None, arguments.get("IP", "").split(","))]
    told += [("runtimeConfig.ips", text) for text in runtime.ips]
    told += [("args.cni.ips", text) for text in args.cni.ips]
    addresses: dict[int, Net] = {}
    for where, text in told:
        try:
            net = parse_interface(text)[0]
            if not is_unicast(net) or addresses.setdefault(net.version, net) != net:
                raise ValueError(text)
        except ValueError:
            expected = "expected addresses for a container, at most one of each IP version"
            raise _not_to_be_had(where, text, expected) from None
    macs = [("CNI_ARGS", arguments.get("MAC", "")), ("runtimeConfig.mac", runtime.mac)]
    mac = ""
    for where, text in macs:
        try:
            mac = parse_mac(text) if text else mac
        except ValueError as error:
            raise _not_to_be_had(where, text, str(error)) from None
    return Asked(tuple(sorted(addresses.values())), mac)


def _not_to_be_had(where: str, text: str, expected: str) -> CniError:
    if where == "CNI_ARGS":
        return invalid_environment(where, text, expected)
    return invalid_configuration([Problem(where, text, expected)])


def _dns(parsed: NetworkConfiguration, runtime: RuntimeConfiguration) -> Dns:
    """The runtime's settings for this container, those of the network where it has none."""
    told = runtime.dns
    if not (told.servers or told.searches or told.options):
        return parsed.dns
    return Dns(
        nameservers=told.servers,
        domain=parsed.dns.domain,
        search=told.searches,
        options=told.options,
    )


def _pod(pairs: Mapping[str, str]) -> tuple[str, str]:
    """Namespace and name of the pod in CNI_ARGS; empty if it names none."""
    namespace, pod = pairs.get("K8S_POD_NAMESPACE", ""), pairs.get("K8S_POD_NAME", "")
    if not namespace:
        return "", ""  # podman gives a name alone, that of its container
    if not _LABEL.fullmatch(namespace) or len(namespace) > 63:
        raise invalid_environment(
            "CNI_ARGS", f"K8S_POD_NAMESPACE={namespace}", "expected the name of a namespace"
        )
    if not _SUBDOMAIN.fullmatch(pod) or len(pod) > 253:
        raise invalid_environment("CNI_ARGS", f"K8S_POD_NAME={pod}", "expected the name of a pod")
    return namespace, pod
