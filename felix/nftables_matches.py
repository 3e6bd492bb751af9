"""What policies match → expressions of nftables, and the sets they look up.

A match becomes alternatives, any of which suffices: an address in a set may be among its hosts or
in its networks, a port in a list or in a set of named ports.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from api.net import BITS, V4, Net
from felix import names
from felix.chains import PORT_PROTOCOLS
from kernel import nft_expressions as nft
from kernel.nft_expressions import Base, Compare, Meta
from kernel.nft_sets import (
    ADDRESS4,
    ADDRESS6,
    PORT,
    PROTOCOL,
    KeyType,
    NftSet,
    Range,
    merge,
    ranges,
)
from policy.model import Match, PortRange, SetKind

ICMP = {4: 1, 6: 58}

SOURCE_OFFSET = {4: 12, 6: 8}
DESTINATION_OFFSET = {4: 16, 6: 24}

_NETWORKS = "-networks"

# Whether a set holds networks besides hosts, by its name in the kernel.
HoldsNetworks = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class ConstantSet:
    """A list that rules refer to. Its name is a hash of its members: it never changes."""

    declaration: NftSet
    keys: tuple[bytes, ...] = ()
    spans: tuple[Range, ...] = ()


class NeverError(Exception):
    """The condition can't hold in this IP version: the rule is left out."""


@dataclass(frozen=True, slots=True)
class _Option:
    """One of several conditions of which any suffices, and its contrary."""

    holds: bytes
    fails: bytes = b""


