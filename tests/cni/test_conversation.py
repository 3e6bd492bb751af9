"""Pods come, talk and go: the executable, the daemon, the kernel and the datastore together."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from api.endpoint import WorkloadEndpoint
from api.names import interface_name
from api.registry import parse
from cni.config import VALID_ATTACHMENTS
from cni.errors import NOT_AVAILABLE, TRY_AGAIN_LATER
from datastore.interface import Key
from kernel.netns import Namespace
from tests.cni.rig import NODE, Container, Rig, configuration, running, sysctl
from tests.support.netns import connect, eventually, fresh_namespace, run

VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


def address(result: Any) -> str:
    """The first address of a result, without its length."""
    text: str = result["ips"][0]["address"]
    return text.split("/")[0]


def test_two_pods_talk(rig: Rig, client: Path) -> None:
    rig.client = client
    one, two = rig.container(), rig.container()
    first, second = rig.add(one), rig.add(two)
    assert one.pings(address(second))
    assert two.pings(address(first))
    rig.delete(one)
    assert not two.pings(address(first))
    rig.delete(two)


def test_node_and_pod_talk(rig: Rig) -> None:
    pod = rig.container()
    result = rig.add(pod)
    with fresh_namespace() as outside:
        connect(rig.namespace, "up0", outside, "eth0", ["192.0.2.1/24", "192.0.2.2/24"])
        run(rig.namespace, "ping", "-c1", "-W10", address(result))
        assert pod.pings("192.0.2.1")
        # the way back leads through the node: a pod is reached by its own address
        run(outside, "ip", "route", "add", "10.65.0.0/24", "via", "192.0.2.1")
        sysctl(rig.namespace, {"net/ipv4/conf/up0/forwarding": "1"})
        assert pod.pings("192.0.2.2")
        run(outside, "ping", "-c1", "-W10", address(result))
    rig.delete(pod)


def test_a_pod_cannot_use_anothers_address(rig: Rig) -> None:
    one, two = rig.container(), rig.container()
    rig.add(one)
    target = address(rig.add(two))
    one.run("ip", "address", "add", "10.65.0.250/32", "dev", "lo")
    assert one.run("ping", "-c1", "-W10", target).returncode == 0
    assert one.run("ping", "-c1", "-W1", "-I", "10.65.0.250", target).returncode == 1
    rig.delete(one)
    rig.delete(two)


@pytest.mark.parametrize("version", VERSIONS)
def test_result(rig: Rig, version: str) -> None:
    pod = rig.container("web")
    result = rig.add(pod, version=version, mtu=1400, dns={"nameservers": ["10.0.0.10"]})
    [name] = rig.links()
    node_end, pod_end = result["interfaces"]
    expected = {"name": name, "mac": "ee:ee:ee:ee:ee:ee"}
    assert node_end == expected | ({"mtu": 1400} if version == "1.1.0" else {})
    assert pod_end["name"] == "eth0"
    assert pod_end["sandbox"] == pod.netns
    shown = json.loads(pod.run("ip", "-j", "address", "show", "dev", "eth0").stdout)[0]
    assert pod_end["mac"] == shown["address"]
    assert shown["mtu"] == 1400
    [net] = shown["addr_info"][:1]
    ip = {"interface": 1, "address": f"{net['local']}/32", "gateway": "169.254.1.1"}
    assert result["ips"] == [ip | ({"version": "4"} if version < "1.0.0" else {})]
    assert [route["dst"] for route in result["routes"]] == ["169.254.1.1/32", "0.0.0.0/0"]
    assert result["dns"] == {"nameservers": ["10.0.0.10"]}
    assert result["cniVersion"] == version
    rig.delete(pod)


def test_an_add_may_be_repeated(rig: Rig) -> None:
    pod = rig.container()
    first = rig.add(pod)
    link = rig.link(pod)
    assert rig.add(pod) == first
    assert rig.link(pod) == link
    rig.delete(pod)


def test_a_broken_wire_is_made_anew(rig: Rig) -> None:
    pod, other = rig.container(), rig.container()
    first = rig.add(pod)
    pod.run("ip", "link", "set", "eth0", "down")
    assert rig.add(pod) == first
    rig.add(other)
    assert other.pings(address(first))
    rig.delete(pod)
    rig.delete(other)


def test_the_pods_endpoint(rig: Rig) -> None:
    ports = [{"name": "http", "containerPort": 80}, {"containerPort": 81}]
    rig.create(
        "Pod",
        "web-0",
        "red",
        metadata={"labels": {"app": "web"}},
        spec={"serviceAccountName": "builder", "containers": [{"name": "c", "ports": ports}]},
    )
    pod = rig.container("web-0")
    result = rig.add(pod)
    [(name, value)] = rig.endpoints().items()
    endpoint = parse(value)
    assert isinstance(endpoint, WorkloadEndpoint)
    assert name == endpoint.name == "node--1-k8s-web--0-eth0"
    assert endpoint.namespace == "red"
    assert endpoint.metadata.labels == {
        "app": "web",
        "projectcalico.org/namespace": "red",
        "projectcalico.org/orchestrator": "k8s",
        "projectcalico.org/serviceaccount": "builder",
    }
    spec = endpoint.spec
    assert (spec.node, spec.pod, spec.endpoint) == (NODE, "web-0", "eth0")
    assert spec.container_id == pod.id
    assert (
        spec.interface_name
        == result["interfaces"][0]["name"]
        == interface_name("cali", "red", "web-0")
    )
    assert spec.mac == result["interfaces"][1]["mac"]
    assert spec.ip_networks == [f"{address(result)}/32"]
    assert spec.profiles == ["kns.red", "ksa.red.builder"]
    assert [(port.name, port.protocol, port.port) for port in spec.ports] == [("http", "TCP", 80)]
    rig.delete(pod)
    rig.store.delete(Key("Pod", "web-0", "red"))


def test_a_container_outside_kubernetes(rig: Rig) -> None:
    one, two = rig.container(pod=False), rig.container(pod=False)
    one.id, two.id = "Some_Container.1", "Some_Container.2"
    rig.add(one)
    assert one.pings(address(rig.add(two)))
    for value in rig.endpoints().values():
        parse(value)
    for entry in rig.store.list("IPAMHandle").entries:
        parse(entry.value)
    rig.delete(one)
    rig.delete(two)


def test_a_second_interface(rig: Rig) -> None:
    pod = rig.container()
    rig.add(pod)
    again = Container(pod.namespace, pod.id, pod.arguments, ifname="net1")
    # its routes would clash with those of eth0, which is what the runtime is told
    answer = rig.call("ADD", again)
    assert answer.error == 101
    assert pod.links() == {"eth0"}
    rig.delete(again)
    assert len(rig.links()) == len(rig.endpoints()) == len(rig.held()) == 1
    rig.delete(pod)


def test_del_may_be_repeated(rig: Rig, client: Path) -> None:
    rig.client = client
    pod = rig.container()
    rig.delete(pod)
    rig.add(pod)
    rig.delete(pod)
    rig.delete(pod)
    assert pod.links() == set()


def test_del_without_namespace(rig: Rig, client: Path) -> None:
    rig.client = client
    for netns in ("", "/no/such/namespace"):
        pod = rig.container()
        rig.add(pod)
        rig.delete(pod, CNI_NETNS=netns)


def test_del_after_the_namespace_is_gone(rig: Rig) -> None:
    pod = rig.container()
    rig.add(pod)
    gone = Container(Namespace.create(), pod.id, pod.arguments)
    pod.namespace.close()
    rig.delete(gone, CNI_NETNS="/no/such/namespace")


def test_del_of_the_sandbox_before(rig: Rig) -> None:
    """TRICKY-SEMANTICS 29: only its own address goes."""
    old = rig.container("web")
    rig.add(old)
    new, other = rig.container("web"), rig.container()
    result = rig.add(new)
    assert len(rig.held()) == 2
    rig.delete(old)
    [endpoint] = rig.endpoints().values()
    assert endpoint["spec"]["containerID"] == new.id
    assert list(rig.held()) == [f"k8s-pod-network.{new.id}"]
    rig.add(other)
    assert other.pings(address(result))
    rig.delete(new)
    rig.delete(other)


def test_prev_result_is_passed_on(rig: Rig) -> None:
    pod = rig.container()
    previous: dict[str, Any] = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "net0", "mac": "02:00:00:00:00:01", "sandbox": "x", "own": 1}],
        "ips": [{"address": "192.0.2.1/24", "interface": 0}],
        "routes": [{"dst": "198.51.100.0/24"}],
        "dns": {"domain": "example"},
    }
    result = rig.add(pod, version="1.0.0", prevResult=previous)
    assert result["interfaces"][0] == previous["interfaces"][0]
    assert [ip["interface"] for ip in result["ips"]] == [0, 2]
    assert result["routes"][0] == previous["routes"][0]
    assert result["dns"] == previous["dns"]
    rig.delete(pod)


CHANGES: dict[str, list[str]] = {
    "link down": ["ip", "link", "set", "eth0", "down"],
    "no address": ["ip", "address", "flush", "dev", "eth0"],
    "no default route": ["ip", "route", "del", "default"],
    "no link route": ["ip", "route", "flush", "table", "main"],
    "other MAC": ["ip", "link", "set", "eth0", "address", "02:00:00:00:00:09"],
    "other name": ["ip", "link", "set", "eth0", "name", "eth1"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_check_finds(rig: Rig, change: str) -> None:
    pod = rig.container()
    conf = configuration(prevResult=rig.add(pod))
    assert rig.call("CHECK", pod, conf).ok() is None
    assert pod.run(*CHANGES[change]).returncode == 0
    answer = rig.call("CHECK", pod, conf)
    assert answer.error == 102
    assert "eth0" in answer.json["msg"]
    rig.delete(pod)


def test_check_accepts_what_a_later_plugin_changed(rig: Rig) -> None:
    pod = rig.container()
    result = rig.add(pod)
    pod.run("ip", "link", "set", "eth0", "mtu", "1300")
    pod.run("ip", "route", "add", "192.0.2.0/24", "dev", "eth0")
    result["interfaces"][1]["mtu"] = 1300
    assert rig.call("CHECK", pod, configuration(prevResult=result)).ok() is None
    rig.delete(pod)


def test_check_compares_with_the_datastore(rig: Rig) -> None:
    pod = rig.container()
    result = rig.add(pod)
    [(name, value)] = rig.endpoints().items()
    wrong = json.loads(json.dumps(result))
    wrong["ips"][0]["address"] = "10.65.0.99/32"
    assert "prevResult" in rig.call("CHECK", pod, configuration(prevResult=wrong)).json["msg"]
    rig.store.delete(Key("WorkloadEndpoint", name, "red"))
    assert name in rig.call("CHECK", pod, configuration(prevResult=result)).json["msg"]
    rig.store.create(Key("WorkloadEndpoint", name, "red"), value)
    rig.delete(pod)


def test_gc(rig: Rig) -> None:
    pods = [rig.container() for _ in range(3)]
    lost = rig.container(pod=False)
    results = [rig.add(pod) for pod in (*pods, lost)]
    valid = [{"containerID": pods[1].id, "ifname": "eth0"}]
    assert rig.call("GC", conf=configuration() | {VALID_ATTACHMENTS: valid}).ok() is None
    assert list(rig.held()) == [f"k8s-pod-network.{pods[1].id}"]
    assert rig.links() == {results[1]["interfaces"][0]["name"]}
    assert len(rig.endpoints()) == 1
    # without the list nothing may be taken for stale
    assert rig.call("GC").error == 7
    # another network's containers are none of its business
    other = configuration() | {VALID_ATTACHMENTS: [], "name": "other"}
    assert rig.call("GC", conf=other).ok() is None
    assert len(rig.links()) == 1
    # a runtime without containers lists none
    assert rig.call("GC", conf=configuration() | {VALID_ATTACHMENTS: None}).ok() is None


def test_status(rig: Rig) -> None:
    assert rig.call("STATUS").ok() is None
    assert rig.call("STATUS", conf=configuration(ipam={"assign_ipv6": True})).error == 50
    named = configuration(ipam={"ipv4_pools": ["other"]})
    answer = rig.call("STATUS", conf=named)
    assert answer.error == 50
    assert "other" in answer.json["msg"]
    pool = rig.store.delete(Key("IPPool", "pods"))
    assert rig.call("STATUS").error == 50
    rig.store.create(pool.key, pool.value)


@pytest.mark.parametrize("version", [None, "", "0.1.0", "0.2.0"])
def test_versions_before_there_were_interfaces(rig: Rig, client: Path, version: str | None) -> None:
    """One address of each family; a configuration without a version means the first."""
    rig.client = client
    rig.create("IPPool", "six", spec={"cidr": "fd00:66::/64"})
    pod, other = rig.container(), rig.container()
    dns = {"nameservers": ["10.0.0.10"]}
    conf = configuration(version or "", ipam={"assign_ipv6": True}, dns=dns)
    if version is None:
        del conf["cniVersion"]
    result = rig.call("ADD", pod, conf).ok()
    assert result.keys() == {"cniVersion", "ip4", "ip6", "dns"}
    assert result["cniVersion"] == (version or "0.1.0")
    assert result["dns"] == dns
    assert result["ip4"]["gateway"] == "169.254.1.1"
    assert result["ip4"]["routes"] == [
        {"dst": "169.254.1.1/32"},
        {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
    ]
    assert result["ip6"]["ip"].endswith("/128")
    assert [route["dst"] for route in result["ip6"]["routes"]][1:] == ["::/0"]
    rig.add(other)
    assert other.pings(result["ip4"]["ip"].split("/")[0])
    assert rig.call("CHECK", pod, conf).error == 1
    wrong = rig.call("ADD", pod, conf | {"mtu": "x"})
    assert wrong.error == 7
    assert wrong.json["cniVersion"] == result["cniVersion"]
    rig.call("DEL", pod, conf).ok()
    rig.delete(other)
    rig.store.delete(Key("IPPool", "six"))


def given_mtu(rig: Rig, pod: Container) -> int:
    """What it is given. The way out was looked up for the last ADD, and holds for 10 ms."""
    time.sleep(0.02)
    given = int(rig.add(pod)["interfaces"][1]["mtu"])
    rig.delete(pod)
    return given


def test_mtu_is_that_of_the_uplink_less_the_tunnel(rig: Rig) -> None:
    with fresh_namespace() as outside:
        link, _ = connect(rig.namespace, "up0", outside, "eth0", ["192.0.2.1/24", "192.0.2.2/24"])
        run(rig.namespace, "ip", "link", "set", link.name, "mtu", "9000")
        run(rig.namespace, "ip", "route", "add", "default", "via", "192.0.2.2")
        pod = rig.container()
        assert given_mtu(rig, pod) == 9000
        rig.create("IPPool", "tunnel", spec={"cidr": "10.66.0.0/24", "vxlanMode": "CrossSubnet"})
        assert rig.add(pod)["interfaces"][1]["mtu"] == 8950
        rig.delete(pod)
        settings = {"vxlanMTU": 1400, "ipipMTU": 1300, "vxlanMTUV6": 0}
        rig.create("FelixConfiguration", "default", spec=settings)
        assert rig.add(pod)["interfaces"][1]["mtu"] == 1400
        rig.delete(pod)
        rig.store.delete(Key("IPPool", "tunnel"))
        assert rig.add(pod)["interfaces"][1]["mtu"] == 9000
        rig.delete(pod)
        rig.create("IPPool", "six", spec={"cidr": "fd00:66::/64", "vxlanMode": "Always"})
        assert rig.add(pod)["interfaces"][1]["mtu"] == 8930
        rig.delete(pod)
        for kind, name in (("FelixConfiguration", "default"), ("IPPool", "six")):
            rig.store.delete(Key(kind, name))


def test_mtu_of_an_uplink_of_ipv6(c_client: Path) -> None:
    """Where IPv4 has no way out, and where it has another."""
    with running(c_client) as rig, fresh_namespace() as outside:
        sysctl(rig.namespace, {"net/ipv6/conf/all/accept_dad": "0"})
        for name, mtu in (("up0", "4000"), ("up1", "3000")):
            connect(rig.namespace, name, outside, f"to-{name}", [])
            run(rig.namespace, "ip", "link", "set", name, "mtu", mtu)
        pod = rig.container()
        run(rig.namespace, "ip", "-6", "route", "add", "default", "dev", "up0")
        local = ("ip", "-6", "route", "show", "table", "local", "dev", "up0")
        eventually(lambda: "fe80:" in run(rig.namespace, *local).stdout)  # it can send
        assert given_mtu(rig, pod) == 4000
        run(rig.namespace, "ip", "route", "add", "default", "dev", "up1")
        assert given_mtu(rig, pod) == 3000


def test_mtu_is_the_smallest_of_the_interfaces_that_are_named(rig: Rig) -> None:
    configured = Key("FelixConfiguration", f"node.{NODE}")
    with fresh_namespace() as outside:
        for name, mtu in (("up0", 9000), ("up1", 4000), ("eth7", 3000)):
            connect(rig.namespace, name, outside, f"to-{name}", [])
            run(rig.namespace, "ip", "link", "set", name, "mtu", str(mtu))
        rig.create(configured.kind, configured.name, spec={"mtuIfacePattern": "^up[0-9]$"})
        pod = rig.container()
        try:
            assert rig.add(pod)["interfaces"][1]["mtu"] == 4000
            rig.delete(pod)
            for pattern, mtu in (("7$", 3000), ("^nothing", 1500)):
                spec = {"mtuIfacePattern": pattern}
                rig.store.update(configured, rig.store.get(configured).value | {"spec": spec})
                assert rig.add(pod)["interfaces"][1]["mtu"] == mtu
                rig.delete(pod)
            spec = {"mtuIfacePattern": "["}
            rig.store.update(configured, rig.store.get(configured).value | {"spec": spec})
            answer = rig.call("ADD", pod)
            assert answer.code != 0
            assert "spec.mtuIfacePattern: '['" in answer.json["msg"]
        finally:
            rig.store.delete(configured)


def test_two_families(rig: Rig) -> None:
    rig.create("IPPool", "six", spec={"cidr": "fd00:65::/64"})
    sysctl(rig.namespace, {"net/ipv6/conf/all/forwarding": "1"})
    one, two = rig.container(), rig.container()
    ipam = {"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": "true"}
    rig.add(one, ipam=ipam)
    result = rig.add(two, ipam=ipam)
    assert [ip["address"].split("/")[1] for ip in result["ips"]] == ["32", "128"]
    assert all(one.pings(ip["address"].split("/")[0]) for ip in result["ips"])
    conf = configuration(ipam=ipam, prevResult=result)
    assert rig.call("CHECK", two, conf).ok() is None
    rig.delete(one)
    rig.delete(two)
    rig.store.delete(Key("IPPool", "six"))


def test_many_at_once(rig: Rig) -> None:
    pods = [rig.container() for _ in range(30)]
    adding = [rig.begin("ADD", pod) for pod in pods]
    results = [rig.end(process).ok() for process in adding]
    assert len({address(result) for result in results}) == 30
    assert len(rig.links()) == len(rig.endpoints()) == len(rig.held()) == 30
    assert pods[0].pings(address(results[29]))
    deleting = [rig.begin("DEL", pod) for pod in pods]
    for process in deleting:
        rig.end(process).ok()


def test_add_and_del_of_one_pod_at_once(rig: Rig) -> None:
    """A runtime should not, but a kubelet that restarts may. Each step is whole."""
    pods = [rig.container("same") for _ in range(4)]
    processes = [rig.begin(verb, pod) for _ in range(2) for pod in pods for verb in ("ADD", "DEL")]
    for process in processes:
        rig.end(process).ok()
    for pod in pods:
        rig.delete(pod)


def test_a_locked_datastore_is_left_alone(rig: Rig) -> None:
    pod, late = rig.container(), rig.container()
    rig.add(pod)
    rig.create("ClusterInformation", "default", spec={"datastoreReady": False})
    for command, container in (("ADD", late), ("DEL", pod)):
        answer = rig.call(command, container)
        assert answer.error == TRY_AGAIN_LATER
        assert "migrate unlock" in answer.json["msg"]
    assert rig.call("STATUS").error == NOT_AVAILABLE
    assert len(rig.links()) == 1
    rig.store.delete(Key("ClusterInformation", "default"))
    rig.delete(pod)
    rig.add(late)
    rig.delete(late)
