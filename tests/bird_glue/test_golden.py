"""What Calico's confd made of resources (``bgp_golden``): filters, blocks, services, static routes.

Peers and pools of the same recording: ``test_peers``.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from api.bgpfilter import BGPFilter
from api.net import BITS, V4, V6, Net, format_address, parse_net
from api.registry import parse_as
from bird_glue.fib import blackhole
from bird_glue.filters import (
    AddCommunity,
    Direction,
    Filter,
    PrefixMatch,
    PrependAsPath,
    Rule,
    SetLocalPreference,
    compile_filter,
)
from bird_glue.peers import Peer, PeerType, desired_peers
from bird_glue.resources import Resources
from bird_glue.services import EXCLUDED, Services, service_ranges
from bird_glue.settings import local_settings
from datastore.follower import Update
from datastore.interface import Key
from tests.bird_glue.test_peers import BASES, CASES, cluster_of, documents
from tests.support import vectors

pytestmark = pytest.mark.skipif(not CASES, reason=vectors.absent())

FAMILIES = ((V4, "v4", "bird_aggr.cfg"), (V6, "v6", "bird6_aggr.cfg"))


def condition(match: PrefixMatch) -> str:
    """As confd writes it: a prefix, or a set of lengths, or equality."""
    negated = "!" if match.negated else ""
    if match.longest == match.net.length:
        return f"(net {negated}= {match.net})"
    if (match.shortest, match.longest) == (match.net.length, BITS[match.net.version]):
        return f"(net {negated}~ {match.net})"
    return f"(net {negated}~ [ {match.net}{{{match.shortest},{match.longest}}} ])"


def community(text: str) -> str:
    return f"({', '.join(text.split(':'))})"


def statement(rule: Rule) -> str:
    """A rule as confd writes it for BIRD."""
    conditions = [condition(rule.prefix)] if rule.prefix else []
    if rule.remote:
        conditions.append("((defined(source))&&(source ~ [ RTS_BGP ]))")
    if rule.interface:
        conditions.append(f'((defined(ifname))&&(ifname ~ "{rule.interface}"))')
    if text := rule.community:
        kind = "bgp_large_community" if text.count(":") == 2 else "bgp_community"
        conditions.append(f"({community(text)} ~ {kind})")
    if rule.as_path:
        conditions.append(f"(bgp_path ~ [= {' '.join(map(str, rule.as_path))} * =])")
    if rule.local_preference is not None:
        preference = f"(bgp_local_pref = {rule.local_preference})"
        conditions.append(f"(defined(bgp_local_pref)&&{preference})")
    body = []
    for operation in rule.operations:
        match operation:
            case AddCommunity(value=value, large=large):
                kind = "bgp_large_community" if large else "bgp_community"
                body.append(f"{kind}.add({community(value)});")
            case PrependAsPath(asns=asns):
                body += [f"bgp_path.prepend({asn});" for asn in reversed(asns)]
            case SetLocalPreference(value=value):
                body.append(f"bgp_local_pref = {value};")
    text = " ".join([*body, "accept;" if rule.accept else "reject;"])
    if conditions:
        text = f"if ({'&&'.join(conditions)}) then {{ {text} }}"
    if rule.external is not None:
        text = f"if ({'!' * rule.external}is_same_as) then {{ {text} }}"
    return text


def same_prefixes(line: str) -> str:
    """Prefixes as Manx spells them: ``9000::0/64`` is ``9000::/64``."""
    return re.sub(r"[0-9a-f:.]+/\d+", lambda found: str(parse_net(found[0])), line)


def filters_of(case_id: str) -> list[Filter]:
    found = []
    for (kind, _), document in sorted(documents(case_id).items()):
        if kind == "BGPFilter":
            parsed = parse_as(kind, document)
            assert isinstance(parsed, BGPFilter)
            found.append(compile_filter(parsed))
    return found


@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_filters(case_id: str) -> None:
    filters = filters_of(case_id)
    for version, family, _ in FAMILIES:
        found = {}
        for direction in Direction:
            for made in filters:
                if rules := made.rules(direction, version):
                    # confd shortens long names: compare what is in them by their beginning
                    key = made.name[:28], direction.value
                    found[key] = [statement(rule) for rule in rules]
        expected = {}
        for name, lines in CASES[case_id]["facts"][family]["bgpfilters"].items():
            matched = re.fullmatch(r"bgp_(.+)_(import|export)FilterV[46]", name)
            assert matched
            expected[matched[1][:28], matched[2]] = [same_prefixes(line) for line in lines]
        assert found == expected


@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_filters_of_peers(case_id: str) -> None:
    """Each peer names the filters, in their order, that the recording calls for it."""
    case = CASES[case_id]
    cluster, _ = cluster_of(case_id)
    local = local_settings(cluster, case["node"], case["env"].get("CALICO_ROUTER_ID", ""))
    assert local
    filters = {made.name: made for made in filters_of(case_id)}
    for peer in desired_peers(cluster, local)[0]:
        block = session_of(case, peer)
        version = peer.address.version
        for direction in Direction:
            suffix = f"_{direction.value}FilterV{version}"
            found = [name[:28] for name in peer.filters if filters[name].rules(direction, version)]
            assert found == [name[:28] for name in re.findall(rf"'bgp_(.+){suffix}'\(", block)]


def session_of(case: dict[str, Any], peer: Peer) -> str:
    """What the recording has of a session."""
    file = "bird.cfg" if peer.address.version == V4 else "bird6.cfg"
    address = re.escape(format_address(*peer.address[:2]))
    port = f" port {peer.port}" if peer.port and peer.type is not PeerType.MESH else ""
    block = re.search(
        rf"^protocol bgp (?:(?!^}}).)*neighbor {address}{port} as .*?^}}",
        case["expected"][file],
        re.MULTILINE | re.DOTALL,
    )
    assert block, peer
    return block[0]


def blocks_of(node: str) -> Resources:
    resources = Resources(node)
    for affinity in vectors.load("bgp_golden")["fixture_block_affinities"]:
        name = f"{affinity['host']}-{affinity['cidr'].replace('.', '-').replace('/', '-')}"
        spec = {"cidr": affinity["cidr"], "node": affinity["host"], "state": affinity["state"]}
        resources.update(
            Update(
                Key("BlockAffinity", name),
                {
                    "apiVersion": "projectcalico.org/v3",
                    "kind": "BlockAffinity",
                    "metadata": {"name": name},
                    "spec": spec,
                },
            )
        )
    return resources


@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_blocks(case_id: str) -> None:
    """Own blocks, exactly; a blackhole for each of more than one address."""
    case = CASES[case_id]
    blocks = blocks_of(case["node"]).blocks()
    for version, family, _ in FAMILIES:
        facts = case["facts"][family]
        own = {str(net) for net in blocks if net.version == version}
        assert own == {net for operator, net, *_ in facts["aggregation"] if operator == "="}
        made = {str(blackhole(net, 1024).net) for net in blocks if not net.is_host}
        assert {net for net in made if parse_net(net).version == version} == set(
            facts["blackhole_routes"]
        ) - statics_of(case, family)


def statics_of(case: dict[str, Any], family: str) -> set[str]:
    """The routes that the recording has for services."""
    file = next(file for _, name, file in FAMILIES if name == family)
    text: str = case["expected"][file]
    _, _, statics = text.partition("# Static routes.")
    found = re.findall(r"^\s+route (\S+) blackhole;", statics, re.MULTILINE)
    return {str(parse_net(net)) for net in found}


def services_of(case_id: str) -> frozenset[Net]:
    case = CASES[case_id]
    if case_id in BASES:
        return frozenset()  # what was recorded there has no services of its own
    cluster, _ = cluster_of(case_id)
    services = Services(case["node"])
    for document in yaml.safe_load_all(case["kubectl_input_yaml"] or ""):
        if document:
            metadata = document["metadata"]
            metadata.setdefault("namespace", "default")
            key = Key(document["kind"], metadata["name"], metadata["namespace"])
            services.update(key, document)
    assert services.problems == []
    labels = cluster.nodes[case["node"]].metadata.labels
    excluded = labels.get(EXCLUDED) == "true"
    return services.announced(service_ranges(cluster.default), excluded=excluded)


@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_services(case_id: str) -> None:
    found = services_of(case_id)
    for version, family, _ in FAMILIES:
        assert {str(net) for net in found if net.version == version} == statics_of(
            CASES[case_id], family
        )


@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_ways_to_peers(case_id: str) -> None:
    """``reachableBy``: a route to the peer alone, by a gateway."""
    case = CASES[case_id]
    cluster, _ = cluster_of(case_id)
    local = local_settings(cluster, case["node"], case["env"].get("CALICO_ROUTER_ID", ""))
    assert local
    peers = desired_peers(cluster, local)[0]
    for version, _, file in FAMILIES:
        expected = re.findall(r"^\s+route (\S+) via (\S+);", case["expected"][file], re.MULTILINE)
        assert {
            (peer.address, peer.reachable_by)
            for peer in peers
            if peer.reachable_by and peer.address[0] == version
        } == {(parse_net(net), parse_net(gateway)) for net, gateway in expected}


@pytest.mark.parametrize("case_id", CASES or ["-"])
def test_recorded_times(case_id: str) -> None:
    """Graceful restart, keepalive and allowed AS numbers of each session."""
    case = CASES[case_id]
    cluster, _ = cluster_of(case_id)
    local = local_settings(cluster, case["node"], case["env"].get("CALICO_ROUTER_ID", ""))
    assert local
    for peer in desired_peers(cluster, local)[0]:
        block = session_of(case, peer)
        for words, value in (
            ("graceful restart time", peer.restart_seconds),
            ("keepalive time", peer.keepalive_seconds),
            ("allow local as", peer.allowed_own_as or None),
            ("multihop", peer.ttl_security),
        ):
            found = re.search(rf"{words} (\d+);", block)
            assert (int(found[1]) if found else None) == value, words
