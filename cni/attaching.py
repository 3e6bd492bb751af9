"""How attachments are made, several at once: addresses, wires, endpoints, in this order.

ADDs that wait at the same moment go through these steps together. A step costs many hardly more
than one, where it is a message to the kernel or a transaction of the datastore; and nobody takes
Python from them between two steps. What becomes of one is its own affair: the others go on.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from api.kubernetes import Pod
from api.net import Net
from cni import wiring
from cni.attachment import Attachment
from cni.cluster import ATTACHMENT, Cluster, Namespace, workload_endpoint
from cni.delegate import Delegate, Lease
from cni.errors import invalid_environment
from cni.features import Features
from cni.reaper import Reaper
from cni.turns import Turns
from cni.wiring import Sockets, Wire
from datastore.interface import JSON
from ipam.allocator import Allocator
from ipam.renewal import renew
from kernel.links import Ends
from kernel.netlink import NetlinkSocket

Addresses = tuple[Net, ...]

USE = "Workload"  # what the addresses are for, as pools' allowedUses have it
_UPLINK_SECONDS = 0.01
_CREATIONS = 3  # of a pair whose name is taken by what gives way, or goes by itself

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an attachment shall have. ``mtu`` in bytes, 0: what the uplink carries.

    ``pod`` and ``namespace`` are as the datastore has them. ``delegate``: another plugin to
    take addresses from. ``forwarding``: the container may forward.
    """

    features: Features
    pod: Pod | None = None
    namespace: Namespace | None = None
    mtu: int = 0
    delegate: Delegate | None = None
    forwarding: bool = False


@dataclass(frozen=True, slots=True)
class Attached:
    """``lease``: what another plugin gave. ``fresh``: it was not complete already."""

    wire: Wire
    lease: Lease | None = None
    fresh: bool = True


# What became of a job. None: it takes time of its own, so it is to be tried alone.
Outcome = Attached | Exception | None


@dataclass(frozen=True, slots=True)
class Job:
    """An attachment to be made. ``netns_fd``: of the container. ``then`` is told, once."""

    attachment: Attachment
    netns_fd: int
    wanted: Wanted
    then: Callable[[Outcome], object]


class Case:
    """A job on its way, and what it has so far. ``name``: of the node's end."""

    __slots__ = (
        "addresses",
        "begun",
        "ends",
        "job",
        "lease",
        "name",
        "outcome",
        "under_way",
        "wire",
    )

    def __init__(self, job: Job, name: str) -> None:
        self.job = job
        self.name = name
        self.addresses: Addresses = ()
        self.lease: Lease | None = None
        self.begun = False  # there may be something to take back
        self.under_way = True
        self.outcome: Outcome = None
        self.wire: Wire
        self.ends: Ends

    @property
    def attachment(self) -> Attachment:
        """Whose case it is."""
        return self.job.attachment

    @property
    def wanted(self) -> Wanted:
        """What it shall have."""
        return self.job.wanted

    @property
    def failed(self) -> bool:
        """Whether what was made is to be taken back."""
        return self.begun and isinstance(self.outcome, Exception)

    def end(self, outcome: Outcome) -> None:
        """It is decided. Who waits for it is told at once, unless it is to be taken back first."""
        self.outcome = outcome
        self.under_way = False
        if not self.failed:
            self.job.then(outcome)


def under_way(cases: Sequence[Case]) -> list[Case]:
    """Those that are not decided yet."""
    return [case for case in cases if case.under_way]


