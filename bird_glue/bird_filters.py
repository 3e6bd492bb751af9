"""What decides about routes, in BIRD's filter language: guard, pools and BGPFilters.

Each says the same as its counterpart in Python (``decision.refusal``, ``pools.Pools``,
``filters.evaluate``); the tests compare the two on generated routes. BIRD User's Guide,
chapter 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from api.net import BITS, V4, Net, format_address
from bird_glue.decision import MARTIANS, Guard, Session
from bird_glue.filters import (
    AddCommunity,
    Direction,
    Filter,
    Operation,
    PrefixMatch,
    PrependAsPath,
    Rule,
    SetLocalPreference,
)
from bird_glue.nexthops import NO_HOPS
from bird_glue.pools import Pools

# attributes of our own: the route came by eBGP; from a workload of this node
EXTERNAL, WORKLOAD = "manx_external", "manx_workload"


def prefix_set(patterns: Iterable[str]) -> str:
    """``[ 10.0.0.0/8+, 10.1.0.0/26 ]``; the set must not be empty."""
    return f"[ {', '.join(patterns)} ]"


def forbidden(guard: Guard, version: int) -> str:
    """The function ``forbidden_vN``: prefixes and next hops that no peer may tell."""
    bits = BITS[version]
    patterns = [f"{net}+" for net in MARTIANS if net.version == version]
    for block in guard.blocks:
        if block.version == version:
            # an address of it may be borrowed by another node
            longest = bits if block.is_host else bits - 1
            patterns.append(f"{block}{{{block.length},{longest}}}")
    for net in sorted(guard.subnets | guard.hosts):
        if net.version == version:
            patterns.append(_exactly(net))
    for host in sorted(guard.neighbours):
        if host.version == version:
            subnets = [net.length for net in guard.subnets if net.length and net.contains(host)]
            patterns += [f"{host}{{{length + 1},{bits}}}" for length in sorted(subnets)[:1]]
    never = [net for net in NO_HOPS if version == V4 or net.version == version]
    hops = [
        *map(_range, never),  # IPv4 routes may have IPv6 next hops (RFC 8950)
        *(
            format_address(*host[:2])
            for host in sorted(guard.hosts)
            if not any(net.contains(host) for net in never)
        ),
    ]
    lines = [
        f"if net ~ {prefix_set(patterns)} then return true;",
        f"if bgp_next_hop ~ [ {', '.join(hops)} ] then return true;",
    ]
    lines.append(f"if net.len = {bits} && net.ip = bgp_next_hop then return true;")
    lines.append("return false;")
    return _function(f"forbidden_v{version}", lines)


def pool_functions(pools: Pools, version: int) -> str:
    """``programs_vN``: what goes to the kernel; ``tells_on_vN``: what a reflector tells on."""
    programs, tells_on = [], []
    for policy in pools.policies:
        if policy.net.version == version:
            inside = f"if net ~ [ {policy.net}+ ] then return "
            programs.append(f"{inside}{_word(policy.programmed)};")
            tells_on.append(f"{inside}{_word(policy.exported)};")
    for nets, lines, answer in (
        (pools.services, programs, "false"),
        (pools.told_on, tells_on, "true"),
    ):
        found = [f"{net}+" for net in nets if net.version == version]
        if found:
            lines.append(f"if net ~ {prefix_set(found)} then return {answer};")
    return _function(f"programs_v{version}", [*programs, "return true;"]) + _function(
        f"tells_on_v{version}", [*tells_on, "return false;"]
    )


def import_body(session: Session, version: int, *, workload: bool = False) -> list[str]:
    """The filter for what a peer tells. ``workload``: it is one of this node."""
    own = f"[ {', '.join(map(str, sorted(session.own_asns)))} ]"
    lines = [
        # what is there at all is found much sooner than how often
        f"if (filter(bgp_path, {own})).len > {session.allowed} then reject;"
        if session.allowed
        else f"if bgp_path ~ {own} then reject;",
        f"if forbidden_v{version}() then reject;",
    ]
    if session.external:
        lines.append(f"{EXTERNAL} = 1;")
    if workload:
        lines.append(f"{WORKLOAD} = 1;")
    lines += rules(session.filters, Direction.IMPORT, version, external=session.external)
    return [*lines, "accept;"]


def rules(
    filters: Sequence[Filter], direction: Direction, version: int, *, external: bool
) -> list[str]:
    """A peer's BGPFilters, as statements that end the filter or go on to what follows."""
    lines = []
    for found in filters:
        for rule in found.rules(direction, version):
            if rule.external in (None, external):
                lines.append(_rule(rule))
    return lines


def _rule(rule: Rule) -> str:
    conditions = " && ".join(_conditions(rule)) or "true"
    changes = [text for op in rule.operations for text in changed(op)] if rule.accept else []
    body = " ".join([*changes, "accept;" if rule.accept else "reject;"])
    return f"if {conditions} then {{ {body} }}"


def _conditions(rule: Rule) -> Iterator[str]:
    if rule.prefix:
        yield _matches(rule.prefix)
    if rule.remote:
        yield "source = RTS_BGP"
    if rule.interface:
        yield f'ifname ~ "{rule.interface}" && ifname != ""'
    if rule.community:
        kind = "bgp_large_community" if rule.community.count(":") == 2 else "bgp_community"
        yield f"{community(rule.community)} ~ {kind}"
    if rule.as_path:
        yield f"bgp_path ~ [= {' '.join(map(str, rule.as_path))} * =]"
    if rule.local_preference is not None:
        yield f"bgp_local_pref = {rule.local_preference}"


def _matches(match: PrefixMatch) -> str:
    if match.shortest > match.longest:
        return _word(match.negated)  # nothing is inside
    pattern = f"[ {match.net}{{{match.shortest},{match.longest}}} ]"
    return f"net {'!~' if match.negated else '~'} {pattern}"


def changed(operation: Operation) -> list[str]:
    """The statements that change a route."""
    match operation:
        case AddCommunity(value=value, large=large):
            name = "bgp_large_community" if large else "bgp_community"
            return [f"{name}.add({community(value)});"]
        case PrependAsPath(asns=asns):
            return [f"bgp_path.prepend({asn});" for asn in reversed(asns)]
        case SetLocalPreference(value=value):
            return [f"bgp_local_pref = {value};"]


def community(text: str) -> str:
    """``65001:7`` as ``(65001, 7)``."""
    return f"({text.replace(':', ', ')})"


def _range(net: Net) -> str:
    """All addresses of a network: ``127.0.0.0..127.255.255.255``."""
    last = net.address + (1 << BITS[net.version] - net.length) - 1
    return f"{format_address(net.version, net.address)}..{format_address(net.version, last)}"


def _exactly(net: Net) -> str:
    return f"{net}{{{net.length},{net.length}}}"


def _function(name: str, lines: Iterable[str]) -> str:
    return block(f"function {name}()", lines)


def block(head: str, lines: Iterable[str], tail: str = "\n") -> str:
    """``HEAD { LINES }``."""
    return head + " {\n" + "".join(f"  {line}\n" for line in lines) + "}" + tail


def _word(value: bool) -> str:
    return "true" if value else "false"
