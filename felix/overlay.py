"""The VXLAN overlay: which remote addresses are reached how, and through which peers.

Pure and incremental: it is told what changed and answers with the routes and peers that are
different now. Addresses follow the blocks that nodes hold; one that a node borrowed from
another's block gets a route of its own. See RFC 7348, ip-link(8) "VXLAN Type Support".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from api.net import BITS, Net

K = TypeVar("K")
V = TypeVar("V")


class Encapsulation(Enum):
    """When packets to a pool's addresses on other nodes are encapsulated."""

    NEVER = "Never"
    ALWAYS = "Always"
    CROSS_SUBNET = "CrossSubnet"


@dataclass(frozen=True, slots=True)
class Pool:
    """What felix needs to know of an IPPool."""

    net: Net
    vxlan: Encapsulation
    nat_outgoing: bool


@dataclass(frozen=True, slots=True)
class Host:
    """What felix needs to know of a Node. Addresses are /32; ``network`` is its subnet."""

    address: Net | None
    network: Net | None
    tunnel: Net | None
    mac: str


@dataclass(frozen=True, slots=True)
class Remote:
    """The way to an address on another node: ``gateway`` is the node's address or tunnel end."""

    gateway: Net
    tunnelled: bool


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node's end of the overlay: the tunnel address is at ``mac``, behind ``address``."""

    tunnel: Net
    mac: str
    address: Net


@dataclass(frozen=True, slots=True)
class Changes:
    """What is different since the last flush; None: there is none any more."""

    routes: dict[Net, Remote | None]
    peers: dict[str, Peer | None]  # by node


def tunnel_mac(node: str) -> str:
    """The MAC address of a node's VXLAN device: ``66:`` and five bytes of the name's SHA-1."""
    return f"66:{hashlib.sha1(node.encode()).digest()[:5].hex(':')}"


class _Holders:
    """Which nodes hold which networks. Holding twice takes letting go twice."""

    def __init__(self) -> None:
        self._nodes: dict[Net, dict[str, int]] = {}
        self._nets: dict[str, set[Net]] = {}

    def __contains__(self, net: Net) -> bool:
        return net in self._nodes

    def all(self) -> Iterable[Net]:
        """Every network somebody holds."""
        return self._nodes.keys()

    def of(self, node: str) -> Iterable[Net]:
        """What a node holds."""
        return self._nets.get(node, ())

    def holder(self, net: Net) -> str | None:
        """Who holds it; of several always the same one."""
        return min(self._nodes.get(net, ()), default=None)

    def change(self, node: str, net: Net, by: int) -> bool:
        """Count ``by`` more (or less); whether the node began or ceased to hold it."""
        nodes = self._nodes.setdefault(net, {})
        before = nodes.get(node, 0)
        nodes[node] = before + by
        if before and nodes[node]:
            return False
        if nodes[node]:
            self._nets.setdefault(node, set()).add(net)
            return True
        self._nets.get(node, set()).discard(net)
        del nodes[node]
        if not nodes:
            del self._nodes[net]
        return True


