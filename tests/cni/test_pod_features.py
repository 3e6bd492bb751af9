"""What pods ask for by annotation, done: addresses, pools, MAC, what the endpoint records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.registry import parse
from cni.config import VALID_ATTACHMENTS
from datastore.interface import Key
from kernel.netns import Namespace, inside
from tests.cni.rig import Container, Rig, configuration
from tests.cni.test_features import NAMES, VALUES

PREFIX = "cni.projectcalico.org/"
BOTH = {"assign_ipv4": "true", "assign_ipv6": "true"}
PERMITTED: dict[str, Any] = {"feature_control": {"ip_addrs_no_ipam": True, "floating_ips": True}}

Annotated = Callable[..., Container]


@pytest.fixture
def annotated(rig: Rig) -> Iterator[Annotated]:
    """Makes a container whose Pod has annotations; values that are no texts become JSON."""
    pods: list[Key] = []

    def make(**annotations: Any) -> Container:
        name = f"asks-{len(pods)}"
        texts = {
            key if "/" in key else PREFIX + key: v if isinstance(v, str) else json.dumps(v)
            for key, v in annotations.items()
        }
        rig.create("Pod", name, "red", metadata={"annotations": texts})
        pods.append(Key("Pod", name, "red"))
        return rig.container(name)

    yield make
    for key in pods:
        rig.store.delete(key)


@pytest.fixture
def pools(rig: Rig) -> Iterator[None]:
    """Pools beside ``pods``, which is 10.65.0.0/24."""
    specs: dict[str, dict[str, Any]] = {
        "second": {"cidr": "10.66.0.0/24", "assignmentMode": "Manual"},
        "third": {"cidr": "10.67.0.0/24", "assignmentMode": "Manual"},
        "six": {"cidr": "fd00:65::/64"},
    }
    for name, spec in specs.items():
        rig.create("IPPool", name, spec=spec)
    yield
    for name in specs:
        rig.store.delete(Key("IPPool", name))


def addresses(result: Any) -> list[str]:
    return [entry["address"] for entry in result["ips"]]


def spec_of(rig: Rig, pod: Container) -> dict[str, Any]:
    """The spec of a pod's endpoint, which must be valid."""
    [value] = [v for v in rig.endpoints().values() if v["spec"]["containerID"] == pod.id]
    parse(value)
    spec: dict[str, Any] = value["spec"]
    return spec


@pytest.mark.usefixtures("pools")
def test_pools(rig: Rig, annotated: Annotated) -> None:
    """Those of the pod, then its namespace, then the configuration, then any."""

    def network(pod: Container, **keys: Any) -> str:
        [address] = addresses(rig.add(pod, **keys))
        rig.delete(pod)
        return address.rpartition(".")[0]

    conf = {"ipam": {"ipv4_pools": ["second"]}}
    plain, own = annotated(), annotated(ipv4pools=["third"])
    assert network(plain) == "10.65.0"
    assert network(plain, **conf) == "10.66.0"
    assert network(own, **conf) == "10.67.0"
    annotation = {PREFIX + "ipv4pools": '["10.67.0.0/24"]'}
    rig.create("Namespace", "red", metadata={"annotations": annotation})
    assert network(plain, **conf) == "10.67.0"
    assert network(annotated(ipv4pools=["second"]), **conf) == "10.66.0"
    rig.store.delete(Key("Namespace", "red"))


@pytest.mark.usefixtures("pools")
def test_families(rig: Rig, annotated: Annotated) -> None:
    for families, conf, expected in (
        (["IPv6"], {}, [128]),
        (["IPv4"], {"ipam": BOTH}, [32]),
        (["IPv6", "IPv4"], {}, [32, 128]),
    ):
        pod = annotated(ipFamilies=families)
        result = rig.add(pod, **conf)
        assert [int(text.split("/")[1]) for text in addresses(result)] == expected
        assert rig.add(pod, **conf) == result
        rig.delete(pod)


