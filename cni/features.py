"""What a pod's annotations ask for, beyond what the network configuration says.

The annotations are Calico's, ``cni.projectcalico.org/…``: lists are JSON. Pools may also be
named on the pod's namespace; the pod's own come first, then the namespace's, then those of the
configuration. One that can't be understood fails the ADD before anything is made.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from api import qos
from api.errors import Problem
from api.net import V4, V6, Net, format_address, parse_net
from cni.errors import ANNOTATIONS, CniError

PREFIX = "cni.projectcalico.org/"
IP_ADDRESSES = PREFIX + "ipAddrs"
OUTSIDE_IPAM = PREFIX + "ipAddrsNoIpam"
POOLS = {V4: PREFIX + "ipv4pools", V6: PREFIX + "ipv6pools"}
FAMILIES = PREFIX + "ipFamilies"
FLOATING = PREFIX + "floatingIPs"
MAC = PREFIX + "hwAddr"
SOURCES = PREFIX + "allowedSourcePrefixes"

_FAMILY_NAMES = {"IPv4": V4, "IPv6": V6}
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_GROUP_BIT = 1  # of the first byte: a multicast address, which no interface can have

Families = tuple[tuple[int, tuple[str, ...]], ...]  # IP version, names or CIDRs of pools
Annotations = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the runtime asks for: at most one address of each IP version, a MAC address."""

    addresses: tuple[Net, ...] = ()
    mac: str = ""


NOTHING_ASKED = Asked()


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the configuration's ``feature_control`` permits pods to ask for."""

    outside_ipam: bool = False
    floating: bool = False


@dataclass(frozen=True, slots=True)
class Features:
    """What an attachment shall have.

    ``families``: IP versions to take an address of, each with the pools to take it from.
    ``addresses`` are these instead, host Nets; from IPAM, or ``outside_ipam``. ``mac`` is empty
    for any. ``floating``: addresses that stand for the pod's outside, host Nets. ``sources``:
    networks it may send with. ``controls``: ``spec.qosControls`` of the endpoint.
    """

    families: Families
    addresses: tuple[Net, ...] = ()
    outside_ipam: bool = False
    mac: str = ""
    floating: tuple[Net, ...] = ()
    sources: tuple[Net, ...] = ()
    controls: Mapping[str, Any] = field(default_factory=dict)

    @property
    def versions(self) -> set[int]:
        """The IP versions it shall have an address of."""
        if self.addresses:
            return {net.version for net in self.addresses}
        return {version for version, _ in self.families}

    def nats(self, addresses: Sequence[Net]) -> list[tuple[Net, Net]]:
        """For each floating address which one of the pod's it stands for."""
        first = {net.version: net for net in reversed(addresses)}
        return [(external, first[external.version]) for external in self.floating]


def read(
    pod: str,
    own: Annotations,
    namespace: Annotations,
    families: Families,
    allowed: Allowed,
    asked: Asked = NOTHING_ASKED,
) -> Features:
    """The features of ``pod`` (its name, for errors) with its ``own`` annotations.

    ``families`` is what the configuration says; what the runtime ``asked`` for counts where
    the pod does not say otherwise. Raises CniError.
    """
    if not own and not namespace:
        return Features(families, asked.addresses, mac=asked.mac)
    problems: list[Problem] = []
    reader = _Reader(own, namespace, problems)
    controls, faults = qos.controls(own)
    problems += faults
    features = Features(
        families=reader.families(families),
        addresses=reader.addresses(allowed) or asked.addresses,
        outside_ipam=bool(own.get(OUTSIDE_IPAM)),
        mac=reader.mac() or asked.mac,
        sources=reader.sources(),
        floating=reader.floating(allowed),
        controls=controls,
    )
    if not problems:
        problems += _contradictions(features, own)
    if problems:
        texts = "; ".join(str(problem) for problem in problems)
        raise CniError(ANNOTATIONS, f"pod {pod}: annotation {texts}", "nothing was changed")
    return features


def _contradictions(features: Features, own: Annotations) -> Iterator[Problem]:
    missing = [net for net in features.floating if net.version not in features.versions]
    if missing:
        version = missing[0].version
        yield Problem(FLOATING, own[FLOATING], f"expected none of IPv{version}: the pod has none")


