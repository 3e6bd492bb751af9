"""Translation of addresses, as neutral chains: what leaves the pools, and floating addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from api.net import Net
from felix import names
from felix.chains import (
    Action,
    Chain,
    ChainRule,
    Condition,
    DestinationNat,
    Hook,
    Jump,
    Masquerade,
    Return,
    SourceNat,
    Table,
)
from felix.settings import NatOutgoing
from policy.model import Match

_TCP, _UDP = 6, 17


def frame(*, masquerade: bool, floating: bool) -> Iterator[tuple[Hook, tuple[Table, Chain]]]:
    """Our chain of each hook. Those it jumps to are ``outgoing`` and ``floating``."""
    after = ((names.FLOATING_SNAT, floating), (names.NAT_OUTGOING, masquerade))
    before = ((names.FLOATING_DNAT, floating),)
    used = {
        "PREROUTING": (names.PREROUTING, before),
        "OUTPUT": (names.OUTPUT, before),
        "POSTROUTING": (names.POSTROUTING, after),
    }
    for hook, (name, targets) in used.items():
        jumps = tuple(ChainRule(Jump(target)) for target, wanted in targets if wanted)
        if jumps:
            chain = Chain(name, jumps)
            yield Hook(Table.NAT, hook), (Table.NAT, chain)


def outgoing(how: NatOutgoing, version: int) -> Chain:
    """From a pool that wants it to what is in no pool."""
    spared = (names.ALL_POOLS, *((names.ALL_HOSTS,) if how.spare_hosts else ()))
    match = Match(src_sets=(names.MASQUERADE_POOLS,), not_dst_sets=spared)

    def rule(action: Action, protocol: int | None = None) -> ChainRule:
        packet = replace(match, protocol=protocol)
        return ChainRule(action, Condition(packet=packet, out_interface=how.interface))

    address = how.address if how.address and how.address.version == version else None
    rules: list[ChainRule] = []
    if how.ports is not None:
        ported = SourceNat(address, how.ports) if address else Masquerade(how.ports)
        for protocol in (_TCP, _UDP):
            # A translation ends the walk; where all ports are taken, none is done.
            rules += (rule(ported, protocol), rule(Return(), protocol))
    rules.append(rule(SourceNat(address) if address else Masquerade()))
    return Chain(names.NAT_OUTGOING, tuple(rules))


def floating(nats: Mapping[Net, Net]) -> tuple[Chain, Chain]:
    """Endpoints' addresses by those from outside; the second is for those that call themselves."""
    ordered = sorted(nats.items())
    return (
        Chain(
            names.FLOATING_DNAT,
            tuple(
                ChainRule(DestinationNat(internal), Condition(packet=Match(dst_nets=(external,))))
                for external, internal in ordered
            ),
        ),
        Chain(
            names.FLOATING_SNAT,
            tuple(
                ChainRule(
                    SourceNat(external),
                    Condition(packet=Match(src_nets=(internal,), dst_nets=(internal,))),
                )
                for external, internal in ordered
            ),
        ),
    )
