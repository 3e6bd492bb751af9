"""What calculation tells the dataplane: the nouns between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from api.net import Net
from felix.chains import AnyChain, ChainRule, Hook, Table
from felix.overlay import Peer, Remote
from felix.settings import Settings
from policy.engine import SetDelta
from policy.model import EndpointId


class SetKey(NamedTuple):
    """A set in one IP version. ``id`` is the engine's, or names one of felix' own."""

    version: int
    id: str


class ChainKey(NamedTuple):
    """A chain of a table in one IP version."""

    version: int
    table: Table
    name: str


class HookKey(NamedTuple):
    """Where the kernel hands over its packets, in one IP version."""

    version: int
    hook: Hook


@dataclass(frozen=True, slots=True)
class Device:
    """The VXLAN device of this node. ``local`` is the node's address, ``tunnel`` its tunnel end.

    Both are a /32. ``mtu`` 0: that of the uplink, less what encapsulation adds.
    """

    vni: int
    port: int
    local: Net
    tunnel: Net
    mac: str
    mtu: int


@dataclass(frozen=True, slots=True)
class Local:
    """An endpoint of this node: its interface, and the container it is of."""

    interface: str
    container: str


@dataclass(frozen=True, slots=True)
class Limit:
    """``rate`` and ``peak`` in bits a second, ``burst`` in bits, ``least`` in bytes; 0: none."""

    rate: int
    burst: int = 0
    peak: int = 0
    least: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of what a workload receives, and of what it sends; None: it may have all there is."""

    ingress: Limit | None = None
    egress: Limit | None = None


UNLIMITED = Limits()


@dataclass(slots=True)
class Delta:
    """What is wanted now and was not before; None: no longer wanted. What is absent stays.

    ``tunnel`` is (this node's address, its VXLAN device). ``forwarding`` are IP versions.
    """

    settings: Settings | None = None
    sets: dict[SetKey, SetDelta] = field(default_factory=dict)
    chains: dict[ChainKey, AnyChain | None] = field(default_factory=dict)
    hooks: dict[HookKey, tuple[ChainRule, ...] | None] = field(default_factory=dict)
    pods: dict[Net, str | None] = field(default_factory=dict)  # address -> interface
    endpoints: dict[EndpointId, Local | None] = field(default_factory=dict)  # of this node
    loose: dict[str, bool] = field(default_factory=dict)  # interface -> may send with others'
    limits: dict[str, Limits] = field(default_factory=dict)  # interface -> its bandwidth
    remotes: dict[Net, Remote | None] = field(default_factory=dict)
    peers: dict[str, Peer | None] = field(default_factory=dict)
    tunnel: tuple[Net | None, Device | None] | None = None
    forwarding: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Registration:
    """What the datastore should say about this node.

    ``missing``: it has no Node object. ``unaddressed``: its Node does not say its address.
    ``tunnel``: its tunnel address, if that is usable. ``pools``: CIDRs from which it may take
    one. It wants one if ``overlay``, else none.
    """

    missing: bool = False
    unaddressed: bool = False
    overlay: bool = False
    pools: tuple[str, ...] = ()
    tunnel: Net | None = None
