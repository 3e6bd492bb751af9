"""What policies match → words of iptables rules, and the constant sets they need.

A match becomes alternatives, any of which suffices: iptables takes one address and 15 ports a
rule, so longer lists of addresses become constant sets, longer lists of ports several rules.
Words are in the order in which ``iptables-save`` tells them: addresses, interfaces and protocol
first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from api.net import V4, Net
from felix import names
from felix.chains import PORT_PROTOCOLS
from policy.model import Match, PortRange

ICMP = {4: 1, 6: 58}
MULTIPORT_SLOTS = 15  # iptables-extensions(8), multiport; a range takes two


@dataclass(frozen=True, slots=True)
class ConstantSet:
    """A list of networks that rules refer to. Its id is a hash of its members: it never changes."""

    id: str
    members: tuple[Net, ...]


class NeverError(Exception):
    """The condition can't hold in this IP version: the rule is left out."""


class Matches:
    """Renders policy matches and collects the constant sets they need."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.sets: dict[str, ConstantSet] = {}

    def alternatives(self, match: Match, interfaces: str = "") -> list[str]:
        """Fragments of which any suffices. Raises NeverError when none could.

        ``interfaces``: words such as ``-i eth0``.
        """
        if match.version is not None and match.version != self.version:
            raise NeverError
        nets = [
            *self._nets("-s", "src", match.src_nets, match.not_src_nets),
            *self._nets("-d", "dst", match.dst_nets, match.not_dst_nets),
        ]
        addresses = [words for words in nets if not words.startswith("-m")]
        head = joined(
            *self._icmp(match),
            *(words for words in nets if words.startswith("-m")),
            *self._members("src", match.src_sets, match.not_src_sets),
            *self._members("dst", match.dst_sets, match.not_dst_sets),
        )
        found: list[str] = []
        for protocol in self._protocols(match):
            source = self._ports("src", protocol, match.src_ports, match.src_named_ports)
            target = self._ports("dst", protocol, match.dst_ports, match.dst_named_ports)
            unwanted = joined(
                *self._no_ports("src", protocol, match.not_src_ports, match.not_src_named_ports),
                *self._no_ports("dst", protocol, match.not_dst_ports, match.not_dst_named_ports),
            )
            found.extend(
                joined(
                    *addresses,
                    interfaces,
                    _protocolwords(protocol, match.not_protocol),
                    head,
                    unwanted,
                    *pair,
                )
                for pair in itertools.product(source, target)
            )
        if not found:
            raise NeverError
        return found

    def _protocols(self, match: Match) -> Sequence[int | None]:
        """The protocols to write a rule for; None for any."""
        wanted = match.protocol
        if wanted is None and _speaks_of_icmp(match):
            wanted = ICMP[self.version]
        if wanted is not None:
            return () if wanted == match.not_protocol else (wanted,)
        if _speaks_of_ports(match):
            return [number for number in PORT_PROTOCOLS if number != match.not_protocol]
        return (None,)

    def _icmp(self, match: Match) -> Iterator[str]:
        if not _speaks_of_icmp(match):
            return
        if match.protocol not in (None, ICMP[self.version]):
            raise NeverError
        kind, module = match.icmp_type, "-m icmp" if self.version == V4 else "-m icmp6"
        flag = "--icmp-type" if self.version == V4 else "--icmpv6-type"
        if kind is None and (match.icmp_code is not None or match.not_icmp_code is not None):
            raise ValueError(f"{match}: iptables knows ICMP codes only together with their type")
        if kind is not None:
            code = "" if match.icmp_code is None else f"/{match.icmp_code}"
            yield f"{module} {flag} {kind}{code}"
        if match.not_icmp_type is not None:
            yield f"{module} ! {flag} {match.not_icmp_type}"
        if match.not_icmp_code is not None:
            yield f"{module} ! {flag} {kind}/{match.not_icmp_code}"

    def _nets(
        self, flag: str, side: str, wanted: tuple[Net, ...], unwanted: tuple[Net, ...]
    ) -> Iterator[str]:
        if wanted:
            nets = self._own_version(wanted)
            if not nets:
                raise NeverError
            if any(net.length == 0 for net in nets):
                wanted = ()
            elif len(nets) == 1:
                yield f"{flag} {nets[0]}"
            else:
                yield f"-m set --match-set {self._constant(nets)} {side}"
        nets = self._own_version(unwanted)
        if any(net.length == 0 for net in nets):
            raise NeverError
        if len(nets) == 1 and not wanted:
            yield f"! {flag} {nets[0]}"
        elif nets:
            yield f"-m set ! --match-set {self._constant(nets)} {side}"

    def _members(self, side: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Iterator[str]:
        for set_id in wanted:
            yield f"-m set --match-set {names.set_name(set_id, self.version)} {side}"
        for set_id in unwanted:
            yield f"-m set ! --match-set {names.set_name(set_id, self.version)} {side}"

    def _ports(
        self, side: str, protocol: int | None, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Sequence[str]:
        """The alternatives of one side's ports: ``""`` when any will do, none when none can."""
        if not ports and not named:
            return ("",)
        if protocol not in PORT_PROTOCOLS:
            return ()
        found = [f"-m multiport --{side[0]}ports {chunk}" for chunk in _chunks(ports)]
        for set_id in named:
            name = names.set_name(set_id, self.version)
            found.append(f"-m set --match-set {name} {side},{side}")
        return found

    def _no_ports(
        self, side: str, protocol: int | None, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Iterator[str]:
        if protocol not in PORT_PROTOCOLS:
            return
        for chunk in _chunks(ports):
            yield f"-m multiport ! --{side[0]}ports {chunk}"
        for set_id in named:
            name = names.set_name(set_id, self.version)
            yield f"-m set ! --match-set {name} {side},{side}"

    def _own_version(self, nets: Sequence[Net]) -> list[Net]:
        return sorted({net for net in nets if net.version == self.version})

    def _constant(self, nets: Sequence[Net]) -> str:
        text = ",".join(str(net) for net in nets)
        constant = ConstantSet(f"c:{names.digest(text, 23)}", tuple(nets))
        self.sets[constant.id] = constant
        return names.set_name(constant.id, self.version)


def _speaks_of_icmp(match: Match) -> bool:
    return match.icmp_type is not None or match.not_icmp_type is not None


def _speaks_of_ports(match: Match) -> bool:
    return bool(
        match.src_ports
        or match.not_src_ports
        or match.dst_ports
        or match.not_dst_ports
        or match.src_named_ports
        or match.not_src_named_ports
        or match.dst_named_ports
        or match.not_dst_named_ports
    )


def _protocolwords(wanted: int | None, unwanted: int | None) -> str:
    if wanted is not None:
        return f"-p {wanted}"
    return "" if unwanted is None else f"! -p {unwanted}"


def _chunks(ports: Sequence[PortRange]) -> Iterator[str]:
    """Lists of ports as one multiport match takes them: ``80,8000:8080``."""
    chunk: list[str] = []
    free = MULTIPORT_SLOTS
    for first, last in ports:
        slots = 1 if first == last else 2
        if slots > free:
            yield ",".join(chunk)
            chunk, free = [], MULTIPORT_SLOTS
        chunk.append(str(first) if first == last else f"{first}:{last}")
        free -= slots
    if chunk:
        yield ",".join(chunk)


def joined(*words: str) -> str:
    """The words of a rule that are not empty, with a blank between."""
    return " ".join(word for word in words if word)
