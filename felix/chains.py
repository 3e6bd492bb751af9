"""Chains without a word of iptables or nftables: what the calculation says, dataplanes render.

A ``Chain`` is a list of rules walked in order; a ``Dispatch`` sends a packet to the chain of
its interface (a verdict map in nftables, a tree of chains in iptables). Sets are named by the
engine's ids, marks by meaning: which bits and which names they become is a dataplane's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import NamedTuple

from api.net import Net
from policy.model import Match, PortRange

# TCP, UDP, SCTP, DCCP, UDP-Lite: their headers begin with the ports.
PORT_PROTOCOLS = (6, 17, 132, 33, 136)


class Table(Enum):
    """Where in a packet's way chains hang. The values are netfilter's names."""

    RAW = "raw"
    MANGLE = "mangle"
    FILTER = "filter"
    NAT = "nat"


class Hook(NamedTuple):
    """A place where the kernel hands packets out: ``FORWARD`` of the filter table.

    ``behind_ipvs``: where it hands them out once more, after ipvs. iptables has nothing there.
    """

    table: Table
    chain: str
    behind_ipvs: bool = False


class Mark(Flag):
    """What a packet remembers from chain to chain."""

    NONE = 0
    ACCEPT = auto()  # a policy or profile allowed it
    PASS = auto()  # a policy passed it on to the next tier
    SERVICE = auto()  # it is for a service that ipvs translates
    WORKLOAD = auto()  # and a workload sent it
    # and digits of a number: by which host endpoint's interface it came.
    ENTRY_1 = auto()
    ENTRY_2 = auto()
    ENTRY_4 = auto()
    ENTRY_8 = auto()
    ENTRY_16 = auto()
    ENTRY_32 = auto()


class State(Enum):
    """Connection tracking states. The values are netfilter's names."""

    RELATED = "RELATED"
    ESTABLISHED = "ESTABLISHED"
    INVALID = "INVALID"


class Peer(Enum):
    """Which address of a packet is the other's, not the endpoint's."""

    SOURCE = "source"
    DESTINATION = "destination"


class Side(Enum):
    """Which interface of a packet: the one it came in by or the one it goes out by."""

    IN = "in"
    OUT = "out"


@dataclass(frozen=True, slots=True)
class Accept:
    """The packet is let through; no later rule sees it."""


@dataclass(frozen=True, slots=True)
class Allow:
    """Policy let the packet through: it is accepted or, if the settings say so, returned.

    Then it has the mark ACCEPT, which others may look at.
    """


@dataclass(frozen=True, slots=True)
class Drop:
    """The packet ends here."""


@dataclass(frozen=True, slots=True)
class Deny:
    """Policy stops the packet: it is dropped or, if the settings say so, refused.

    In the table FILTER only; elsewhere it is dropped.
    """


@dataclass(frozen=True, slots=True)
class Reject:
    """The packet ends here, and its sender is told (ICMP port unreachable; table FILTER only)."""


@dataclass(frozen=True, slots=True)
class Return:
    """Go on after the rule that jumped here."""


@dataclass(frozen=True, slots=True)
class Jump:
    """Walk another chain, then come back to the next rule."""

    chain: str


@dataclass(frozen=True, slots=True)
class Goto:
    """Walk another chain; its end is the end of this one."""

    chain: str


@dataclass(frozen=True, slots=True)
class ClearMarks:
    """Forget what the packet remembers."""

    marks: Mark


@dataclass(frozen=True, slots=True)
class MarkAndReturn:
    """Remember ``mark`` and return. The mark is known to be clear where this rule stands."""

    mark: Mark


@dataclass(frozen=True, slots=True)
class Log:
    """Write a line to the kernel log and go on."""

    prefix: str


@dataclass(frozen=True, slots=True)
class NoTrack:
    """Keep the packet out of connection tracking, and go on (table RAW only)."""


@dataclass(frozen=True, slots=True)
class Masquerade:
    """Replace the source by the address of the interface it goes out by (table NAT only).

    ``ports``: from these; the rule says TCP or UDP then. So it is for ``SourceNat``, too.
    """

    ports: PortRange | None = None


@dataclass(frozen=True, slots=True)
class SourceNat:
    """Replace the source by an address, a /32 or /128 (table NAT only)."""

    address: Net
    ports: PortRange | None = None


@dataclass(frozen=True, slots=True)
class DestinationNat:
    """Replace the destination by an address, a /32 or /128 (table NAT only)."""

    address: Net


Action = (
    Accept
    | Allow
    | Drop
    | Deny
    | Reject
    | Return
    | Jump
    | Goto
    | ClearMarks
    | MarkAndReturn
    | Log
    | NoTrack
    | Masquerade
    | SourceNat
    | DestinationNat
)


ANY_PACKET = Match()


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold, all of it. Fields left at their default are no condition.

    ``packet`` speaks of the packet's own header, as policies do. Interfaces are names; a
    trailing ``*`` stands for any ending.
    """

    packet: Match = ANY_PACKET
    in_interface: str = ""
    out_interface: str = ""
    marked: Mark = Mark.NONE  # all of these are set
    unmarked: Mark = Mark.NONE  # all of these are clear
    states: tuple[State, ...] = ()  # any of these
    to_this_host: bool = False  # the destination is one of the host's own addresses
    from_this_host: bool | None = None  # whether the source is
    translated: bool | None = None  # whether the destination was another before NAT
    spoofed: bool = False  # the route back to the source leaves by another interface


ALWAYS = Condition()


@dataclass(frozen=True, slots=True)
class ChainRule:
    """One step of a chain: if ``condition`` holds, do ``action``. ``comment`` is for people."""

    action: Action
    condition: Condition = ALWAYS
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """Rules in order. A packet that meets the end returns to where the chain was called."""

    name: str
    rules: tuple[ChainRule, ...]


@dataclass(frozen=True, slots=True)
class Ticket:
    """Packets with a protocol, to one of the ports, from or to a peer. All must hold.

    ``protocol`` None: any. ``ports`` empty: any; else the protocol has ports. The peer is in the
    set ``set_id`` if there is one, else in one of ``nets``; None: anybody.
    """

    protocol: int | None = None
    ports: tuple[int, ...] = ()
    set_id: str = ""
    nets: tuple[Net, ...] | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """Many policies' chains that all do the same ``action``: the packet goes to any that matches.

    ``side`` is where a packet's peer is. ``entries`` are (chain, its rules as tickets), in order.
    One may walk the chains, of which one does the action; or look the packet up in all tickets
    at once, do the action and return.
    """

    name: str
    side: Peer
    action: Action
    entries: tuple[tuple[str, tuple[Ticket, ...]], ...]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The chain that an interface's packets go to; ``otherwise`` is walked by all others.

    ``targets`` are (interface, chain), sorted by interface. As after ``Goto``, the end of the
    target chain returns to where the dispatch was called.
    """

    name: str
    side: Side
    targets: tuple[tuple[str, str], ...]
    otherwise: tuple[ChainRule, ...]


@dataclass(frozen=True, slots=True)
class SourceDispatch:
    """The chain that packets from an address go to; ``otherwise`` is walked by all others.

    ``targets`` are (a /32 or /128, chain), sorted. A target chain ends as after ``Goto``.
    """

    name: str
    targets: tuple[tuple[Net, str], ...]
    otherwise: tuple[ChainRule, ...]


# Whatever one can jump to.
AnyChain = Chain | Dispatch | SourceDispatch | Index