@pytest.mark.usefixtures("pools")
def test_this_very_address(rig: Rig, annotated: Annotated) -> None:
    pod = annotated(ipAddrs=["fd00:65::77", "10.65.0.77"])
    result = rig.add(pod)
    assert addresses(result) == ["10.65.0.77/32", "fd00:65::77/128"]
    assert rig.held() == {f"k8s-pod-network.{pod.id}": 2}
    assert rig.add(pod) == result
    assert rig.call("CHECK", pod, configuration(prevResult=result)).ok() is None
    other = rig.container()
    rig.add(other)
    assert other.pings("10.65.0.77")
    # taken: the other family is not left behind
    late = annotated(ipAddrs=["fd00:65::78", "10.65.0.77"])
    answer = rig.call("ADD", late)
    assert answer.error == 100
    assert "10.65.0.77" in answer.json["msg"]
    assert late.links() == set()
    assert len(rig.held()) == 2
    # in no pool
    assert rig.call("ADD", annotated(ipAddrs=["192.0.2.1"])).error == 100
    rig.delete(other)
    rig.delete(pod)


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("IP=10.65.0.88;MAC=02:00:5E:10:00:02", {}),
    ("", {"runtimeConfig": {"ips": ["10.65.0.88/24"], "mac": "02:00:5e:10:00:02"}}),
    ("MAC=02-00-5e-10-00-02", {"args": {"cni": {"ips": ["10.65.0.88"]}}}),
]


@pytest.mark.parametrize(("arguments", "keys"), REQUESTS)
def test_the_runtime_asks_for_an_address(rig: Rig, arguments: str, keys: dict[str, Any]) -> None:
    pod = rig.container()
    pod.arguments += ";" + arguments
    result = rig.add(pod, **keys)
    assert addresses(result) == ["10.65.0.88/32"]
    assert result["interfaces"][1]["mac"] == "02:00:5e:10:00:02"
    assert rig.add(pod, **keys) == result
    assert rig.call("CHECK", pod, configuration(prevResult=result, **keys)).ok() is None
    other = rig.container()
    other.arguments += ";IP=10.65.0.88"
    answer = rig.call("ADD", other)
    assert answer.error == 100
    assert "10.65.0.88" in answer.json["msg"]
    rig.delete(pod)
    rig.delete(other)


@pytest.mark.usefixtures("pools")
def test_a_request_and_what_the_pod_says(rig: Rig, annotated: Annotated) -> None:
    """The pod's own word counts; both families may be asked for; nothing else is given."""
    pod = annotated(ipAddrs=["10.65.0.77"], hwAddr="02:00:5e:10:00:01")
    pod.arguments += ";IP=10.65.0.88;MAC=02:00:5e:10:00:02"
    result = rig.add(pod, ipam=BOTH)
    assert addresses(result) == ["10.65.0.77/32"]
    assert result["interfaces"][1]["mac"] == "02:00:5e:10:00:01"
    plain = annotated(ipFamilies=["IPv4"])
    plain.arguments += ";IP=10.65.0.89,fd00:65::89"
    result = rig.add(plain)
    assert addresses(result) == ["10.65.0.89/32", "fd00:65::89/128"]
    rig.delete(pod)
    rig.delete(plain)


@pytest.mark.parametrize(
    ("arguments", "keys", "code"),
    [
        ("IP=somewhere", {}, 4),
        ("IP=10.65.0.8,10.65.0.9", {}, 4),
        ("IP=127.0.0.1", {}, 4),
        ("MAC=01:00:5e:00:00:01", {}, 4),
        ("IP=10.65.0.8", {"runtimeConfig": {"ips": ["10.65.0.9/24"]}}, 7),
        ("", {"runtimeConfig": {"mac": "x"}}, 7),
        ("", {"runtimeConfig": {"ips": "10.65.0.9"}}, 7),
        ("", {"args": {"cni": {"ips": [7]}}}, 7),
        ("", {"args": []}, 0),
        ("IP=", {"args": {"labels": {}}, "runtimeConfig": {"portMappings": []}}, 0),
    ],
)
def test_requests_that_are_wrong(rig: Rig, arguments: str, keys: dict[str, Any], code: int) -> None:
    """They are refused, not ignored; a DEL does not mind."""
    pod = rig.container()
    pod.arguments += ";" + arguments
    answer = rig.call("ADD", pod, configuration(**keys))
    if code:
        assert answer.error == code
        assert pod.links() == set()
    else:
        answer.ok()
    rig.call("DEL", pod, configuration(**keys)).ok()


def test_resolvers_of_the_runtime(rig: Rig) -> None:
    pod = rig.container()
    told = {"servers": ["10.96.0.10"], "searches": ["red.svc"], "options": ["ndots:5"]}
    dns = {"nameservers": ["192.0.2.53"], "domain": "example.org"}
    result = rig.add(pod, dns=dns, runtimeConfig={"dns": told})
    assert result["dns"] == {
        "nameservers": ["10.96.0.10"],
        "domain": "example.org",
        "search": ["red.svc"],
        "options": ["ndots:5"],
    }
    rig.delete(pod)


