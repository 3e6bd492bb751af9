"""What is told to which peer.

Every node tells every peer its own blocks, exactly, and nothing inside of them; it never
tells one peer what it learned from another, so it is never transit between two routers. Only
a route reflector (a Node with ``routeReflectorClusterID``) tells on, inside of the IP pools:

- what a client said, to all iBGP peers; what others said over iBGP, to clients (RFC 4456);
- what it learned over iBGP, to eBGP peers, and the other way round; never eBGP to eBGP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from api.net import Net
from bird_glue.announcement import Announcement
from bird_glue.decision import DEFAULT_LOCAL_PREFERENCE, Path
from bird_glue.messages import Attributes
from bird_glue.pools import Pools

# Calico carries a route's priority (metric) in the local preference: this less the priority.
_HIGHEST_PREFERENCE = 2**31 - 1
_NO_EXPORT, _NO_ADVERTISE = "65535:65281", "65535:65282"  # RFC 1997


@dataclass(frozen=True, slots=True)
class Speaking:
    """How this node speaks to one peer. ``cluster_id``: it is a client, reflected to so."""

    asn: int
    external: bool
    priority: int
    cluster_id: int | None = None
    next_hop_self: bool = False
    next_hop_keep: bool = False


def own_announcements(
    blocks: Iterable[Net], pools: Pools, version: int, speaking: Speaking
) -> dict[Net, Announcement]:
    """The blocks of this node, of one IP version, for one peer."""
    preference = None if speaking.external else _HIGHEST_PREFERENCE - speaking.priority
    announcement = Announcement(None, Attributes(origin=0, local_preference=preference))
    return {
        block: announcement
        for block in blocks
        if block.version == version and pools.exports_own(block)
    }


def reflected_announcement(
    path: Path,
    learned: Speaking,
    to: Speaking,
    *,
    own_cluster_id: int,
    router_id: int,
) -> Announcement | None:
    """A learned route as a reflector tells it on; None if that peer is not to know it.

    ``learned``: how we speak with the peer it came from, whose id is ``router_id``.
    """
    between_clients = learned.cluster_id is not None or to.cluster_id is not None
    internal = not learned.external and not to.external
    if (learned.external and to.external) or (internal and not between_clients):
        return None
    own_hop = to.next_hop_self or (to.external and not to.next_hop_keep)
    attributes = path.attributes
    if _NO_ADVERTISE in attributes.communities:
        return None
    if _NO_EXPORT in attributes.communities and to.external:
        return None
    if to.external:
        attributes = replace(
            attributes, local_preference=None, med=None, originator=None, clusters=()
        )
    elif attributes.local_preference is None:
        attributes = replace(attributes, local_preference=DEFAULT_LOCAL_PREFERENCE)
    if internal:
        originator = router_id if attributes.originator is None else attributes.originator
        clusters = (own_cluster_id, *attributes.clusters)
        attributes = replace(attributes, originator=originator, clusters=clusters)
    return Announcement(None if own_hop else path.next_hop, attributes)