class Attaching:
    """Makes attachments whose names the caller has locked. Decides cases instead of raising.

    The kernel is spoken to through ``host``, a socket to the node's namespace.
    """

    def __init__(
        self,
        cluster: Cluster,
        allocator: Allocator,
        sockets: Sockets,
        reaper: Reaper,
        turns: Turns,
    ) -> None:
        self._cluster = cluster
        self._allocator = allocator
        self._sockets = sockets
        self._reaper = reaper
        self._turns = turns
        self._uplink = 0, 0.0  # its MTU, and until when we take that for true

    def assign_new(self, cases: Sequence[Case]) -> None:
        """Addresses for those that are new, as most are, and can be served at once.

        The others have none afterwards: it is to be found out why, of each alone.
        """
        together: list[list[Case]] = []
        for case in cases:
            if not _is_plain(case):
                continue
            for group in together:
                if _pools_of(group[0]) == _pools_of(case):
                    group.append(case)
                    break
            else:
                together.append([case])
        for group in together:
            self._assign_group(group)

    def assign(self, case: Case, held: Addresses) -> None:
        """Whatever addresses it shall have. ``held``: those it has, from an ADD that died.

        Raises StoreError, IpamError, CniError, OSError.
        """
        case.begun = True
        wanted = case.wanted
        case.lease = wanted.delegate.add() if wanted.delegate else None
        if case.lease:
            case.addresses = case.lease.addresses
        elif wanted.features.outside_ipam:
            case.addresses = wanted.features.addresses
        else:
            case.addresses = self._assign(case, held)

    def wire_all(self, cases: Sequence[Case], host: NetlinkSocket, *, alone: bool) -> None:
        """Wires and endpoints for those that have addresses. ``alone``: it may wait for others."""
        for case in cases:
            try:
                case.wire = self.wire(case, case.addresses)
            except Exception as error:
                case.end(error)
        if cases := under_way(cases):
            self._create(cases, host, alone=alone)
            self._configure(under_way(cases), host)
            self._record(under_way(cases))
            self._finish(under_way(cases), host)

    def wire(self, case: Case, addresses: Addresses) -> Wire:
        """The wire as it shall be, with these addresses. Raises StoreError, CniError."""
        return Wire(
            case.name,
            case.attachment.ifname,
            case.wanted.features.mac or case.attachment.mac,
            case.attachment.alias,
            addresses,
            case.wanted.mtu or self._largest_mtu(),
            routes=case.lease.routes if case.lease else (),
            forwarding=case.wanted.forwarding,
            exclusive=not (case.lease or case.wanted.features.outside_ipam),
        )

    def _assign_group(self, cases: Sequence[Case]) -> None:
        """``cases``: of the same pools."""
        newcomers = {case.attachment.handle: self._attributes(case) for case in cases}
        (version, pools), *others = cases[0].wanted.features.families
        found = self._allocator.assign_each(
            newcomers,
            version=version,
            pools=pools,
            use=USE,
            namespace_labels=_namespace_labels(cases[0]),
        )
        for case in cases:
            # Of one handle there may be two here: the second one finds it taken.
            assignment = found.pop(case.attachment.handle, None)
            if assignment is None:
                continue
            case.begun = True
            try:
                case.addresses = self._assign_families(case, [assignment.address], others)
            except Exception as error:
                case.end(error)

    def _assign(self, case: Case, held: Addresses) -> Addresses:
        """The addresses it holds since an ADD that died, and new ones where it holds none."""
        attachment, features = case.attachment, case.wanted.features
        if held:  # and nobody used, so they may be about to be collected
            held = tuple(renew(self._cluster.store, attachment.handle))
        for address in features.addresses:
            if address not in held:
                self._allocator.assign_specific(address, attachment.handle, self._attributes(case))
        if features.addresses:
            return features.addresses
        return self._assign_families(case, held, features.families)

    def _assign_families(
        self,
        case: Case,
        held: Sequence[Net],
        families: Sequence[tuple[int, tuple[str, ...]]],
    ) -> Addresses:
        addresses = list(held)
        for version, pools in families:
            if all(net.version != version for net in held):
                assignment = self._allocator.assign(
                    case.attachment.handle,
                    self._attributes(case),
                    version=version,
                    pools=pools,
                    use=USE,
                    namespace_labels=_namespace_labels(case),
                )
                addresses.append(assignment.address)
        return tuple(sorted(addresses))

    def _attributes(self, case: Case) -> Mapping[str, str]:
        now = datetime.now(UTC).replace(tzinfo=None).isoformat(" ", "microseconds") + " +0000 UTC"
        return case.attachment.attributes(self._cluster.node, now)

    def _largest_mtu(self) -> int:
        """What the way out of the node carries, less what tunnels add."""
        mtu = 0
        if pattern := self._cluster.mtu_pattern():
            with self._sockets.borrow() as host:
                mtu = wiring.smallest_mtu(host, pattern)
        return self._cluster.pod_mtu(mtu or self._uplink_mtu())

    def _uplink_mtu(self) -> int:
        """As ``wiring.uplink_mtu``: of many ADDs at once not each looks."""
        now = time.monotonic()
        mtu, until = self._uplink
        if now >= until:
            mtu = wiring.uplink_mtu()
            self._uplink = mtu, now + _UPLINK_SECONDS
        return mtu

    def _create(self, cases: Sequence[Case], host: NetlinkSocket, *, alone: bool) -> None:
        """The pairs; where ``alone``, an interface of a container before us gives way."""
        for _ in range(_CREATIONS):
            pairs = [(case.job.netns_fd, case.wire) for case in cases]
            outcomes = wiring.create_all(host, pairs, self._turns.aside(len(pairs)))
            blocked = []
            for case, outcome in zip(cases, outcomes, strict=True):
                if isinstance(outcome, Ends):
                    case.ends = outcome
                elif isinstance(outcome, wiring.ContainerInterfaceExistsError):
                    expected = "expected a name that is free in the container"
                    case.end(invalid_environment("CNI_IFNAME", case.wire.interface, expected))
                elif not isinstance(outcome, wiring.HostInterfaceExistsError):
                    case.end(outcome)
                elif not alone:
                    case.end(None)
                elif self._make_way(case, outcome):
                    blocked.append(case)
            if not blocked:
                return
            cases = blocked
        for case in cases:
            name = case.wire.host_interface
            case.end(OSError(errno.EEXIST, f"veth {name}: it is made anew by another"))

    def _make_way(self, case: Case, found: wiring.HostInterfaceExistsError) -> bool:
        """Whether the name may be free by now."""
        if found.link is None:
            return True
        _log.info("%s; it is of %r and gives way", found, found.link.alias)
        try:
            self._reaper.remove(found.link.index)
        except OSError as error:
            case.end(error)
            return False
        return True

    def _configure(self, cases: Sequence[Case], host: NetlinkSocket) -> None:
        aside = self._turns.aside()
        problems = wiring.configure_all(host, _pairs(cases), aside, self._sockets.home)
        for case, problem in zip(cases, problems, strict=True):
            try:
                if problem is None and case.wire.forwarding:
                    wiring.allow_forwarding(case.job.netns_fd, case.wire)
            except OSError as error:
                problem = error
            if problem is not None:
                case.end(problem)

    def _record(self, cases: Sequence[Case]) -> None:
        endpoints = [(case.attachment, self._endpoint(case)) for case in cases]
        problems = self._cluster.record_all(endpoints)
        for case, problem in zip(cases, problems, strict=True):
            if problem is not None:
                case.end(problem)

    def _endpoint(self, case: Case) -> JSON:
        features = case.wanted.features
        endpoint = workload_endpoint(
            case.attachment,
            case.wanted.pod,
            node=self._cluster.node,
            wire=case.wire,
            features=features,
        )
        if case.lease or features.outside_ipam:
            endpoint["metadata"]["annotations"] = {ATTACHMENT: case.attachment.alias}
        return endpoint

    def _finish(self, cases: Sequence[Case], host: NetlinkSocket) -> None:
        for place, problem in wiring.finish_all(host, _pairs(cases), self._turns.give_up):
            case = cases[place]
            case.end(problem or Attached(case.wire, case.lease))


def _pairs(cases: Sequence[Case]) -> list[wiring.Pair]:
    return [(case.job.netns_fd, case.wire, case.ends) for case in cases]


def _is_plain(case: Case) -> bool:
    """Whether it shall have any addresses, from IPAM."""
    wanted = case.wanted
    asked = wanted.features.addresses or wanted.features.outside_ipam
    return not (wanted.delegate or asked) and bool(wanted.features.families)


def _pools_of(case: Case) -> tuple[object, ...]:
    """Where its addresses may be from."""
    return case.wanted.features.families, _namespace_labels(case)


def _namespace_labels(case: Case) -> Mapping[str, str] | None:
    return case.wanted.namespace.labels if case.wanted.namespace else None