def test_an_address_that_ipam_knows_nothing_of(rig: Rig, annotated: Annotated) -> None:
    pod = annotated(ipAddrsNoIpam=["192.0.2.77"])
    refused = rig.call("ADD", pod)
    assert refused.error == 103
    assert "feature_control.ip_addrs_no_ipam" in refused.json["msg"]
    assert pod.links() == set()
    result = rig.add(pod, **PERMITTED)
    assert addresses(result) == ["192.0.2.77/32"]
    assert rig.held() == {}
    conf = configuration(prevResult=result, **PERMITTED)
    assert rig.call("CHECK", pod, conf).ok() is None
    assert addresses(rig.add(pod, **PERMITTED)) == ["192.0.2.77/32"]
    other = rig.container()
    rig.add(other)
    assert other.pings("192.0.2.77")
    pod.run("ip", "address", "flush", "dev", "eth0")
    assert rig.call("CHECK", pod, conf).error == 102
    # GC knows it, although it holds no address
    valid = [{"containerID": pod.id, "ifname": "eth0"}]
    assert rig.call("GC", conf=configuration() | {VALID_ATTACHMENTS: valid}).ok() is None
    assert len(rig.endpoints()) == 1
    assert rig.call("GC", conf=configuration() | {VALID_ATTACHMENTS: []}).ok() is None


def test_mac_address(rig: Rig, annotated: Annotated) -> None:
    pod, other = annotated(hwAddr="02-00-5E-10-00-01"), rig.container()
    result = rig.add(pod)
    rig.add(other)
    assert result["interfaces"][1]["mac"] == "02:00:5e:10:00:01"
    assert spec_of(rig, pod)["mac"] == "02:00:5e:10:00:01"
    assert "02:00:5e:10:00:01" in pod.run("ip", "link", "show", "eth0").stdout
    assert other.pings(addresses(result)[0].split("/")[0])
    assert rig.add(pod) == result
    assert rig.call("CHECK", pod, configuration(prevResult=result)).ok() is None
    rig.delete(pod)
    rig.delete(other)


def test_what_the_endpoint_records(rig: Rig, annotated: Annotated) -> None:
    asked = {
        "floatingIPs": ["198.51.100.7", "198.51.100.8"],
        "allowedSourcePrefixes": ["192.0.2.9/24"],
        "qos.projectcalico.org/ingressPacketRate": "100",
        "qos.projectcalico.org/dscp": "EF",
    }
    pod = annotated(**asked)
    assert rig.call("ADD", pod).error == 103
    [address] = addresses(rig.add(pod, **PERMITTED))
    spec = spec_of(rig, pod)
    internal = address.split("/")[0]
    assert spec["ipNATs"] == [
        {"internalIP": internal, "externalIP": external}
        for external in ("198.51.100.7", "198.51.100.8")
    ]
    assert spec["allowSpoofedSourcePrefixes"] == ["192.0.2.0/24"]
    assert spec["qosControls"] == {
        "ingressPacketRate": 100,
        "ingressPacketBurst": 5,
        "dscp": "EF",
    }
    rig.delete(pod)


def test_host_ports_are_recorded(rig: Rig) -> None:
    ports = [{"containerPort": 80, "hostPort": 8080, "hostIP": "192.0.2.1", "protocol": "UDP"}]
    containers = [{"name": "c", "ports": ports}]
    rig.create("Pod", "ported", "red", spec={"containers": containers})
    pod = rig.container("ported")
    rig.add(pod)
    [port] = spec_of(rig, pod)["ports"]
    assert port == {"protocol": "UDP", "port": 80, "hostPort": 8080, "hostIP": "192.0.2.1"}
    rig.delete(pod)
    rig.store.delete(Key("Pod", "ported", "red"))


@pytest.mark.parametrize(
    ("annotation", "value", "right"),
    [
        ("ipAddrs", "10.65.0.7", "JSON list"),
        ("hwAddr", "ff:ff:ff:ff:ff:ff", "unicast"),
        ("ipv4pools", "pods", "JSON list"),
        ("qos.projectcalico.org/egressBandwidth", "fast", "1k to 1P"),
    ],
)
def test_nothing_is_half_done(
    rig: Rig, annotated: Annotated, annotation: str, value: str, right: str
) -> None:
    pod = annotated(**{annotation: value, "ipFamilies": ["IPv4"]})
    answer = rig.call("ADD", pod)
    assert answer.error == 103
    for word in ("red/asks-0", annotation, value, right):
        assert word in answer.json["msg"]
    assert pod.links() == set()
    rig.assert_empty()
    rig.delete(pod)


