"""What is told to which peer, as the attributes that ExaBGP's command line takes.

Every node tells every peer its own blocks, exactly, and nothing inside of them; it never
tells one peer what it learned from another, so it is never transit between two routers. Only
a route reflector (a Node with ``routeReflectorClusterID``) tells on, inside of the IP pools:

- what a client said, to all iBGP peers; what others said over iBGP, to clients (RFC 4456);
- what it learned over iBGP, to eBGP peers, and the other way round; never eBGP to eBGP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from api.net import V4, Net, format_address
from bird_glue.decision import DEFAULT_LOCAL_PREFERENCE, Path
from bird_glue.messages import Segment
from bird_glue.pools import Pools

# Calico carries a route's priority (metric) in the local preference: this less the priority.
_HIGHEST_PREFERENCE = 2**31 - 1
_NO_EXPORT, _NO_ADVERTISE = "65535:65281", "65535:65282"  # RFC 1997
_ORIGINS = ("igp", "egp", "incomplete")


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
) -> dict[Net, str]:
    """The blocks of this node, of one IP version, for one peer."""
    attributes = "next-hop self origin igp"
    if not speaking.external:
        attributes += f" local-preference {_HIGHEST_PREFERENCE - speaking.priority}"
    return {
        block: attributes
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
) -> str | None:
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
    words = ["next-hop", "self" if own_hop else format_address(*path.next_hop[:2])]
    words += ["origin", _ORIGINS[attributes.origin]]
    segments = attributes.as_path
    if to.external:
        # ExaBGP sends a path that is spelt out as it is, without our own AS in front
        segments = (Segment("as-sequence", (to.asn,)), *segments)
    else:
        preference = attributes.local_preference
        words.append("local-preference")
        words.append(str(DEFAULT_LOCAL_PREFERENCE if preference is None else preference))
        if attributes.med is not None:
            words += ["med", str(attributes.med)]
    words += _as_path(segments)
    for name, communities in (
        ("community", attributes.communities),
        ("large-community", attributes.large_communities),
        ("extended-community", attributes.extended_communities),
    ):
        if communities:
            words += [name, "[", *communities, "]"]
    if internal:
        originator = router_id if attributes.originator is None else attributes.originator
        clusters = (own_cluster_id, *attributes.clusters)
        words += ["originator-id", _dotted(originator)]
        words += ["cluster-list", "[", *map(_dotted, clusters), "]"]
    return " ".join(words)


def _as_path(segments: Iterable[Segment]) -> list[str]:
    words: list[str] = []
    for segment in segments:
        numbers = map(str, segment.asns)
        if segment.kind == "as-sequence":
            words += numbers
        elif segment.kind == "as-set":
            words += ["(", *numbers, ")"]
    return ["as-path", "[", *words, "]"]


def _dotted(number: int) -> str:
    return format_address(V4, number)
