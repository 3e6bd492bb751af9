"""Why a flow passes or not, from the objects alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from click.testing import Result

from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from tests.manxctl.conftest import Run

CALICO = "projectcalico.org/v3"


def thing(kind: str, name: str, namespace: str = "", **spec: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": CALICO, "kind": kind, "metadata": metadata, "spec": spec}


def pod(name: str, node: str, *nets: str, **labels: str) -> dict[str, Any]:
    dashes = [part.replace("-", "--") for part in (node, name)]
    found = thing(
        "WorkloadEndpoint",
        f"{dashes[0]}-k8s-{dashes[1]}-eth0",
        "shop",
        orchestrator="k8s",
        node=node,
        pod=name,
        endpoint="eth0",
        containerID="c",
        ipNetworks=list(nets),
        interfaceName=f"cali{name}",
        profiles=["open"],
    )
    own = {"projectcalico.org/namespace": "shop", "projectcalico.org/orchestrator": "k8s"}
    found["metadata"]["labels"] = {"app": name, **own, **labels}
    return found


WORLD = [
    thing("Node", "node-1", bgp={"ipv4Address": "192.0.2.1/24"}),
    thing("Node", "node-2", bgp={"ipv4Address": "192.0.2.2/24"}),
    thing("Profile", "open", ingress=[{"action": "Allow"}], egress=[{"action": "Allow"}]),
    pod("web", "node-1", "10.0.0.1/32", "fd00::1/128"),
    pod("front", "node-1", "10.0.0.2/32"),
    pod("db", "node-2", "10.0.1.1/32", "fd00::2/128"),
    thing("Tier", "security", order=10),
    thing(
        "GlobalNetworkPolicy",
        "quarantine",
        tier="security",
        order=1,
        selector="app == 'db'",
        types=["Ingress"],
        ingress=[
            {"action": "Deny", "source": {"selector": "app == 'front'"}},
            {"action": "Pass"},
        ],
    ),
    thing(
        "NetworkPolicy",
        "db",
        "shop",
        selector="app == 'db'",
        types=["Ingress"],
        ingress=[
            {
                "action": "Allow",
                "protocol": "TCP",
                "source": {"selector": "app == 'web'"},
                "destination": {"ports": [5432]},
            }
        ],
    ),
    thing(
        "StagedNetworkPolicy",
        "db-closed",
        "shop",
        selector="app == 'db'",
        order=0,
        types=["Ingress"],
        ingress=[{"action": "Deny"}],
    ),
]


@pytest.fixture(autouse=True)
def world(run: Run) -> None:
    result = run("apply", "-f", "-", stdin=yaml.safe_dump_all(WORLD))
    assert result.exit_code == 0, result.stderr


def explain(run: Run, *arguments: str) -> Any:
    result = run("explain", *arguments, "-n", "shop", "-o", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def decider(found: Any) -> tuple[str, Any, Any]:
    (step,) = [step for step in found["nodes"][-1]["steps"] if step["decides"]][-1:]
    return step["direction"], step["policy"], step["rule"]


def test_told_as_text(run: Run) -> None:
    result = run("explain", "web", "db", "-n", "shop", "-p", "5432")
    assert result.stdout.splitlines() == [
        "TCP from shop/web (10.0.0.1, node-1) to shop/db (10.0.1.1, node-2) port 5432",
        "",
        "on node-1:",
        "  egress of shop/web, profiles",
        "    Profile(open) rule 0: Allow",
        "",
        "on node-2:",
        "  ingress of shop/db, tier security",
        "    GlobalNetworkPolicy(quarantine) rule 1: Pass",
        "  ingress of shop/db, tier default",
        "    StagedNetworkPolicy(shop/db-closed) rule 0: would Deny",
        "    NetworkPolicy(shop/db) rule 0: Allow",
        "",
        "Allowed",
    ]


def test_what_decides(run: Run) -> None:
    denied = explain(run, "front", "db", "--port", "5432/tcp")
    assert denied["action"] == "Deny"
    assert decider(denied) == ("ingress", "GlobalNetworkPolicy(quarantine)", 0)
    unmatched = explain(run, "shop/web", "10.0.1.1", "--port", "5433")
    assert (unmatched["action"], decider(unmatched)) == ("Deny", ("ingress", None, None))
    assert unmatched["target"] == {"name": "shop/db", "address": "10.0.1.1", "node": "node-2"}
    ping = explain(run, "web", "front")
    assert (ping["action"], ping["protocol"], len(ping["nodes"])) == ("Allow", 1, 1)
    six = explain(run, "web", "db", "-6")
    assert (six["action"], six["protocol"]) == ("Deny", 58)
    outside = explain(run, "203.0.113.9", "front", "-p", "80")
    assert (outside["action"], outside["source"]["node"]) == ("Allow", None)
    assert [node["node"] for node in outside["nodes"]] == ["node-1"]


def test_hosts(run: Run, store: SqliteDatastore) -> None:
    def put(*objects: dict[str, Any]) -> None:
        assert run("apply", "-f", "-", stdin=yaml.safe_dump_all(objects)).exit_code == 0

    # a pod may speak to its node if its own policy allows it; what comes of it is a setting
    found = explain(run, "web", "node-1", "-p", "443")
    assert found["action"] == "Deny"
    assert found["nodes"][0]["reason"] == "FelixConfiguration defaultEndpointToHostAction: Drop"
    put(thing("FelixConfiguration", "default", defaultEndpointToHostAction="Return"))
    assert explain(run, "web", "node-1", "-p", "443")["action"] == "Allow"
    # nothing guards the hosts yet
    assert explain(run, "203.0.113.9", "node-2", "-p", "443")["nodes"][0]["steps"] == []
    put(
        thing("HostEndpoint", "all", node="node-2", interfaceName="*"),
        thing("HostEndpoint", "own", node="node-1", expectedIPs=["192.0.2.1"]),
        thing("HostEndpoint", "named", node="node-2", interfaceName="eth9"),
    )
    closed = explain(run, "203.0.113.9", "node-2", "-p", "443")
    assert (closed["action"], decider(closed)) == ("Deny", ("ingress", None, None))
    assert "HostEndpoint(named) guards interface eth9" in closed["nodes"][0]["notes"][0]
    failsafe = explain(run, "203.0.113.9", "node-2", "-p", "22")
    assert failsafe["action"] == "Allow"
    assert failsafe["nodes"][0]["reason"] == "FelixConfiguration failsafeInboundHostPorts: 22"
    assert explain(run, "node-1", "node-2", "-p", "443")["action"] == "Deny"


def test_every_address_of_a_node_is_its(run: Run) -> None:
    """That of IPv6, others, and what a host endpoint expects; else nobody would be asked."""
    node = thing(
        "Node",
        "node-2",
        bgp={"ipv4Address": "192.0.2.2/24", "ipv6Address": "2001:db8::2/64"},
        addresses=[{"address": "198.51.100.2", "type": "ExternalIP"}],
    )
    guard = thing("HostEndpoint", "all", node="node-2", interfaceName="*")
    expecting = thing("HostEndpoint", "x", node="node-2", expectedIPs=["203.0.113.2"])
    objects = yaml.safe_dump_all((node, guard, expecting))
    assert run("apply", "-f", "-", stdin=objects).exit_code == 0
    for source, target in (
        ("203.0.113.9", "198.51.100.2"),
        ("203.0.113.9", "203.0.113.2"),
        ("2001:db8::9", "2001:db8::2"),
        ("2001:db8::9", "node-2"),
        ("203.0.113.9", "node-2"),
    ):
        found = explain(run, source, target, "-p", "80")
        assert (found["action"], found["target"]["node"]) == ("Deny", "node-2"), target


def test_endpoints_that_are_not_in_force(run: Run) -> None:
    """Their interfaces drop: no policy that allows makes a difference."""
    stranger = pod("stranger", "node-2", "10.0.1.9/32")
    stranger["spec"]["interfaceName"] = "eth7"
    again = pod("zz", "node-2", "10.0.1.1/32")
    objects = yaml.safe_dump_all((stranger, again))
    assert run("apply", "-f", "-", stdin=objects).exit_code == 0
    for target in ("stranger", "zz"):
        found = explain(run, "203.0.113.9", target, "-p", "80")
        assert found["action"] == "Deny"
        assert "is not in force" in found["nodes"][0]["reason"]


def test_a_finished_pod_has_no_address(run: Run, store: SqliteDatastore) -> None:
    finished = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Succeeded", "podIP": "10.0.0.1"},
    }
    store.create(Key("Pod", "web", "shop"), finished)
    assert "a pod that has one" in run("explain", "web", "db", "-n", "shop").stderr
    later = pod("zz", "node-2", "10.0.0.1/32")
    assert run("apply", "-f", "-", stdin=yaml.safe_dump(later)).exit_code == 0
    assert explain(run, "10.0.0.1", "front")["source"]["name"] == "shop/zz"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("webb", "db"), "'webb'"),
        (("web", "nobody/db"), "'nobody/db'"),
        (("front", "db", "-6"), "expected IPv6 addresses at both ends"),
        (("web", "db", "-p", "70000"), "70000"),
        (("web", "db", "-p", "53/ICMP"), "53/ICMP"),
        (("web", "db", "--protocol", "TCP"), "those with ports by --port"),
        (("web", "db", "-p", "1", "--protocol", "ICMP"), "--port names the protocol"),
    ],
)
def test_bad_questions(run: Run, arguments: tuple[str, ...], words: str) -> None:
    result: Result = run("explain", *arguments, "-n", "shop")
    assert result.exit_code != 0
    assert words in result.stderr


def test_what_a_node_sends_to_its_pods_is_not_asked_about(run: Run) -> None:
    found = explain(run, "node-2", "db", "-p", "80")
    assert found["action"] == "Allow"
    assert [node["steps"] for node in found["nodes"]] == [[]]
    assert explain(run, "node-1", "db", "-p", "80")["action"] == "Deny"


def test_neither_end_is_ours(run: Run) -> None:
    result = run("explain", "203.0.113.1", "203.0.113.2")
    assert result.stdout.splitlines()[-1] == "Allowed"
    assert "neither end is in this cluster" in result.stdout


def test_encapsulation_by_a_pod_is_dropped_before_policy(run: Run) -> None:
    for packet, setting in (
        (("-p", "4789/UDP"), "allowVXLANPacketsFromWorkloads"),
        (("--protocol", "4"), "allowIPIPPacketsFromWorkloads"),
    ):
        found = explain(run, "web", "front", *packet)
        (node,) = found["nodes"]
        assert (found["action"], node["steps"]) == ("Deny", [])
        assert node["reason"] == f"FelixConfiguration {setting}: false"
        assert explain(run, "203.0.113.9", "front", *packet)["action"] == "Allow", "not from a pod"
        settings = thing("FelixConfiguration", "default") | {"spec": {setting: True}}
        assert run("apply", "-f", "-", stdin=yaml.safe_dump(settings)).exit_code == 0
        assert explain(run, "web", "front", *packet)["action"] == "Allow"
        assert run("delete", "felixconfiguration", "default").exit_code == 0


def test_addresses_of_services_are_pointed_out(run: Run) -> None:
    services = thing("BGPConfiguration", "default", serviceClusterIPs=[{"cidr": "10.96.0.0/12"}])
    assert run("apply", "-f", "-", stdin=yaml.safe_dump(services)).exit_code == 0
    (node,) = explain(run, "web", "10.96.0.7", "-p", "80")["nodes"]
    (note,) = node["notes"]
    assert "an address of services" in note and "serviceLoopPrevention: Drop" in note
    (node,) = explain(run, "web", "198.51.100.7", "-p", "80")["nodes"]
    assert node["notes"] == []