def read(pod: Container, *names: str) -> list[str]:
    with inside(pod.namespace.fd):
        return [Path("/proc/sys/net", name).read_text().strip() for name in names]


@pytest.mark.usefixtures("pools")
def test_forwarding_in_a_container(rig: Rig) -> None:
    names = ("ipv4/conf/eth0/forwarding", "ipv6/conf/eth0/forwarding")
    with inside(rig.namespace.fd):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for allowed in (False, True):
        pod = rig.container()
        settings = {"allow_ip_forwarding": allowed}
        rig.add(pod, ipam=BOTH, container_settings=settings)
        assert read(pod, *names) == [str(int(allowed))] * 2
        rig.delete(pod)


@pytest.mark.usefixtures("pools")
@pytest.mark.parametrize("which", ["all", "default"])
def test_a_container_without_ipv6(rig: Rig, which: str) -> None:
    """It is switched on where IPv6 is wanted, and left alone elsewhere."""
    name = f"ipv6/conf/{which}/disable_ipv6"
    one, two, plain = (rig.container() for _ in range(3))
    for pod in (one, plain):
        with inside(pod.namespace.fd):
            Path("/proc/sys/net", name).write_text("1")
    result = rig.add(one, ipam=BOTH)
    rig.add(two, ipam=BOTH)
    rig.add(plain)
    with inside(rig.namespace.fd):
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    assert two.pings(addresses(result)[1].split("/")[0])
    assert rig.call("CHECK", one, configuration(ipam=BOTH, prevResult=result)).ok() is None
    assert read(one, "ipv6/conf/eth0/disable_ipv6", "ipv6/conf/lo/disable_ipv6") == ["0", "0"]
    assert read(plain, name) == ["1"]
    for pod in (one, two, plain):
        rig.delete(pod)


@pytest.mark.usefixtures("pools")
def test_ipv6_answers_at_once(rig: Rig) -> None:
    """No duplicate address detection, at either end, and no waiting for neighbours.

    Each of these takes a second and more, always: one pair of three that needs less has none.
    """
    assert any(answers_at_once(rig) for _ in range(3))


def answers_at_once(rig: Rig) -> bool:
    """Whether the first packet to a pod that has just come is answered within a second."""
    one, two = rig.container(), rig.container()
    rig.add(one, ipam=BOTH)
    result = rig.add(two, ipam=BOTH)
    shown = json.loads(two.run("ip", "-j", "-6", "address", "show", "dev", "eth0").stdout)
    [own] = [a for a in shown[0]["addr_info"] if a["scope"] == "global"]
    assert "tentative" not in own
    assert own["prefixlen"] == 128
    with inside(rig.namespace.fd):
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    # even where the kernel's workers wait for a processor: the address is there already
    local = two.run("ip", "-6", "route", "show", "table", "local").stdout
    assert f"local {own['local']} dev eth0" in local
    # the first packet: ping gives up before a second would be sent
    address = addresses(result)[1].split("/")[0]
    answered = one.run("ping", "-c1", "-w1", address).returncode == 0
    rig.delete(one)
    rig.delete(two)
    return answered


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(own=st.dictionaries(st.sampled_from(NAMES), VALUES.filter(str.isprintable), max_size=3))
def test_whatever_a_pod_asks_for_nothing_is_left(rig: Rig, own: dict[str, str]) -> None:
    texts = {name if "/" in name else PREFIX + name: value for name, value in own.items()}
    rig.create("Pod", "fuzzed", "red", metadata={"annotations": texts})
    try:
        with Namespace.create() as netns:
            arguments = "K8S_POD_NAMESPACE=red;K8S_POD_NAME=fuzzed"
            pod = Container(netns, "f" * 64, arguments)
            answer = rig.call("ADD", pod, configuration(**PERMITTED))
            if answer.code:
                assert answer.error in (100, 103), answer.json
                assert pod.links() == set()
                rig.assert_empty()
            rig.delete(pod)
        rig.assert_empty()
    finally:
        rig.store.delete(Key("Pod", "fuzzed", "red"))
