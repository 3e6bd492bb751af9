"""What a daemon that died, or a container that vanished without a DEL, left behind.

Nothing is taken from a container that may be alive. An interface goes only when it bears our
mark of an unfinished ADD, of which no runtime was told that it succeeded; an address only
when its attachment has neither endpoint nor interface; an endpoint, with its address, only
when at two looks its interface was gone, as it is when the node was started anew.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from cni import wiring
from cni.attachment import Attachment, from_alias, from_allocation
from cni.node import Node, is_wired
from datastore.interface import Key
from ipam.audit import Finding
from ipam.audit_kernel import audit_kernel, audit_learned, interface_prefixes
from ipam.inventory import User
from ipam.orphans import delete_orphans
from ipam.reading import users_on
from ipam.records import Records
from kernel.links import Link, Links

# Looks from one at what BGP told to the next: that may be much, and who else has a pool is no
# matter of a minute.
_BETWEEN = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """An attachment of which something exists. ``interface``: the node's end, if that does."""

    attachment: Attachment
    interface: str = ""


def known_attachments(node: Node) -> list[Known]:
    """All attachments of the node that hold an address or have an interface.

    Raises StoreError, OSError.
    """
    holders = {attachment.alias: attachment for attachment in _holders(node)}
    holders |= {attachment.alias: attachment for attachment in node.cluster.delegated()}
    known = {alias: Known(attachment) for alias, attachment in holders.items()}
    for link in _links(node):
        attachment = from_alias(link.alias)
        if attachment is not None:
            known[link.alias] = Known(holders.get(link.alias, attachment), link.name)
    return list(known.values())


def repair(node: Node) -> None:
    """Finish or take back all that is half-done. Safe while requests are served.

    Raises StoreError, OSError; what was not reached is reached when it is called again.
    """
    node.cluster.memory.refresh()
    holders = {attachment.alias: attachment for attachment in _holders(node)}
    owners = holders | {attachment.alias: attachment for attachment in node.cluster.delegated()}
    for link in _links(node):
        if link.group == wiring.DELETING:
            _log.info("interface %s: its deletion was cut off; deleting it", link.name)
            node.remove_interface(link)
        elif link.group == wiring.UNFINISHED:
            _log.info("interface %s: its ADD was cut off", link.name)
            node.repair_interface(link, owners.get(link.alias, from_alias(link.alias)))
    for attachment in holders.values():
        node.repair_address(attachment)
    for handle in delete_orphans(node.cluster.store, node.cluster.node):
        _log.info("IPAM handle %s: deleted: its assignment was cut off", handle)


class Patrol:
    """Looks at the node again and again, and remembers the last look."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._looks = 0
        self._lost: frozenset[tuple[Key, str]] = frozenset()
        self._found: list[Finding] = []
        self._shared: list[Finding] = []  # at the last look at what BGP told
        self._standing: list[Finding] = []  # of these, those that were found before, too

    def look(self) -> list[Finding]:
        """In what kernel and datastore disagree, now as at the last look.

        What lost its interface before the last look is taken back; not while the datastore is
        locked, nor where endpoints are views of Kubernetes' pods, whose kubelet sees to it that
        they have a container, with an address of its own.
        Raises CniError, StoreError, IpamError, InvalidObjectError, OSError.
        """
        store, name = self._node.cluster.store, self._node.cluster.node
        self._node.cluster.memory.refresh()
        users = users_on(store, name)
        if "WorkloadEndpoint" not in store.given:
            self._take_back_lost(users)
        if self._looks % _BETWEEN == 0:
            shared = audit_learned(store, self._node.allocator.claimed)
            self._standing = [finding for finding in shared if finding in self._shared]
            self._shared = shared
        self._looks += 1
        found = audit_kernel(users, name, interface_prefixes(store, name))
        standing = [finding for finding in found if finding in self._found]
        self._found = found
        return [*standing, *self._standing]

    def _take_back_lost(self, users: Collection[User]) -> None:
        links = _links(self._node)
        lost = {
            (user.key, user.container)
            for user in users
            if user.interface and not is_wired(user.container, user.interface, links)
        }
        standing = lost & self._lost
        self._lost = frozenset(lost)
        if not standing:
            return
        self._node.cluster.require_unlocked()
        for attachment in (*_holders(self._node), *self._node.cluster.delegated()):
            key = attachment.endpoint_key(self._node.cluster.node)
            if (key, attachment.endpoint_container_id) in standing:
                self._node.repair_endpoint(attachment)


def _links(node: Node) -> list[Link]:
    with node.sockets.borrow() as host:
        return list(Links(host).read().values())


def _holders(node: Node) -> Iterator[Attachment]:
    """Attachments of this node that hold addresses, in whatever block."""
    for holder in Records(node.cluster.store).holders():
        if holder.attributes.get("node") == node.cluster.node:
            attachment = from_allocation(holder.handle, holder.attributes)
            if attachment is not None:
                yield attachment
