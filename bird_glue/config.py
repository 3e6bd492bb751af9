"""ExaBGP's configuration file and environment. Numbers and addresses only, so nothing to quote."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from api.net import V4, V6, Net, format_address

DEFAULT_PORT = 179
DEFAULT_HOLD_SECONDS = 90
DEFAULT_RESTART_SECONDS = 120
MAX_RESTART_SECONDS = 4095  # 12 bits (RFC 4724 3)
MAX_HOLD_SECONDS = 65535
MIN_HOLD_SECONDS = 3

RELAY = Path(__file__).with_name("relay_main.py")
_MAX_TTL = 255


@dataclass(frozen=True, slots=True)
class Neighbor:
    """One session, ready to be run.

    ``ttl_security``: hops between us and the peer (RFC 5082). ``reachable_by``: the gateway
    that alone leads to the peer. ``extended_next_hop``: a session over IPv6 that carries IPv4
    routes as well (RFC 8950).
    """

    address: Net
    local: Net
    remote_as: int
    local_as: int
    router_id: int
    port: int = DEFAULT_PORT
    passive: bool = False
    hold_seconds: int = DEFAULT_HOLD_SECONDS
    restart_seconds: int = DEFAULT_RESTART_SECONDS
    ttl_security: int | None = None
    password: bytes = field(default=b"", repr=False)
    reachable_by: Net | None = None
    extended_next_hop: bool = False

    @property
    def versions(self) -> tuple[int, ...]:
        """IP versions of the routes it carries."""
        return (V6, V4) if self.extended_next_hop else (self.address.version,)

    @property
    def external(self) -> bool:
        """eBGP?"""
        return self.remote_as != self.local_as


@dataclass(frozen=True, slots=True)
class Listen:
    """Where ExaBGP accepts connections. To change it, it must be restarted."""

    addresses: tuple[str, ...]
    port: int = DEFAULT_PORT


def render(neighbors: Iterable[Neighbor], socket: Path) -> tuple[str, str]:
    """The configuration file, and its mark: text that every neighbor's description holds.

    ``socket`` is where the relay listens. The mark lets ExaBGP say which file it runs on.
    """
    templates: dict[str, str] = {}  # what neighbors have in common, and its name
    blocks = [_neighbor(neighbor, templates) for neighbor in neighbors]
    process = (
        "process relay {\n"
        f"    run {sys.executable} -I -S {RELAY} {socket};\n"
        "    encoder json;\n"
        "    respawn false;\n"
        "}\n"
    )
    shared = "".join(
        f"template {{\nneighbor {name} {{\n{body}}}\n}}\n" for body, name in templates.items()
    )
    plain = process + shared + "".join(blocks)
    mark = hashlib.sha256(plain.encode()).hexdigest()[:16]
    return plain.replace(_MARK, mark), mark


_MARK = "@MARK@"


def _neighbor(neighbor: Neighbor, templates: dict[str, str]) -> str:
    """A neighbor's own lines; the others go into a template that equal ones share.

    ExaBGP reads its file character by character, and answers nobody meanwhile: without
    templates 200 neighbors take it three times as long. A key may only be in one of the two.
    """
    name = templates.setdefault(_template(neighbor), f"t{len(templates)}")
    return (
        f"neighbor {format_address(*neighbor.address[:2])} {{\n"
        f"inherit {name};\n"
        f"peer-as {neighbor.remote_as};\n"
        f"passive {'true' if neighbor.passive else 'false'};\n"
        "}\n"
    )


def _template(neighbor: Neighbor) -> str:
    lines = [
        f'description "{_MARK}"',
        f"router-id {format_address(V4, neighbor.router_id)}",
        f"local-address {format_address(*neighbor.local[:2])}",
        f"local-as {neighbor.local_as}",
        f"hold-time {neighbor.hold_seconds}",
        # we keep the received routes ourselves; those sent are kept for route refresh
        "adj-rib-in false",
        "adj-rib-out true",
        "group-updates true",
        # after a restart the end of our routes is marked when all of them are told again
        "manual-eor true",
        # else it would call at the port we listen on
        f"connect {neighbor.port}",
    ]
    if neighbor.password:
        lines.append(f'md5-password "{password_word(neighbor)}"')
        lines.append("md5-base64 true")
    if neighbor.ttl_security is not None:
        lines.append(f"outgoing-ttl {_MAX_TTL}")
        lines.append(f"incoming-ttl {_MAX_TTL + 1 - neighbor.ttl_security}")
    body = "".join(f"{line};\n" for line in lines)
    families = " ".join(f"ipv{version} unicast;" for version in neighbor.versions)
    extended = "nexthop { ipv4 unicast ipv6; }\n" if neighbor.extended_next_hop else ""
    return (
        f"{body}"
        f"family {{ {families} }}\n"
        f"{extended}"
        "capability {\n"
        "asn4 enable;\n"
        "route-refresh enable;\n"
        f"graceful-restart {neighbor.restart_seconds};\n"
        "}\n"
        "api {\n"
        "processes [ relay ];\n"
        "neighbor-changes;\n"
        "receive { parsed; open; update; notification; }\n"
        "send { parsed; update; notification; }\n"
        "}\n"
    )


def password_word(neighbor: Neighbor) -> str:
    """How the configuration spells the password (RFC 2385), whatever is in it."""
    return base64.b64encode(neighbor.password).decode()


# ExaBGP knows each setting by two names. Agents of the time when it told all routes in its own JSON
# look for the second, and so replace an ExaBGP whose words they wouldn't understand.
_BIND, _BIND_BEFORE = "exabgp.tcp.bind", "exabgp_tcp_bind"


def environment(listen: Listen, log_file: Path) -> dict[str, str]:
    """Environment variables for ExaBGP. ``listening`` reads them back."""
    return {
        "exabgp_daemon_user": "root",
        "exabgp_daemon_drop": "false",
        _BIND: " ".join(listen.addresses),
        "exabgp_tcp_port": str(listen.port),
        # A round of its loop takes as many hundredths of a second while nothing comes in (which
        # wakes it), and looks at its listening sockets, its child and each session that isn't up.
        "exabgp_reactor_speed": "15",
        "exabgp_api_cli": "false",
        "exabgp_api_respawn": "false",
        "exabgp_api_terminate": "true",
        "exabgp_log_destination": str(log_file),
        "exabgp_log_level": "INFO",
        "exabgp_log_short": "false",
        "exabgp_log_processes": "false",
        "exabgp_log_statistics": "false",
    }


def listening(variables: Mapping[str, str]) -> Listen | None:
    """Where an ExaBGP with these variables listens, also one that an earlier version started.

    None if it is not one of ours.
    """
    addresses = variables.get(_BIND, variables.get(_BIND_BEFORE))
    port = variables.get("exabgp_tcp_port", "")
    if addresses is None or not port.isdigit():
        return None
    return Listen(tuple(addresses.split()), int(port))
