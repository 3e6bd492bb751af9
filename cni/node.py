"""The node's attachments: make one, take one back, compare one with how it ought to be.

To attach is to take an address, make the wire, write the WorkloadEndpoint, in this order; to
detach is to undo that backwards. So an address goes back only when no endpoint and no
interface has it any more, and what a crash leaves half-done can be found by the runtime's
DEL, a repeated ADD and ``cni.repair``.

What concerns one interface of the node happens one after the other, all else side by side.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Sequence

from api.errors import InvalidObjectError
from api.net import Net
from cni import wiring
from cni.attaching import (
    USE,
    Addresses,
    Attached,
    Attaching,
    Case,
    Job,
    Outcome,
    Wanted,
    under_way,
)
from cni.attachment import Attachment, from_alias
from cni.cluster import Cluster, owns
from cni.delegate import Delegate, Lease
from cni.features import Families
from cni.reaper import Reaper
from cni.turns import Turns
from cni.wiring import Sockets, Wire
from datastore.interface import Datastore, StoreError
from ipam.allocator import Allocator
from ipam.errors import IpamError, NoPoolError
from ipam.locks import KeyedLocks
from ipam.pools import Pools, Request
from kernel.links import Link, Links
from kernel.netlink import NetlinkSocket

_log = logging.getLogger(__name__)


class Node:
    """The attachments of one node. Its namespace is that of the thread that makes it.

    ``follow``: what every ADD looks at is remembered between ``start`` and ``stop``, which is
    for stores that take longer to ask than to follow; else ``cluster.memory.refresh`` comes before
    all that one request does. A thread that is about to wait for others,
    or for the kernel to delete an interface, gives up its turn. All methods may raise StoreError
    and OSError.
    """

    def __init__(
        self,
        store: Datastore,
        name: str,
        *,
        follow: bool = False,
        turns: Turns | None = None,
    ) -> None:
        self.cluster = Cluster(store, name, follow=follow)
        self.sockets = Sockets()
        self.allocator = Allocator(store, name, follower=self.cluster.memory.follower)
        self._pools = Pools(store)
        self._turns = turns or Turns(1)
        self._locks = KeyedLocks(self._turns.give_up)
        self._reaper = Reaper(self.sockets, self._turns.give_up)
        self._attaching = Attaching(
            self.cluster, self.allocator, self.sockets, self._reaper, self._turns
        )

    def start(self) -> None:
        """Start what works in the background."""
        self.cluster.memory.start()
        self._reaper.start()

    def stop(self) -> None:
        """Stop it again. Nothing may be attached or detached any more."""
        self._reaper.stop()
        self.cluster.memory.stop()
        self.sockets.close()

    def host_interface(self, attachment: Attachment) -> str:
        """The name of the node's end. Raises CniError."""
        return attachment.host_interface(self.cluster.interface_prefix())

    def require_pools(self, families: Families) -> None:
        """Every family must have a pool that pods of some namespace may use.

        Raises NoPoolError.
        """
        for version, names in families:
            request = Request(
                node=self.cluster.node,
                version=version,
                use=USE,
                pools=names,
                node_labels=self.cluster.node_labels,
                namespace_labels=None,
            )
            try:
                self._pools.usable(request)
            except NoPoolError:
                # Those for certain namespaces only are left out where no namespace is named.
                if names or not any(
                    pool.namespace_selector and pool.net.version == version
                    for pool in self._pools.all()
                ):
                    raise

    def attach(self, attachment: Attachment, netns_fd: int, wanted: Wanted) -> Attached:
        """Wire a container; one that is wired already, all in order, stays as it is.

        Where the addresses are not from IPAM, the wire is always made anew.
        A failure leaves nothing behind. Raises CniError, IpamError.
        """
        outcomes: list[Outcome] = []
        self.attach_all([Job(attachment, netns_fd, wanted, outcomes.append)])
        [outcome] = outcomes
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def attach_all(self, jobs: Sequence[Job]) -> None:
        """As ``attach``, several at once: every step is done for all before the next one.

        Each is told by its ``then``, whatever goes wrong: a failure of one is its own. Of several
        none waits for what others hold.
        """
        try:
            cases = [Case(job, self.host_interface(job.attachment)) for job in jobs]
        except Exception as error:
            for job in jobs:
                job.then(error)
            return
        names = [case.name for case in cases]
        alone = len(cases) == 1
        with self._locks.hold(names[0]) if alone else self._locks.hold_free(names) as free:
            for case in cases:
                if free is not None and case.name not in free:
                    case.end(None)
                elif free is not None:
                    free.remove(case.name)  # another of that name comes later
            try:
                with self.sockets.borrow() as host:
                    self._attach_all(under_way(cases), host, alone=alone)
            except Exception as error:
                if not under_way(cases):
                    _log.exception("a fault of the daemon, after all was done")
                for case in under_way(cases):
                    case.end(error)
            for case in cases:
                if case.failed:
                    self._roll_back(case.attachment, case.name, case.wanted.delegate)
                    case.job.then(case.outcome)

    def detach(
        self, attachment: Attachment, name: str = "", delegate: Delegate | None = None
    ) -> None:
        """Take everything of an attachment back; what is gone already is no error.

        ``name``: the node's interface, where it is known to be another than it would be now.
        ``delegate``: the plugin that gave its addresses, if another did.
        """
        name = name or self.host_interface(attachment)
        with self._locks.hold(name):
            self._detach(attachment, name, delegate)

    def take_back(self, attachment: Attachment, attached: Attached, wanted: Wanted) -> None:
        """Undo an ``attach`` after all; what can't be taken back now, the runtime's DEL will."""
        name = attached.wire.host_interface
        with self._locks.hold(name):
            self._roll_back(attachment, name, wanted.delegate)

    def faults(
        self,
        attachment: Attachment,
        netns_fd: int,
        expected: Collection[Net],
        mac: str,
        mtu: int,
        lease: Lease | None = None,
    ) -> list[str]:
        """In which points it is not as it ought to be. Raises CniError.

        ``expected``: the addresses its ADD returned. ``mtu`` in bytes, 0: any. ``lease``: what
        another plugin gave it, if one did.
        """
        name = self.host_interface(attachment)
        with self._locks.hold(name), self.sockets.borrow() as host:
            addresses = lease.addresses if lease else self._addresses(attachment)
            routes = lease.routes if lease else ()
            wire = Wire(name, attachment.ifname, mac, attachment.alias, addresses, mtu, routes)
            faults = self._endpoint_faults(attachment, addresses)
            if not addresses:
                faults.append(f"IPAM: handle {attachment.handle} holds no address")
            faults += [f"prevResult: ips: no {net}" for net in addresses if net not in expected]
            return faults + wiring.faults(host, netns_fd, wire)

    def repair_interface(self, link: Link, attachment: Attachment | None) -> None:
        """Finish or take back what a daemon that died left in group ``UNFINISHED``.

        ``attachment`` is whose it is, None if it died before it said so.
        """
        with self._locks.hold(link.name), self.sockets.borrow() as host:
            now = wiring.find(host, link.name)
            if now is None or (now.index, now.group) != (link.index, wiring.UNFINISHED):
                return
            endpoint = self.cluster.endpoint(attachment) if attachment else None
            if attachment and endpoint and owns(attachment, endpoint):
                wiring.finish(host, link.index)
                return
            self._reaper.remove(link.index)
            if attachment:
                self._detach(attachment, link.name)

    def repair_address(self, attachment: Attachment) -> None:
        """Release the addresses of an attachment that has neither endpoint nor interface."""
        name = self.host_interface(attachment)
        with self._locks.hold(name), self.sockets.borrow() as host:
            endpoint = self.cluster.endpoint(attachment)
            link = wiring.find(host, name)
            if endpoint and owns(attachment, endpoint):
                return
            if link and link.alias in ("", attachment.alias):
                return
            for net in self.allocator.release(attachment.handle):
                _log.info("%s: released %s: nothing uses it", attachment, net)

    def repair_endpoint(self, attachment: Attachment) -> None:
        """Take back an attachment whose container is gone: it has an endpoint and no interface.

        No ADD of it is under way meanwhile, as that would hold the same lock.
        """
        with self._locks.hold(self.host_interface(attachment)), self.sockets.borrow() as host:
            endpoint = self.cluster.endpoint(attachment)
            if endpoint is None or not owns(attachment, endpoint):
                return
            interface = str(endpoint.value["spec"].get("interfaceName") or "")
            links = Links(host).read().values()
            if is_wired(attachment.endpoint_container_id, interface, links):
                return
            if self.cluster.forget(attachment) is not None:
                released = self.allocator.release(attachment.handle)
                addresses = ", ".join(map(str, released)) or "none of IPAM's"
                _log.info("%s: interface %s is gone; released %s", attachment, interface, addresses)

    def remove_interface(self, link: Link) -> None:
        """Delete an interface of the node, whosever it is."""
        with self._locks.hold(link.name):
            self._reaper.remove(link.index)

    def _attach_all(self, cases: Sequence[Case], host: NetlinkSocket, *, alone: bool) -> None:
        # each finds out for itself, and finds by its handle what it was given nevertheless
        with contextlib.suppress(StoreError, IpamError, InvalidObjectError):
            self._attaching.assign_new(cases)
        for case in under_way(cases):
            if case.addresses:
                continue
            if alone:
                self._attach_unusual(case, host)
            else:
                case.end(None)
        self._attaching.wire_all(under_way(cases), host, alone=alone)

    def _attach_unusual(self, case: Case, host: NetlinkSocket) -> None:
        """Addresses for one that is not new, or shall not have just any; or it is complete."""
        held = self._addresses(case.attachment)
        wire = self._complete(case, held, host) if held else None
        if wire is not None:
            case.end(Attached(wire, fresh=False))
        else:
            self._attaching.assign(case, held)

    def _complete(self, case: Case, held: Addresses, host: NetlinkSocket) -> Wire | None:
        """The wire of an attachment that has all it shall have; None if anything is missing."""
        features = case.wanted.features
        if {net.version for net in held} != features.versions:
            return None
        if features.addresses and features.addresses != held:
            return None
        if self._endpoint_faults(case.attachment, held):
            return None
        wire = self._attaching.wire(case, held)
        link = wiring.find(host, wire.host_interface)
        if link is None or wiring.faults(host, case.job.netns_fd, wire):
            return None
        wiring.finish(host, link.index)
        return wire

    def _addresses(self, attachment: Attachment) -> Addresses:
        return tuple(sorted(self.allocator.addresses(attachment.handle)))

    def _detach(self, attachment: Attachment, name: str, delegate: Delegate | None = None) -> None:
        endpoint = self.cluster.forget(attachment)
        if endpoint is not None:
            name = endpoint.value["spec"].get("interfaceName", name)
        self._remove_wire(attachment, name, recorded=endpoint is not None)
        self.allocator.release(attachment.handle)
        if delegate is not None:
            delegate.delete()

    def _remove_wire(self, attachment: Attachment, name: str, *, recorded: bool) -> None:
        """Delete the node's end if it is the attachment's, not that of a later container.

        Without an alias it is if the endpoint said so (``recorded``), or if a daemon died
        before it gave it one.
        """
        with self.sockets.borrow() as host:
            link = wiring.find(host, name)
        if link is None:
            return
        nameless = not link.alias and (recorded or link.group == wiring.UNFINISHED)
        if nameless or link.alias == attachment.alias:
            self._reaper.remove(link.index)

    def _roll_back(self, attachment: Attachment, name: str, delegate: Delegate | None) -> None:
        """After a failed ADD. What can't be taken back now, the runtime's DEL will."""
        try:
            # first, because it can be done without the datastore
            self._remove_wire(attachment, name, recorded=False)
            self._detach(attachment, name, delegate)
        except Exception as error:
            _log.warning("%s: not taken back after a failed ADD: %s", attachment, error)

    def _endpoint_faults(self, attachment: Attachment, addresses: Addresses) -> list[str]:
        endpoint = self.cluster.endpoint(attachment)
        if endpoint is None or not owns(attachment, endpoint):
            return [f"datastore: no {attachment.endpoint_key(self.cluster.node)} of this container"]
        recorded = endpoint.value["spec"].get("ipNetworks", [])
        expected = [str(net) for net in addresses]
        if recorded != expected:
            return [f"datastore: {endpoint.key}: spec.ipNetworks: {recorded}: expected {expected}"]
        return []


def is_wired(container: str, interface: str, links: Iterable[Link]) -> bool:
    """Whether a container whose endpoint names it and its interface so may have that still.

    It has if an interface bears its mark, whatever its name, and may have if the one of that
    name bears no mark of ours, but was made by another plugin before us.
    """
    for link in links:
        attachment = from_alias(link.alias)
        if attachment is None:
            if link.name == interface:
                return True
        elif attachment.endpoint_container_id == container:
            return True
    return False