class _Reader:
    """Reads one annotation after the other, and collects what is wrong."""

    def __init__(self, own: Annotations, namespace: Annotations, problems: list[Problem]) -> None:
        self._own = own
        self._namespace = namespace
        self._problems = problems

    def families(self, configured: Families) -> Families:
        """Which IP versions, and from which pools."""
        pools = dict(configured)
        wanted = list(pools)
        if FAMILIES in self._own:
            expected = 'expected a JSON list such as ["IPv4"] or ["IPv4", "IPv6"]'
            names = self._list(FAMILIES, self._own, expected)
            if not names or not all(name in _FAMILY_NAMES for name in names):
                self._wrong(FAMILIES, self._own, expected)
            wanted = sorted({_FAMILY_NAMES[name] for name in names if name in _FAMILY_NAMES})
        for version, annotation in POOLS.items():
            for level in (self._own, self._namespace):
                if level.get(annotation):
                    expected = "expected a JSON list of names or CIDRs of IPPools"
                    pools[version] = tuple(self._list(annotation, level, expected))
                    break
        return tuple((version, pools.get(version, ())) for version in wanted)

    def addresses(self, allowed: Allowed) -> tuple[Net, ...]:
        """At most one address of each IP version."""
        asked = [name for name in (IP_ADDRESSES, OUTSIDE_IPAM) if self._own.get(name)]
        if not asked:
            return ()
        name = asked[0]
        if len(asked) > 1:
            self._wrong(name, self._own, f"expected this or {OUTSIDE_IPAM}, not both")
        if name == OUTSIDE_IPAM and not allowed.outside_ipam:
            self._disabled(name, "ip_addrs_no_ipam")
        expected = 'expected a JSON list of one address of each IP version, as ["10.65.0.7"]'
        nets = self._hosts(name, expected)
        if not nets or len({net.version for net in nets}) != len(nets):
            self._wrong(name, self._own, expected)
        return tuple(sorted(nets))

    def mac(self) -> str:
        """The MAC address of the pod's end."""
        text = self._own.get(MAC, "")
        try:
            return parse_mac(text) if text else ""
        except ValueError as error:
            self._wrong(MAC, self._own, str(error))
            return ""

    def sources(self) -> tuple[Net, ...]:
        """Networks it may send with besides its own addresses."""
        expected = 'expected a JSON list of CIDRs, as ["192.0.2.0/24"]'
        nets = []
        for text in self._list(SOURCES, self._own, expected):
            try:
                nets.append(parse_net(text, strict=False))
            except ValueError:
                self._wrong(SOURCES, self._own, expected)
        return tuple(nets)

    def floating(self, allowed: Allowed) -> tuple[Net, ...]:
        """Addresses that stand for the pod's."""
        if not self._own.get(FLOATING):
            return ()
        if not allowed.floating:
            self._disabled(FLOATING, "floating_ips")
        expected = 'expected a JSON list of addresses, as ["192.0.2.7"]'
        return tuple(dict.fromkeys(self._hosts(FLOATING, expected)))

    def _hosts(self, name: str, expected: str) -> list[Net]:
        nets = []
        for text in self._list(name, self._own, expected):
            try:
                net = parse_net(text)
                if not net.is_host or not is_unicast(net):
                    raise ValueError(text)
                nets.append(net)
            except ValueError:
                self._wrong(name, self._own, expected)
        return nets

    def _list(self, name: str, annotations: Annotations, expected: str) -> list[str]:
        """A JSON list of texts; empty where the annotation is absent, empty or no list."""
        text = annotations.get(name)
        if not text:
            return []
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError:
            found = None
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
        self._wrong(name, annotations, expected)
        return []

    def _disabled(self, name: str, switch: str) -> None:
        self._wrong(
            name,
            self._own,
            f"not permitted: expected feature_control.{switch}: true in the network configuration",
        )

    def _wrong(self, name: str, annotations: Annotations, expected: str) -> None:
        where = f"{name} of its namespace" if annotations is self._namespace else name
        problem = Problem(where, annotations[name], expected)
        if problem not in self._problems:
            self._problems.append(problem)


def parse_mac(text: str) -> str:
    """A MAC address that an interface can have, in small letters. Raises ValueError."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & _GROUP_BIT or not mac.strip("0:"):
        raise ValueError("expected a unicast MAC address such as 02:00:5e:10:00:01")
    return mac


def is_unicast(net: Net) -> bool:
    """Whether a host Net is an address that a pod can have."""
    address = ipaddress.ip_address(format_address(net.version, net.address))
    return not (
        address.is_unspecified
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address == ipaddress.ip_address("255.255.255.255")
    )
