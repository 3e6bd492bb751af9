"""CalicoNodeStatus: what a node reports of its agent, its BGP sessions and its routes.

Users create it with a ``spec`` (which node, what, how often), the node keeps ``status``.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api.fields import Name, Number, Timestamp
from api.metadata import CalicoResource, Checked, Fault, Model

StatusClass = Literal["Agent", "BGP", "Routes"]
DaemonState = Literal["Ready", "NotReady"]
SessionState = Literal[
    "Idle", "Connect", "Active", "OpenSent", "OpenConfirm", "Established", "Close"
]


class CalicoNodeStatusSpec(Checked):
    """spec of a CalicoNodeStatus. ``update_period_seconds`` 0: the status is not kept."""

    kept: ClassVar[frozenset[str]] = frozenset(("classes", "updatePeriodSeconds"))

    node: Name
    classes: list[StatusClass]
    update_period_seconds: Annotated[int, Field(ge=0, le=86400)]

    def faults(self) -> Iterator[Fault]:
        """A class that stands there twice."""
        if len(set(self.classes)) != len(self.classes):
            yield Fault(("classes",), self.classes, "each class once")


class BGPDaemonStatus(Model):
    """A BGP daemon; times as it prints them."""

    state: DaemonState | None = None
    version: str | None = None
    router_id: str | None = Field(default=None, alias="routerID")
    last_boot_time: str | None = None
    last_reconfiguration_time: str | None = None


class AgentStatus(Model):
    """The daemons for IPv4 and IPv6 routes."""

    bird_v4: BGPDaemonStatus | None = None
    bird_v6: BGPDaemonStatus | None = None


class PeerStatus(Model):
    """A BGP session."""

    peer_ip: str | None = Field(default=None, alias="peerIP")
    type: Literal["NodeMesh", "NodePeer", "GlobalPeer"] | None = None
    state: SessionState | None = None
    since: str | None = None


class BGPStatus(Model):
    """The BGP sessions, counted and listed."""

    kept: ClassVar[frozenset[str]] = frozenset(
        (
            *("numberEstablishedV4", "numberNotEstablishedV4"),
            *("numberEstablishedV6", "numberNotEstablishedV6"),
        )
    )

    number_established_v4: Number = 0
    number_not_established_v4: Number = 0
    number_established_v6: Number = 0
    number_not_established_v6: Number = 0
    peers_v4: list[PeerStatus] = Field(default_factory=list)
    peers_v6: list[PeerStatus] = Field(default_factory=list)


class LearnedFrom(Model):
    """Where a route comes from."""

    source_type: Literal["Kernel", "Static", "Direct", "NodeMesh", "BGPPeer"] | None = None
    peer_ip: str | None = Field(default=None, alias="peerIP")


class RouteStatus(Model):
    """A route: FIB means that packets follow it, RIB that it is only known."""

    type: Literal["FIB", "RIB"] | None = None
    destination: str | None = None
    gateway: str | None = None
    interface: str | None = None
    learned_from: LearnedFrom | None = None


class RoutesStatus(Model):
    """The routes the BGP daemons know."""

    routes_v4: list[RouteStatus] = Field(default_factory=list)
    routes_v6: list[RouteStatus] = Field(default_factory=list)


class CalicoNodeStatusStatus(Model):
    """status of a CalicoNodeStatus. ``last_updated`` is in UTC."""

    last_updated: Timestamp | None = None
    agent: AgentStatus | None = None
    bgp: BGPStatus | None = None
    routes: RoutesStatus | None = None


class CalicoNodeStatus(CalicoResource):
    """A request to a node to report, and its report."""

    kind: Literal["CalicoNodeStatus"] = "CalicoNodeStatus"
    spec: CalicoNodeStatusSpec
    status: CalicoNodeStatusStatus | None = None
