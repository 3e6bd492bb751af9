"""What is allowed, as in Calico, and hardly meant: said as warnings, and done all the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from api.bgp import BGPConfiguration, BGPPeer
from api.ippool import IPPool
from api.metadata import Resource
from api.net import format_address, parse_interface
from api.node import Node
from api.policy import BUILT_IN_TIERS
from api.registry import dump
from datastore.interface import (
    JSON,
    Datastore,
    Entry,
    Key,
    NotFoundError,
    StoreError,
    get_all,
)
from ipam.overlaps import Range, node_ranges, service_ranges, shared
from ipam.pools import Pools
from manxctl.documents import IN_DEFAULT_TIER, TIERED, Document, in_default_tier
from manxctl.options import moving


def doubts(
    store: Datastore, found: Sequence[Document], resources: Sequence[Resource]
) -> Iterator[str]:
    """The warnings about what is about to be written, each with its document and object."""
    pairs = list(zip(found, resources, strict=True))
    yield from moving(store)
    for look, question in _LOOKS:
        try:
            yield from look(store, pairs)
        except StoreError as error:
            yield f"can't tell whether {question}: {error}"


def _tiers(store: Datastore, pairs: Sequence[tuple[Document, Resource]]) -> Iterator[str]:
    """Policies in tiers that don't exist: until those do, they deny before all others."""
    wanted = [
        (document, tier)
        for document, resource in pairs
        if document.key.kind in TIERED
        and (tier := getattr(getattr(resource, "spec", None), "tier", None))
        and tier not in BUILT_IN_TIERS
    ]
    if not wanted:
        return
    known = _names(store, "Tier", pairs)
    for document, tier in wanted:
        if tier not in known:
            yield document.complain(
                f"spec.tier: {tier!r}: there is no such tier; until there is, the policy stands"
                " before all others, and what it doesn't allow is denied"
            )


def _twins(store: Datastore, pairs: Sequence[tuple[Document, Resource]]) -> Iterator[str]:
    """Policies of the default tier that are there under the other name such a policy may have."""
    wanted = [
        document
        for document, _ in pairs
        if document.key.kind in TIERED and in_default_tier(document.value)
    ]
    twins = [_twin(document.key) for document in wanted]
    for document, outcome in zip(wanted, get_all(store, twins), strict=True):
        if isinstance(outcome, Entry):
            if in_default_tier(outcome.value):
                yield document.complain(
                    f"metadata.name: {document.key.name!r}: there is {outcome.key.name!r}, too"
                    f" (Calico before 3.32 began these names with {IN_DEFAULT_TIER!r}), and both"
                    " count; delete the one that is not meant"
                )
        elif not isinstance(outcome, NotFoundError):
            raise outcome


def _twin(key: Key) -> Key:
    bare = key.name.removeprefix(IN_DEFAULT_TIER)
    return replace(key, name=bare if bare != key.name else IN_DEFAULT_TIER + bare)


def _peers(store: Datastore, pairs: Sequence[tuple[Document, Resource]]) -> Iterator[str]:
    """BGPPeers of nodes that don't exist."""
    wanted = [
        (document, peer.spec.node)
        for document, peer in pairs
        if isinstance(peer, BGPPeer) and peer.spec.node
    ]
    if not wanted:
        return
    known = _names(store, "Node", pairs)
    for document, node in wanted:
        if node not in known:
            yield document.complain(
                f"spec.node: {node!r}: there is no such node, so nobody has this session;"
                f" expected one of {_few(known)}"
            )


def _addresses(store: Datastore, pairs: Sequence[tuple[Document, Resource]]) -> Iterator[str]:
    """Nodes with the address of another: BGP sessions and tunnels would meet the wrong one."""
    nodes = [(document, node) for document, node in pairs if isinstance(node, Node)]
    if not nodes:
        return
    written = {node.name for _, node in nodes}
    holders: dict[str, str] = {}
    for entry in store.list("Node").entries:
        if entry.key.name not in written:
            for _, host in _hosts(_bgp(entry.value)):
                holders.setdefault(host, entry.key.name)
    for document, node in nodes:
        for field, host in _hosts(_bgp(dump(node))):
            other = holders.setdefault(host, node.name)
            if other != node.name:
                yield document.complain(
                    f"spec.bgp.{field}: {host!r}: node {other} has this address, too"
                )


def _pools(store: Datastore, pairs: Sequence[tuple[Document, Resource]]) -> Iterator[str]:
    """Pools over the addresses of nodes or services, whichever of the two is written."""
    ranges = {document.key: list(_ranges(resource)) for document, resource in pairs}
    pools = [(document, pool) for document, pool in pairs if isinstance(pool, IPPool)]
    if not pools and not any(ranges.values()):
        return
    known = [
        *chain.from_iterable(ranges.values()),
        *node_ranges(_others(store, "Node", pairs)),
        *service_ranges(_others(store, "BGPConfiguration", pairs)),
    ]
    for document, pool in pools:
        load_balancers = "LoadBalancer" in pool.spec.allowed_uses
        for other in shared(pool.spec.net, known, load_balancers=load_balancers):
            yield document.complain(
                f"spec.cidr: {pool.spec.cidr!r}: it shares addresses with {other.net},"
                f" {other.use}; packets to those would go to pods"
            )
    written = {document.key.name for document, _ in pools}
    stored = [pool for pool in Pools(store).all() if pool.name not in written]
    for document, _ in pairs:
        for there in stored if ranges[document.key] else ():
            load_balancers = "LoadBalancer" in there.uses
            for own in shared(there.net, ranges[document.key], load_balancers=load_balancers):
                yield document.complain(
                    f"spec: {own.net}, {own.use}, shares addresses with IPPool {there}; packets to"
                    " those would go to pods"
                )


def _ranges(resource: Resource) -> Iterator[Range]:
    """What nodes and services use according to what is written."""
    if isinstance(resource, Node):
        yield from node_ranges([dump(resource)])
    elif isinstance(resource, BGPConfiguration):
        yield from service_ranges([dump(resource)])


def _others(
    store: Datastore, kind: str, pairs: Sequence[tuple[Document, Resource]]
) -> Iterator[JSON]:
    """The objects of a kind that are not about to be written."""
    written = {document.key for document, _ in pairs}
    return (entry.value for entry in store.list(kind).entries if entry.key not in written)


def _bgp(node: JSON) -> JSON:
    spec = node.get("spec")
    bgp = spec.get("bgp") if isinstance(spec, dict) else None
    return bgp if isinstance(bgp, dict) else {}


def _hosts(bgp: JSON) -> Iterator[tuple[str, str]]:
    """Field and address; of a broken object none, as nobody's sessions go there."""
    for field in ("ipv4Address", "ipv6Address"):
        try:
            host, _ = parse_interface(str(bgp.get(field)))
        except ValueError:
            continue
        yield field, format_address(*host[:2])


def _names(store: Datastore, kind: str, pairs: Sequence[tuple[Document, Resource]]) -> set[str]:
    """The objects of a kind that exist, or will in a moment."""
    stored = (entry.key.name for entry in store.list(kind).entries)
    written = (document.key.name for document, _ in pairs if document.key.kind == kind)
    return set(chain(stored, written))


def _few(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "") if shown else "none yet"


_LOOKS = (
    (_tiers, "the tiers of policies are there"),
    (_twins, "policies are there under another name"),
    (_peers, "the nodes of BGPPeers are there"),
    (_addresses, "other nodes have these addresses"),
    (_pools, "pools share addresses with nodes or services"),
)