class Matches:
    """Renders policy matches; collects the constant sets they need and the sets they look up."""

    def __init__(self, version: int, holds_networks: HoldsNetworks) -> None:
        self._version = version
        self._holds_networks = holds_networks
        self.constants: dict[str, ConstantSet] = {}
        self.sets: set[str] = set()

    def alternatives(self, match: Match, *, exclusive: bool) -> list[bytes]:
        """Conditions of which any suffices. Raises NeverError when none could hold.

        ``exclusive``: at most one of them holds.
        """
        if match.version is not None and match.version != self._version:
            raise NeverError
        choices = [
            *self._protocol(match),
            *self._icmp(match),
            *self._nets(SOURCE_OFFSET, match.src_nets, match.not_src_nets),
            *self._nets(DESTINATION_OFFSET, match.dst_nets, match.not_dst_nets),
            *self._sets(SOURCE_OFFSET, match.src_sets, match.not_src_sets),
            *self._sets(DESTINATION_OFFSET, match.dst_sets, match.not_dst_sets),
            *self._ports(0, match.src_ports, match.src_named_ports),
            *self._ports(2, match.dst_ports, match.dst_named_ports),
        ]
        if match.protocol is None or match.protocol in PORT_PROTOCOLS:
            choices += self._no_ports(0, match.not_src_ports, match.not_src_named_ports)
            choices += self._no_ports(2, match.not_dst_ports, match.not_dst_named_ports)
        if exclusive:
            choices = [_exclude(options) for options in choices]
        return [
            b"".join(option.holds for option in chosen) for chosen in itertools.product(*choices)
        ]

    def _protocol(self, match: Match) -> Iterator[tuple[_Option, ...]]:
        wanted = match.protocol
        if wanted is None and _speaks_of_icmp(match):
            wanted = ICMP[self._version]
        load = nft.load_meta(Meta.L4PROTO)
        if wanted is not None:
            portless = wanted not in PORT_PROTOCOLS
            if wanted == match.not_protocol or (portless and _demands_ports(match)):
                raise NeverError
            yield (_Option(load + nft.compare(bytes((wanted,)))),)
            return
        if match.not_protocol is not None:
            unwanted = bytes((match.not_protocol,))
            yield (_Option(load + nft.compare(unwanted, Compare.NOT_EQUAL)),)
        if _speaks_of_ports(match):
            keys = tuple(bytes((number,)) for number in PORT_PROTOCOLS)
            yield (_Option(load + nft.lookup(self._constant(PROTOCOL, keys))),)

    def _icmp(self, match: Match) -> Iterator[tuple[_Option, ...]]:
        if not _speaks_of_icmp(match):
            return
        if match.protocol not in (None, ICMP[self._version]):
            raise NeverError
        for offset, wanted, how in (
            (0, match.icmp_type, Compare.EQUAL),
            (1, match.icmp_code, Compare.EQUAL),
            (0, match.not_icmp_type, Compare.NOT_EQUAL),
            (1, match.not_icmp_code, Compare.NOT_EQUAL),
        ):
            if wanted is not None:
                load = nft.load_payload(Base.TRANSPORT, offset, 1)
                yield (_Option(load + nft.compare(bytes((wanted,)), how)),)

    def _nets(
        self, offsets: dict[int, int], wanted: tuple[Net, ...], unwanted: tuple[Net, ...]
    ) -> Iterator[tuple[_Option, ...]]:
        offset = offsets[self._version]
        if wanted:
            nets = self._own_version(wanted)
            if not nets:
                raise NeverError
            if all(net.length for net in nets):
                yield (_Option(self._in_nets(offset, nets, inverted=False)),)
        nets = self._own_version(unwanted)
        if any(net.length == 0 for net in nets):
            raise NeverError
        if nets:
            yield (_Option(self._in_nets(offset, nets, inverted=True)),)

    def _in_nets(self, offset: int, nets: Sequence[Net], *, inverted: bool) -> bytes:
        size = BITS[self._version] // 8
        if len(nets) > 1:
            name = (
                self._constant(self._address, tuple(net.packed() for net in nets))
                if all(net.is_host for net in nets)
                else self._constant_ranges(self._address, ranges(nets))
            )
            return self._address_at(offset) + nft.lookup(name, inverted=inverted)
        how = Compare.NOT_EQUAL if inverted else Compare.EQUAL
        net = nets[0]
        whole, rest = divmod(net.length, 8)
        if not rest:
            load = nft.load_payload(Base.NETWORK, offset, whole)
            return load + nft.compare(net.packed()[:whole], how)
        bits = BITS[self._version]
        mask = ((1 << net.length) - 1) << (bits - net.length)
        return (
            self._address_at(offset)
            + nft.mask(mask.to_bytes(size, "big"))
            + nft.compare(net.packed(), how)
        )

    def _sets(
        self, offsets: dict[int, int], wanted: Sequence[str], unwanted: Sequence[str]
    ) -> Iterator[tuple[_Option, ...]]:
        load = self._address_at(offsets[self._version])
        for set_id in wanted:
            found, missed = (
                [load + nft.lookup(name, inverted=inverted) for name in self._parts(set_id)]
                for inverted in (False, True)
            )
            yield tuple(map(_Option, found, missed))
        for set_id in unwanted:
            for name in self._parts(set_id):
                yield (_Option(load + nft.lookup(name, inverted=True)),)

    def _parts(self, set_id: str) -> list[str]:
        """The kernel's sets that hold the members of a set of addresses."""
        name = set_name(set_id)
        self.sets.add(name)
        return [name, networks_name(name)] if self._holds_networks(name) else [name]

    def _ports(
        self, offset: int, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Iterator[tuple[_Option, ...]]:
        if ports or named:
            yield tuple(
                _Option(self._in_ports(offset, each, False), self._in_ports(offset, each, True))
                for each in ([ports] if ports else []) + list(named)
            )

    def _no_ports(
        self, offset: int, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Iterator[tuple[_Option, ...]]:
        for each in ([ports] if ports else []) + list(named):
            yield (_Option(self._in_ports(offset, each, True)),)

    def _in_ports(self, offset: int, ports: Sequence[PortRange] | str, inverted: bool) -> bytes:
        if isinstance(ports, str):
            addresses = SOURCE_OFFSET if offset == 0 else DESTINATION_OFFSET
            next_register = nft.NARROW_REGISTER + BITS[self._version] // 32
            return (
                self._address_at(addresses[self._version])
                + nft.load_meta(Meta.L4PROTO, next_register)
                + nft.load_payload(Base.TRANSPORT, offset, 2, next_register + 1)
                + nft.lookup(set_name(ports), inverted=inverted)
            )
        load = nft.load_payload(Base.TRANSPORT, offset, 2)
        spans = merge(Range(16, first, last) for first, last in ports)
        if len(spans) > 1:
            name = self._constant_ranges(PORT, spans)
            return load + nft.lookup(name, inverted=inverted)
        first, last = (struct.pack(">H", port) for port in spans[0][1:])
        if first == last:
            return load + nft.compare(first, Compare.NOT_EQUAL if inverted else Compare.EQUAL)
        return load + nft.within(first, last, inverted=inverted)

    @property
    def _address(self) -> KeyType:
        return address_type(self._version)

    def _address_at(self, offset: int) -> bytes:
        return nft.load_payload(Base.NETWORK, offset, BITS[self._version] // 8)

    def _own_version(self, nets: Sequence[Net]) -> list[Net]:
        return sorted({net for net in nets if net.version == self._version})

    def _constant(self, key: KeyType, keys: tuple[bytes, ...]) -> str:
        name = f"c-{names.digest(repr((key, keys)), 23)}"
        self.constants[name] = ConstantSet(NftSet(name, (key,)), keys=keys)
        return name

    def _constant_ranges(self, key: KeyType, spans: Sequence[Range]) -> str:
        name = f"c-{names.digest(repr((key, spans)), 23)}"
        declaration = NftSet(name, (key,), ranges=True)
        self.constants[name] = ConstantSet(declaration, spans=tuple(spans))
        return name


def set_name(set_id: str) -> str:
    """The kernel's name of a set: nft(8) reads no colons in names."""
    return set_id.replace(":", "-")


def networks_name(name: str) -> str:
    """Beside the set of a set's hosts, that of its networks."""
    return name + _NETWORKS


def networks_holder(name: str) -> str | None:
    """Beside which set one is that holds networks; None: it is not such a one by its name."""
    return name.removesuffix(_NETWORKS) if name.endswith(_NETWORKS) else None


def address_type(version: int) -> KeyType:
    """The type of an address."""
    return ADDRESS4 if version == V4 else ADDRESS6


def source(version: int) -> bytes:
    """Load the address that a packet comes from."""
    return nft.load_payload(Base.NETWORK, SOURCE_OFFSET[version], BITS[version] // 8)


def set_declarations(version: int, name: str, kind: SetKind) -> NftSet:
    """The set that holds the hosts, or the named ports, of a set."""
    address = address_type(version)
    if kind is SetKind.NAMED_PORT:
        return NftSet(name, (address, PROTOCOL, PORT))
    return NftSet(name, (address,))


def network_declaration(version: int, name: str) -> NftSet:
    """The set that holds the networks of a set."""
    return NftSet(networks_name(name), (address_type(version),), ranges=True)


def _exclude(options: tuple[_Option, ...]) -> tuple[_Option, ...]:
    """The same options, but each only where those before it do not hold."""
    return tuple(
        _Option(b"".join(before.fails for before in options[:index]) + option.holds)
        for index, option in enumerate(options)
    )


def _speaks_of_icmp(match: Match) -> bool:
    return any(
        value is not None
        for value in (match.icmp_type, match.icmp_code, match.not_icmp_type, match.not_icmp_code)
    )


def _demands_ports(match: Match) -> bool:
    return bool(
        match.src_ports or match.dst_ports or match.src_named_ports or match.dst_named_ports
    )


def _speaks_of_ports(match: Match) -> bool:
    return _demands_ports(match) or bool(
        match.not_src_ports
        or match.not_dst_ports
        or match.not_src_named_ports
        or match.not_dst_named_ports
    )
