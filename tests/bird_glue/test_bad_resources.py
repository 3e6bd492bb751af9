"""Objects with anything in them: named where they are wrong, and everything else goes on."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import Net
from bird_glue.advertise import Speaking, own_announcements, own_routes
from bird_glue.nexthops import Topology
from bird_glue.peers import desired_peers
from bird_glue.resources import KINDS, Resources
from bird_glue.sessions import listen, plan_sessions
from bird_glue.settings import local_settings
from datastore.follower import Update
from datastore.interface import Key

V3 = {"apiVersion": "projectcalico.org/v3"}
CIDR = "10.1.0.0/26"
RULE = {
    "action": "Accept",
    "cidr": CIDR,
    "matchOperator": "In",
    "prefixLength": {"min": 26, "max": 32},
    "communities": {"values": ["1:2"]},
    "asPathPrefix": [1],
    "operations": [{"addCommunity": {"value": "1:2"}}, {"setPriority": {"value": 1}}],
}
EXAMPLES: list[tuple[Key, dict[str, Any]]] = [
    (Key("Node", "n1"), {"spec": {"bgp": {"ipv4Address": "10.0.0.1/24", "asNumber": 65000}}}),
    (Key("Node", "n2"), {"spec": {"bgp": {"ipv4Address": "10.0.0.2/24"}}}),
    (
        Key("BGPConfiguration", "default"),
        {
            "spec": {
                "asNumber": 64512,
                "serviceClusterIPs": [{"cidr": "10.96.0.0/16"}],
                "communities": [{"name": "c", "value": "1:2"}],
                "prefixAdvertisements": [{"cidr": CIDR, "communities": ["c", "1:2:3"]}],
                "nodeMeshPassword": {"secretKeyRef": {"name": "s", "key": "k"}},
                "localWorkloadPeeringIPV4": "169.254.0.179",
            }
        },
    ),
    (
        Key("BGPPeer", "p"),
        {
            "spec": {
                "peerIP": "10.0.0.254:1790",
                "asNumber": 65001,
                "filters": ["f"],
                "reachableBy": "10.0.0.253",
                "keepaliveTime": "5s",
                "ttlSecurity": 1,
            }
        },
    ),
    (Key("BGPPeer", "w"), {"spec": {"localWorkloadSelector": "all()", "asNumber": 65001}}),
    (Key("BGPFilter", "f"), {"spec": {"importV4": [RULE], "exportV4": [RULE]}}),
    (Key("IPPool", "i"), {"spec": {"cidr": "10.1.0.0/16"}}),
    (
        Key("BlockAffinity", "n1-10-1-0-0-26"),
        {"spec": {"cidr": CIDR, "node": "n1", "state": "confirmed"}},
    ),
    (Key("KubernetesNode", "n1"), {"apiVersion": "v1", "spec": {"podCIDRs": ["10.2.0.0/24"]}}),
    (
        Key("Service", "s", "default"),
        {"apiVersion": "v1", "spec": {"clusterIPs": ["10.96.0.1"], "externalIPs": ["192.0.2.1"]}},
    ),
    (
        Key("EndpointSlice", "s", "default"),
        {
            "apiVersion": "discovery.k8s.io/v1",
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.1.0.1"], "nodeName": "n1"}],
        },
    ),
    (
        Key("WorkloadEndpoint", "w", "default"),
        {"spec": {"node": "n1", "interfaceName": "cali1", "ipNetworks": ["10.1.0.1/32"]}},
    ),
    (Key("ClusterInformation", "default"), {"spec": {"datastoreReady": True}}),
]
ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from(("", "10.0.0.0/33", "fd00::1", "-1", "all(", "eBGP", "1:2", "0s")),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)  # fmt: skip


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside of a value."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    for name, inner in items:
        found += paths(inner, (*here, name))
    return found


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    if not path:
        return to
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], to)
    return copy


@st.composite
def objects(draw: st.DrawFn) -> tuple[Key, Any]:
    key, example = draw(st.sampled_from(EXAMPLES))
    metadata = {"name": key.name} | ({"namespace": key.namespace} if key.namespace else {})
    kind = "Node" if key.kind == "KubernetesNode" else key.kind
    whole = {**V3, "kind": kind, "metadata": metadata, **example}
    if draw(st.booleans()):
        return key, whole
    return key, changed(whole, draw(st.sampled_from(paths(whole))), draw(ANYTHING))


def test_all_kinds_are_among_the_examples() -> None:
    assert set(KINDS) <= {key.kind for key, _ in EXAMPLES}


@settings(max_examples=60, deadline=None)
@given(st.lists(objects(), max_size=10))
def test_whatever_is_stored(found: list[tuple[Key, Any]]) -> None:
    resources = Resources("n1", pod_cidrs=True)
    for key, value in found:
        resources.update(Update(key, value if isinstance(value, dict) else {}))
    cluster = resources.cluster()
    local = local_settings(cluster, "n1")
    if local is None or not resources.usable:
        return
    workloads = list(resources.workloads.known.values())
    peers, problems = desired_peers(cluster, local, workloads)
    hosts = frozenset(local.node.hosts.values())

    def source_of(peer: Net) -> Net | None:
        return local.node.hosts.get(peer.version)

    sessions = plan_sessions(peers, local, hosts, source_of, resources.filters(), {})
    assert sessions.neighbors.keys() == sessions.peers.keys() == sessions.filters.keys()
    assert listen(local, hosts)
    pools = resources.pools(local.program_unencapsulated)
    own = own_routes(
        resources.blocks(), resources.announced_services("n1"), pools, Topology(),
        local.priorities, local.ignored_interfaces,
    )  # fmt: skip
    for address in sessions.neighbors:
        speaking = Speaking(
            64512,
            external=sessions.neighbors[address].external,
            priority=local.priorities[address.version],
            filters=sessions.filters[address],
            communities=local.communities,
        )
        own_announcements(own, address.version, speaking)
    for problem in resources.problems + problems + sessions.problems:
        assert str(problem).startswith(f"{problem.kind} {problem.name}: ")
