"""The compiled rule model: what policies become, and what every dataplane renders.

Neutral: numbers instead of names, sets instead of selectors, no word of iptables or
nftables. ``evaluate`` and the renderers read the same objects, so they can be held against
each other.

How a ``Rule`` matches: every condition that is present must hold (AND); a condition that
is None or empty is no condition. Inside one condition any of its elements suffices (OR),
except for the ``*_sets``, all of which must contain the address (and none of the
``not_*_sets``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from api.net import Net


class Action(Enum):
    """What a rule does with a packet. ``LOG`` is not terminal; ``PASS`` leaves the tier."""

    ALLOW = "Allow"
    DENY = "Deny"
    PASS = "Pass"
    LOG = "Log"


class Direction(Enum):
    """Seen from the endpoint: ``INGRESS`` towards it, ``EGRESS`` away from it."""

    INGRESS = "ingress"
    EGRESS = "egress"


class PortRange(NamedTuple):
    """Ports ``first`` to ``last``, both included."""

    first: int
    last: int


class SetKind(Enum):
    """What the members of a set are."""

    NET = "net"  # member: Net; from selectors, and where connections from a service come from
    NAMED_PORT = "named-port"  # member: NamedPortMember; also where connections to a service go


class NamedPortMember(NamedTuple):
    """An address (a host Net) on which a named port is this protocol and number."""

    net: Net
    protocol: int
    port: int


Member = Net | NamedPortMember


class PolicyId(NamedTuple):
    """Which policy. ``kind`` is an id of ``api.registry``; ``namespace`` may be empty."""

    kind: str
    namespace: str
    name: str

    @property
    def is_staged(self) -> bool:
        """Whether the policy is a draft: looked at and counted, but it decides nothing."""
        return self.kind.startswith("Staged")

    def __str__(self) -> str:
        return f"{self.kind}({self.namespace + '/' if self.namespace else ''}{self.name})"


class EndpointId(NamedTuple):
    """Which endpoint: ``kind`` is that of the object that has the addresses.

    ``WorkloadEndpoint`` and ``HostEndpoint``, which policies apply to, or ``NetworkSet`` and
    ``GlobalNetworkSet``, which they only refer to.
    """

    kind: str
    namespace: str
    name: str


class NamedPort(NamedTuple):
    """A named port of an endpoint."""

    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Match:
    """The conditions of a rule. See the module's docstring for how they combine.

    Protocols are numbers (6 for TCP). Set ids name sets of the engine's ``sets`` table.
    ``*_ports`` and ``*_named_ports`` of one side form one condition: a number in a range,
    or (address, protocol, port) in a named-port set.
    """

    version: int | None = None  # 4 or 6
    protocol: int | None = None
    not_protocol: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    not_icmp_type: int | None = None
    not_icmp_code: int | None = None
    src_nets: tuple[Net, ...] = ()
    not_src_nets: tuple[Net, ...] = ()
    dst_nets: tuple[Net, ...] = ()
    not_dst_nets: tuple[Net, ...] = ()
    src_sets: tuple[str, ...] = ()
    not_src_sets: tuple[str, ...] = ()
    dst_sets: tuple[str, ...] = ()
    not_dst_sets: tuple[str, ...] = ()
    src_ports: tuple[PortRange, ...] = ()
    not_src_ports: tuple[PortRange, ...] = ()
    dst_ports: tuple[PortRange, ...] = ()
    not_dst_ports: tuple[PortRange, ...] = ()
    src_named_ports: tuple[str, ...] = ()
    not_src_named_ports: tuple[str, ...] = ()
    dst_named_ports: tuple[str, ...] = ()
    not_dst_named_ports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what to do with the packets that match.

    ``index`` is the position, in the policy's ``ingress`` or ``egress`` as its author wrote it,
    of the rule it was compiled from.
    """

    action: Action
    match: Match = Match()
    index: int = 0


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy or profile, ready to render. None: it does not apply in that direction.

    ``tier``: which tier a policy is in; empty for a profile.
    """

    id: PolicyId
    ingress: tuple[Rule, ...] | None
    egress: tuple[Rule, ...] | None
    tier: str = ""


@dataclass(frozen=True, slots=True)
class TierBinding:
    """The policies of one tier that select an endpoint, in order, per direction.

    Staged ones are among them, where they would stand. ``default_action`` (DENY or PASS) ends
    the tier only in the directions in which it ``ends``.
    """

    name: str
    default_action: Action
    ingress: tuple[PolicyId, ...]
    egress: tuple[PolicyId, ...]

    def policies(self, direction: Direction) -> tuple[PolicyId, ...]:
        """Those that apply in a direction."""
        return self.ingress if direction is Direction.INGRESS else self.egress

    def ends(self, direction: Direction) -> bool:
        """Whether the tier has an end in a direction: one of its policies there isn't staged."""
        return not all(id.is_staged for id in self.policies(direction))


@dataclass(frozen=True, slots=True)
class EndpointBinding:
    """All that decides about an endpoint: tiers in order, then profiles, then drop."""

    tiers: tuple[TierBinding, ...]
    profiles: tuple[PolicyId, ...]


class Part(Enum):
    """Which of a host's packets policies are for."""

    NORMAL = "normal"  # to and from the host itself
    FORWARD = "forward"  # through the host
    PRE_DNAT = "pre-DNAT"  # all that come in, before their destination is translated
    UNTRACKED = "untracked"  # all to and from the host, and through it, before connection tracking


@dataclass(frozen=True, slots=True)
class HostBinding:
    """All that decides about a host endpoint, by what the policies are for.

    - ``normal``: tiers, profiles, then drop, as of a workload. All policies but those that are
      ``preDNAT`` or ``doNotTrack``.
    - ``forward``: those of them with ``applyOnForward``. A tier's end may drop; what no tier
      decides goes on, also when nothing applies in the direction. No profiles.
    - ``pre_dnat`` (ingress only) and ``untracked``: a tier has no end here: what no rule decides
      goes on. What is allowed is not asked about again at this endpoint, in ``normal``,
      ``forward`` or (for ``untracked``) ``pre_dnat``. No profiles.
    """

    normal: EndpointBinding
    forward: EndpointBinding
    pre_dnat: EndpointBinding
    untracked: EndpointBinding

    def part(self, part: Part) -> EndpointBinding:
        """The binding for some packets."""
        match part:
            case Part.NORMAL:
                return self.normal
            case Part.FORWARD:
                return self.forward
            case Part.PRE_DNAT:
                return self.pre_dnat
            case Part.UNTRACKED:
                return self.untracked


Binding = EndpointBinding | HostBinding


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint, or a network set, as the engine sees it, local or remote.

    ``labels`` are its own; those of its profiles are inherited (own ones win).
    ``nets`` are its addresses, empty once its pod has finished; a network set has any networks.
    """

    id: EndpointId
    labels: tuple[tuple[str, str], ...]
    profiles: tuple[str, ...]
    nets: tuple[Net, ...]
    ports: tuple[NamedPort, ...] = ()
    local: bool = False


@dataclass(frozen=True, slots=True)
class ServiceSlice:
    """Some endpoints of a service (``namespace/name``), ready or not, and their ports.

    Each of ``ports`` is (protocol, port) and open at each of ``nets``.
    """

    service: str
    nets: tuple[Net, ...]
    ports: tuple[tuple[int, int], ...]
