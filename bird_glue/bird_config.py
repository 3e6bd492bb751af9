"""BIRD's configuration: the sessions, what is accepted and told, what goes to the kernel.

Tables: ``igp4`` holds what the kernel and the interfaces say, and next hops are looked up in
it; ``master4`` holds what peers told, and of this node's own routes those that some peer is
told. An own route carries the attributes that most peers are told; the filter of a peer that
is told other ones, or nothing, says so. Thus a new block changes one static route, and no
filter of what is told. As nobody else may announce it, what is accepted is looked at again.
BIRD User's Guide, chapters 3, 5 and 6.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from api.net import BITS, V4, V6, Net, format_address
from bird_glue.advertise import Speaking
from bird_glue.announcement import Announcement, Announcements
from bird_glue.bird_filters import (
    EXTERNAL,
    WORKLOAD,
    block,
    changed,
    community,
    forbidden,
    import_body,
    pool_functions,
    prefix_set,
    rules,
)
from bird_glue.config import Neighbor
from bird_glue.engine import Intent
from bird_glue.filters import Direction, PrependAsPath
from kernel.routes import PROTO_BGP, PROTO_FELIX

# How long routes of an earlier run are kept, and announcements of new ones wait, for peers
# that don't come back; all that BIRD offers is one time for both.
RECOVERY_SECONDS = 30
_ANNOUNCED = "manx_announced"  # an attribute of our own: most peers are told the route
_LOG_BYTES = 1 << 20
_WAYS = 64  # of one route
_VERSIONS = (V4, V6)
_ORIGINS = ("ORIGIN_IGP", "ORIGIN_EGP", "ORIGIN_INCOMPLETE")


@dataclass(frozen=True, slots=True)
class Own:
    """Own routes of one IP version: what most peers are told, and per peer what differs.

    A difference of None: the peer is not told.
    """

    base: Mapping[Net, Announcement]
    different: Mapping[Net, Mapping[Net, Announcement | None]]


def protocol_name(peer: Net) -> str:
    """``peer_10_0_0_1``; distinct for distinct addresses."""
    return "peer_" + format_address(*peer[:2]).replace(".", "_").replace(":", "_")


def render(intent: Intent, wanted: Mapping[Net, Announcements], run_dir: Path) -> str:
    """The configuration file. ``wanted``: own routes, per peer."""
    router_id = format_address(V4, intent.guard.router_id)
    log = run_dir / "bird.log"
    direct = ", ".join([*(f'-"{name}"' for name in (*intent.ignored_interfaces, "cali*")), '"*"'])
    parts = [
        f'log "{log}" {_LOG_BYTES} "{log}.1" '
        "{ info, remote, warning, error, auth, fatal, bug };\n"
        f"router id {router_id};\n"
        "timeformat protocol iso long ms;\n"
        f"graceful restart wait {RECOVERY_SECONDS};\n"
        f"attribute int {_ANNOUNCED};\n"
        f"attribute int {EXTERNAL};\n"
        f"attribute int {WORKLOAD};\n"
        "ipv4 table igp4;\n"
        "ipv6 table igp6;\n"
        "protocol device { scan time 10; }\n"
        "protocol direct {\n"
        "  ipv4 { table igp4; };\n"
        "  ipv6 { table igp6; };\n"
        "  check link;\n"
        f"  interface {direct};\n"
        "}\n"
    ]
    owns: dict[int, Own] = {}
    for version in _VERSIONS:
        parts.append(forbidden(intent.guard, version))
        parts.append(pool_functions(intent.pools, version))
        parts.append(_kernel(version, intent.metrics[version]))
        owns[version] = divide(_of_version(wanted, intent.neighbors, version), intent.speaking)
        parts.append(_statics(version, owns[version].base))
        parts.append(_ways(intent.neighbors.values(), version))
    return "".join([*parts, _sessions(intent, owns)])


def _of_version(
    wanted: Mapping[Net, Announcements], neighbors: Mapping[Net, Neighbor], version: int
) -> dict[Net, Announcements]:
    """Own routes of one IP version, per peer that is told any of it."""
    found: dict[Net, Announcements] = {}
    for peer, routes in wanted.items():
        neighbor = neighbors.get(peer)
        if neighbor is not None and neighbor.extended_next_hop:
            found[peer] = {net: route for net, route in routes.items() if net.version == version}
        elif peer.version == version:
            found[peer] = routes
    return found


def divide(wanted: Mapping[Net, Announcements], speaking: Mapping[Net, Speaking]) -> Own:
    """What most peers are told, iBGP before eBGP, and what the others are told instead."""
    groups: list[tuple[Announcements, list[Net]]] = []
    for peer, told in wanted.items():
        for known, peers in groups:
            if known == told and speaking[peers[0]].external == speaking[peer].external:
                peers.append(peer)
                break
        else:
            groups.append((told, [peer]))
    groups.sort(key=lambda group: (speaking[group[1][0]].external, -len(group[1])))
    base: dict[Net, Announcement] = {}
    for told, _ in groups:
        base = {**told, **base}
    different: dict[Net, Mapping[Net, Announcement | None]] = {}
    for told, peers in groups:
        external = speaking[peers[0]].external
        found = {
            net: told.get(net)
            for net, usual in base.items()
            if told.get(net) != _as_told(usual, external)
        }
        different.update(dict.fromkeys(peers, found))
    return Own(base, different)


def _as_told(announcement: Announcement, external: bool) -> Announcement:
    """What arrives: eBGP carries no local preference."""
    if not external:
        return announcement
    attributes = replace(announcement.attributes, local_preference=None)
    return Announcement(announcement.next_hop, attributes)


def _kernel(version: int, metric: int) -> str:
    """``ip route show proto bird metric METRIC``; and what others have put into the kernel."""
    # Of our own routes BIRD is to know those to pods here, which may be peers, and ways to
    # peers (reachableBy); not felix's routes to other nodes, nor the blackholes of blocks.
    pods = f"(net.len = {BITS[version]} && gw = ::)"  # no gateway, in either version
    others = f"(krt_source != {PROTO_FELIX} || {pods})"
    others += f" && (krt_source != {PROTO_BGP} || dest = RTD_UNICAST)"
    return (
        f"filter kernel_v{version} {{\n"
        # of a next hop that nothing leads to BIRD would make an unreachable route, before all
        # that is less specific
        f"  if source = RTS_BGP && dest = RTD_UNICAST && programs_v{version}() then accept;\n"
        "  reject;\n"
        "}\n"
        f"protocol kernel kernel{version} {{\n"
        f"  learn; persist; graceful restart on; scan time 10; metric {metric};\n"
        f"  merge paths on limit {_WAYS};\n"
        f"  ipv{version} {{ import where {others}; export filter kernel_v{version}; }};\n"
        "}\n"
        f"protocol pipe igp_v{version} {{\n"
        f"  table master{version}; peer table igp{version};\n"
        "  import none; export where source = RTS_INHERIT;\n"
        "}\n"
    )


def kernel_metrics(text: str) -> tuple[tuple[int, int], ...]:
    """IP version and metric of what a configuration has BIRD write into the kernel."""
    found = re.findall(r"protocol kernel kernel([46]) \{[^}]*\bmetric (\d+);", text)
    return tuple((int(version), int(metric)) for version, metric in found)


def _statics(version: int, base: Mapping[Net, Announcement]) -> str:
    lines = [f"ipv{version};"]
    for net, announcement in sorted(base.items()):
        attributes = " ".join([f"{_ANNOUNCED} = 1;", *_attributes(announcement)])
        lines.append(f"route {net} blackhole {{ {attributes} }};")
    return block(f"protocol static own_v{version}", lines)


def _ways(neighbors: Iterable[Neighbor], version: int) -> str:
    """To peers that only a gateway of their own leads to; the kernel has these routes as well."""
    lines = [
        f"route {neighbor.address} via {format_address(*neighbor.reachable_by[:2])};"
        for neighbor in neighbors
        if neighbor.reachable_by and neighbor.address.version == version
    ]
    if not lines:
        return ""
    return block(
        f"protocol static ways_v{version}", [f"ipv{version} {{ table igp{version}; }};", *lines]
    )


def _attributes(announcement: Announcement) -> Iterable[str]:
    """Statements that give a route without attributes these."""
    next_hop, attributes = announcement
    if next_hop is not None:
        yield f"bgp_next_hop = {format_address(*next_hop[:2])};"
    yield f"bgp_origin = {_ORIGINS[attributes.origin]};"
    if attributes.local_preference is not None:
        yield f"bgp_local_pref = {attributes.local_preference};"
    if attributes.med is not None:
        yield f"bgp_med = {attributes.med};"
    for segment in reversed(attributes.as_path):
        yield from changed(PrependAsPath(segment.asns))
    for value in attributes.communities:
        yield f"bgp_community.add({community(value)});"
    for value in attributes.large_communities:
        yield f"bgp_large_community.add({community(value)});"


def _sessions(intent: Intent, owns: Mapping[int, Own]) -> str:
    filters: dict[str, str] = {}
    protocols = []
    reflects = intent.guard.cluster_id is not None
    for address, neighbor in sorted(intent.neighbors.items()):
        to, session = intent.speaking[address], intent.sessions[address]
        channels = []
        for version in neighbor.versions:
            different = owns[version].different.get(address, {})
            accepted = import_body(session, version, workload=to.workload)
            told = export_body(to, neighbor.local, version, different, reflects=reflects)
            names = (
                _filter(filters, f"accepted_v{version}", accepted),
                _filter(filters, f"told_v{version}", told),
            )
            channels.append(_channel(intent, neighbor, version, *names))
        protocols.append(_session(intent, neighbor, channels))
    return "".join([*filters.values(), *protocols])


def _filter(filters: dict[str, str], kind: str, lines: list[str]) -> str:
    """The name of the filter with these lines, which is written once for all that have it."""
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    name = f"{kind}_{digest}"
    filters.setdefault(name, block(f"filter {name}", lines))
    return name


def export_body(
    to: Speaking,
    local: Net,
    version: int,
    different: Mapping[Net, Announcement | None],
    *,
    reflects: bool,
) -> list[str]:
    """The filter for what a peer is told; see ``advertise.learned_announcement``.

    ``local``: where we speak from; ``version``: of the routes. ``different``: what it is told
    of own routes, where most are told something else. ``reflects``: this node is a route reflector.
    """
    lines = [
        "if source = RTS_STATIC then {",
        *_differences(different),
        f"if defined({_ANNOUNCED}) then accept;",
        "reject; }",
        "if source != RTS_BGP then reject;",
        f"if defined({WORKLOAD}) then bgp_next_hop = {format_address(*local[:2])};",
        *rules(to.filters, Direction.EXPORT, version, external=to.external),
    ]
    others = f"! defined({WORKLOAD})"
    if not reflects:
        lines.append(f"if {others} then reject;")
    elif to.external:
        lines.append(f"if defined({EXTERNAL}) && {others} then reject;")
    lines.append(f"if ! tells_on_v{version}() then reject;")
    for net, values in to.communities:
        if net.version == version:
            added = " ".join(f"{_add(value)}" for value in values)
            lines.append(f"if net ~ [ {net}+ ] then {{ {added} }}")
    return [*lines, "accept;"]


def _add(value: str) -> str:
    name = "bgp_large_community" if value.count(":") == 2 else "bgp_community"
    return f"{name}.add({community(value)});"


def _differences(different: Mapping[Net, Announcement | None]) -> list[str]:
    groups: dict[Announcement | None, list[str]] = {}
    for net, announcement in sorted(different.items()):
        groups.setdefault(announcement, []).append(f"{net}{{{net.length},{net.length}}}")
    lines = []
    for announcement, nets in groups.items():
        body = "reject;"
        if announcement is not None:
            forget = (
                "unset(bgp_local_pref); unset(bgp_med); unset(bgp_path); "
                "unset(bgp_community); unset(bgp_large_community);"
            )
            body = " ".join([forget, *_attributes(announcement), "accept;"])
        lines.append(f"if net ~ {prefix_set(nets)} then {{ {body} }}")
    return lines


def _session(intent: Intent, neighbor: Neighbor, channels: Iterable[str]) -> str:
    address = neighbor.address
    to = intent.speaking[address]
    listen = intent.listen
    lines = [
        f"local {format_address(*neighbor.local[:2])} port {listen.port} as {neighbor.local_as};",
        f"neighbor {format_address(*address[:2])} port {neighbor.port} as {neighbor.remote_as};",
        f"multihop {neighbor.ttl_security or ''};",
        f"hold time {neighbor.hold_seconds};",
        f"graceful restart on; graceful restart time {neighbor.restart_seconds};",
        # Routers that lost us call about a second later, and go first: a call of ours that meets
        # theirs is taken for one more restart (RFC 4724 5), and FRR drops what it kept for us.
        "connect delay time 2; connect retry time 2; error wait time 1, 4;",
        # loops are looked for in the filter, which also knows the node's other AS number
        "allow local as; med metric on;",
    ]
    if neighbor.ttl_security:
        lines.append("ttl security on;")
    if neighbor.password:
        lines.append(f'password "{neighbor.password.decode()}";')
    if neighbor.passive:
        lines.append("passive;")
    if not {"0.0.0.0", "::"} & set(listen.addresses):
        lines.append("strict bind;")
    if intent.guard.cluster_id is not None and not neighbor.external:
        lines.append(f"rr cluster id {format_address(V4, intent.guard.cluster_id)};")
        if to.cluster_id is not None:
            lines.append("rr client;")
    return block(f"protocol bgp {protocol_name(address)}", [*lines, *channels])


def _channel(intent: Intent, neighbor: Neighbor, version: int, accepted: str, told: str) -> str:
    to = intent.speaking[neighbor.address]
    channel = f"import keep filtered; import filter {accepted}; export filter {told};"
    channel += f" gateway recursive; igp table igp{version};"
    if version != neighbor.address.version:
        channel += f" extended next hop; igp table igp{neighbor.address.version};"
    if to.next_hop_self or (to.external and not to.next_hop_keep):
        channel += " next hop self;"
    elif to.next_hop_keep:
        channel += " next hop keep;"
    if intent.receive_limit:
        channel += f" receive limit {intent.receive_limit} action disable;"
    return f"ipv{version} {{ {channel} }};"