class Overlay:
    """The overlay as ``node`` sees it."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._pools: tuple[Pool, ...] = ()
        self._enabled = False
        self._hosts: dict[str, Host] = {}
        self._blocks = _Holders()
        self._addresses = _Holders()
        self._lengths: dict[tuple[int, int], int] = {}  # (version, length): so many blocks
        self._dirty_nets: set[Net] = set()
        self._dirty_nodes: set[str] = set()
        self.routes: dict[Net, Remote] = {}
        self.peers: dict[str, Peer] = {}

    @property
    def enabled(self) -> bool:
        """Whether any pool wants encapsulation, or the settings ask for it."""
        return self._enabled

    @property
    def host(self) -> Host | None:
        """This node, if it is registered."""
        return self._hosts.get(self._node)

    def set_pools(self, pools: Iterable[Pool], enabled: bool | None) -> None:
        """The pools of the cluster. ``enabled`` overrides what they say about VXLAN."""
        self._pools = tuple(pool for pool in pools if pool.vxlan is not Encapsulation.NEVER)
        self._enabled = bool(self._pools) if enabled is None else enabled
        self._dirty_everything()

    def set_host(self, node: str, host: Host | None) -> None:
        """A node as it is now; None: there is none of this name."""
        before = self._hosts.get(node)
        if host == before:
            return
        if before and before.tunnel:
            self._use(node, before.tunnel, -1)
        if host and host.tunnel:
            self._use(node, host.tunnel, 1)
        if host is None:
            del self._hosts[node]
        else:
            self._hosts[node] = host
        if node == self._node:
            self._dirty_everything()
            return
        self._dirty_nodes.add(node)
        self._dirty_nets.update(self._blocks.of(node), self._addresses.of(node))

    def set_block(self, node: str, block: Net, held: bool) -> None:
        """A node has taken a block, or (not ``held``) let it go."""
        if not self._blocks.change(node, block, 1 if held else -1):
            return
        kind = (block.version, block.length)
        self._lengths[kind] = self._lengths.get(kind, 0) + (1 if held else -1)
        self._dirty_nets.add(block)
        # Addresses inside may have become borrowed ones, or ceased to be.
        bits = BITS[block.version]
        inside = (Net(block.version, block.address + n, bits) for n in range(block.size))
        self._dirty_nets.update(address for address in inside if address in self._addresses)

    def set_address(self, node: str, address: Net, used: bool) -> None:
        """A workload of a node uses an address (a /32 or /128), or no longer does."""
        self._use(node, address, 1 if used else -1)

    def flush(self) -> Changes:
        """What is different since the last call."""
        routes: dict[Net, Remote | None] = {}
        for net in self._dirty_nets:
            _put(self.routes, routes, net, self._route(net))
        peers: dict[str, Peer | None] = {}
        for node in self._dirty_nodes:
            _put(self.peers, peers, node, self._peer(node))
        self._dirty_nets.clear()
        self._dirty_nodes.clear()
        return Changes(routes, peers)

    def _dirty_everything(self) -> None:
        self._dirty_nets.update(self._blocks.all(), self._addresses.all(), self.routes)
        self._dirty_nodes.update(self._hosts, self.peers)

    def _use(self, node: str, address: Net, by: int) -> None:
        if self._addresses.change(node, address, by):
            self._dirty_nets.add(address)

    def _route(self, net: Net) -> Remote | None:
        """How ``net`` is reached; None when that is not felix' affair."""
        node = self._blocks.holder(net) or self._addresses.holder(net)
        if node is None or node == self._node or (net.is_host and self._covered(net, node)):
            return None
        pool = next((pool for pool in self._pools if pool.net.contains(net)), None)
        own, other = self.host, self._hosts.get(node)
        if not self._enabled or pool is None or own is None or other is None:
            return None
        if pool.vxlan is Encapsulation.CROSS_SUBNET and _same_subnet(own, other):
            assert other.address is not None
            return Remote(other.address, tunnelled=False)
        peer = self._peer(node)
        return Remote(peer.tunnel, tunnelled=True) if own.tunnel and peer else None

    def _covered(self, address: Net, node: str) -> bool:
        """Whether the address lies in a block of the node that uses it."""
        bits = BITS[address.version]
        for (version, length), count in self._lengths.items():
            if version == address.version and count and length < bits:
                start = address.address >> (bits - length) << (bits - length)
                if node == self._blocks.holder(Net(version, start, length)):
                    return True
        return False

    def _peer(self, node: str) -> Peer | None:
        host = self._hosts.get(node)
        if not self._enabled or node == self._node or host is None:
            return None
        if host.tunnel is None or host.address is None:
            return None
        return Peer(host.tunnel, host.mac, host.address)


def _same_subnet(own: Host, other: Host) -> bool:
    return bool(own.network and other.address and own.network.contains(other.address))


def _put(table: dict[K, V], changes: dict[K, V | None], key: K, value: V | None) -> None:
    if table.get(key) == value:
        return
    changes[key] = value
    if value is None:
        del table[key]
    else:
        table[key] = value
