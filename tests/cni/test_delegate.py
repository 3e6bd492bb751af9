"""Addresses from other IPAM plugins: those of the reference set, and bad ones."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import delegate
from cni.config import VALID_ATTACHMENTS
from cni.delegate import parse_lease
from cni.errors import (
    ADDRESSES,
    ANNOTATIONS,
    INVALID_CONFIGURATION,
    NOT_AS_ADDED,
    NOT_AVAILABLE,
    TRY_AGAIN_LATER,
    CniError,
)
from datastore.interface import JSON, Key
from tests.cni.rig import NODE, Answer, Container, Rig, configuration
from tests.support.netns import eventually

VERSION = "1.0.0"  # the newest that Debian's plugins speak
REFERENCE = "/usr/lib/cni"


@pytest.fixture
def data(rig: Rig, tmp_path: Path) -> Iterator[Path]:
    """Where host-local keeps what it gave; after each test it must hold nothing."""
    yield tmp_path
    assert leases(tmp_path) == set()


def leases(data: Path) -> set[str]:
    """The addresses that host-local holds."""
    return {path.name for path in data.glob("*/*.*") if path.name[0].isdigit()}


def host_local(data: Path, **ipam: Any) -> JSON:
    ipam = {"subnet": "10.88.0.0/24", **ipam} if "ranges" not in ipam else ipam
    return configuration(VERSION, ipam={"type": "host-local", "dataDir": str(data), **ipam})


def addresses(result: Any) -> list[str]:
    return [entry["address"] for entry in result["ips"]]


def script(directory: Path, name: str, text: str) -> Path:
    """An IPAM plugin of our own."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_pods_talk_with_addresses_of_host_local(rig: Rig, data: Path) -> None:
    one, two = rig.container(), rig.container()
    conf = host_local(data)
    first, second = (rig.call("ADD", pod, conf).ok() for pod in (one, two))
    assert addresses(first) == ["10.88.0.2/32"]
    assert first["ips"][0]["gateway"] == "169.254.1.1"
    assert first["routes"][-1] == {"dst": "0.0.0.0/0", "gw": "169.254.1.1"}
    assert one.pings(addresses(second)[0].split("/")[0])
    specs = [endpoint["spec"] for endpoint in rig.endpoints().values()]
    assert sorted(spec["ipNetworks"] for spec in specs) == [["10.88.0.2/32"], ["10.88.0.3/32"]]
    assert rig.held() == {}  # nothing of ours is taken
    assert leases(data) == {"10.88.0.2", "10.88.0.3"}
    rig.call("CHECK", one, conf | {"prevResult": first}).ok()
    for pod in (one, two):
        for _ in range(2):
            rig.call("DEL", pod, conf).ok()
    assert leases(data) == set()


def test_routes_and_dns_of_the_plugin(rig: Rig, data: Path, tmp_path: Path) -> None:
    resolv = tmp_path / "resolv"
    resolv.write_text("nameserver 10.96.0.10\nsearch example\n")
    routes = [{"dst": "10.0.0.0/8"}, {"dst": "192.0.2.0/24", "gw": "10.88.0.1"}]
    conf = host_local(data, routes=routes, resolvConf=str(resolv))
    pod = rig.container()
    result = rig.call("ADD", pod, conf).ok()
    assert [route["dst"] for route in result["routes"]][1:] == ["10.0.0.0/8", "192.0.2.0/24"]
    assert result["dns"] == {"nameservers": ["10.96.0.10"], "search": ["example"]}
    table = pod.run("ip", "route").stdout
    assert "10.0.0.0/8 via 169.254.1.1" in table
    assert "default" not in table
    rig.call("CHECK", pod, conf | {"prevResult": result}).ok()
    pod.run("ip", "route", "del", "10.0.0.0/8")
    assert rig.call("CHECK", pod, conf | {"prevResult": result}).error == NOT_AS_ADDED
    rig.call("DEL", pod, conf).ok()


def test_both_families_from_the_nodes_own_ranges(rig: Rig, data: Path) -> None:
    key = Key("Node", NODE)
    ranges = [[{"subnet": "usePodCidr"}], [{"subnet": "usePodCidrIPv6"}]]
    conf = host_local(data, ranges=ranges)
    pod = rig.container()
    answer = rig.call("ADD", pod, conf)
    assert answer.error == INVALID_CONFIGURATION
    assert "ipam.ranges[0][0].subnet" in answer.json["msg"]
    rig.create("Node", NODE, spec={}, status={"podCIDRs": ["10.89.3.0/24", "fd00:89:3::/64"]})
    try:
        result = rig.call("ADD", pod, conf).ok()
        assert addresses(result) == ["10.89.3.2/32", "fd00:89:3::2/128"]
        rig.call("CHECK", pod, conf | {"prevResult": result}).ok()
    finally:
        rig.store.delete(key)
    rig.call("DEL", pod, conf).ok()  # without the Node


def test_addresses_in_old_words(rig: Rig, data: Path) -> None:
    """Of 0.2.0, both those of the other plugin and ours."""
    conf = host_local(data) | {"cniVersion": "0.2.0"}
    pod = rig.container()
    result = rig.call("ADD", pod, conf).ok()
    assert result["ip4"]["ip"].endswith("/32")
    assert result["ip4"]["gateway"] == "169.254.1.1"
    rig.call("DEL", pod, conf).ok()
    assert leases(data) == set()


def test_an_address_by_static(rig: Rig) -> None:
    ipam = {"type": "static", "addresses": [{"address": "10.90.0.7/24"}]}
    conf = configuration(VERSION, ipam=ipam)
    pod = rig.container()
    assert addresses(rig.call("ADD", pod, conf).ok()) == ["10.90.0.7/32"]
    rig.call("DEL", pod, conf).ok()


def test_a_sandbox_with_addresses_of_its_own_takes_over(rig: Rig, data: Path) -> None:
    """Nothing of the older one, whose addresses were another plugin's, stays on the endpoint."""
    old, new = rig.container("web"), rig.container("web")
    rig.call("ADD", old, host_local(data)).ok()
    (endpoint,) = rig.endpoints().values()
    assert old.id in str(endpoint["metadata"]["annotations"])
    (name,) = rig.endpoints()
    key = Key("WorkloadEndpoint", name, "red")
    annotations = endpoint["metadata"]["annotations"] | {"someone": "else"}
    rig.store.update(
        key, endpoint | {"metadata": endpoint["metadata"] | {"annotations": annotations}}
    )
    rig.add(new)
    (endpoint,) = rig.endpoints().values()
    assert endpoint["spec"]["containerID"] == new.id
    assert endpoint["metadata"]["annotations"] == {"someone": "else"}
    rig.call("DEL", old, host_local(data)).ok()
    assert len(rig.endpoints()) == 1
    rig.delete(new)
    assert leases(data) == set()


def test_a_failed_add_gives_the_address_back(rig: Rig, data: Path) -> None:
    pod = rig.container()
    pod.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    assert rig.call("ADD", pod, host_local(data)).error == 4
    assert leases(data) == set()
    assert rig.endpoints() == {}


def test_an_add_after_one_that_was_cut_off(rig: Rig, data: Path) -> None:
    """host-local refuses a container that has an address: it is released and asked again."""
    pod = rig.container()
    conf = host_local(data)
    rig.call("ADD", pod, conf).ok()
    again = rig.call("ADD", pod, conf).ok()
    assert leases(data) == {addresses(again)[0].split("/")[0]}
    rig.call("CHECK", pod, conf | {"prevResult": again}).ok()
    rig.call("DEL", pod, conf).ok()


def test_the_daemon_dies_while_the_plugin_runs(rig: Rig, data: Path, tmp_path: Path) -> None:
    """An address is taken, and nobody heard of it: the ADD that is sent again gets another."""
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    text = f"""if [ $CNI_COMMAND = ADD ] && mkfifo {gate} 2>/dev/null; then
    {REFERENCE}/host-local; : >{begun}; read x <{gate}; exit 0
fi
exec {REFERENCE}/host-local"""
    script(tmp_path, "late", text)
    conf = host_local(data) | {"ipam": host_local(data)["ipam"] | {"type": "late"}}
    pod = rig.container()
    waiting = rig.begin("ADD", pod, conf, CNI_PATH=str(tmp_path))
    eventually(begun.exists)
    rig.kill()
    rig.start()
    answer = rig.end(waiting)
    if answer.code:  # on a busy machine the client has given up before the daemon was back
        answer = rig.call("ADD", pod, conf, CNI_PATH=str(tmp_path))
    result = answer.ok()
    gate.write_text("go\n")  # the plugin of the first daemon ends
    assert leases(data) == {addresses(result)[0].split("/")[0]}
    rig.call("CHECK", pod, conf | {"prevResult": result}, CNI_PATH=str(tmp_path)).ok()
    rig.call("DEL", pod, conf, CNI_PATH=str(tmp_path)).ok()


def test_the_plugins_error_is_passed_on(rig: Rig, data: Path) -> None:
    pod = rig.container()
    conf = host_local(data, rangeStart="10.99.0.1")
    answer = rig.call("ADD", pod, conf)
    assert answer.code == 1
    assert "host-local" in answer.json["msg"]
    assert "10.99.0.1" in answer.json["msg"] + answer.json["details"]


BAD = {
    "no result": ("exit 0", ADDRESSES, "no address"),
    "no JSON": ("echo hello", ADDRESSES, "hello"),
    "no words": ("exit 3", ADDRESSES, "exit status 3"),
    "own code": ("""echo '{"code": 123, "msg": "so it is"}'; exit 1""", 123, "so it is"),
    "no object": ("echo '[]'", ADDRESSES, "result"),
    "no addresses": ("""echo '{"ips": []}'""", ADDRESSES, "no address"),
    "bad address": ("""echo '{"ips": [{"address": "x"}]}'""", ADDRESSES, "'x'"),
    "bad route": (
        """echo '{"ips": [{"address": "10.1.1.1/24"}], "routes": [{"dst": "x"}]}'""",
        ADDRESSES,
        "'x'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plugin(rig: Rig, tmp_path: Path, name: str) -> None:
    text, code, word = BAD[name]
    script(tmp_path, "bad", text)
    pod = rig.container()
    answer = rig.call("ADD", pod, configuration(ipam={"type": "bad"}), CNI_PATH=str(tmp_path))
    assert answer.error == code
    assert word in answer.json["msg"]


def directly(directory: Path, kind: str) -> delegate.Delegate:
    """A plugin of ``directory``, called without the daemon."""
    variables = {"CNI_PATH": str(directory), "CNI_CONTAINERID": "x", "CNI_IFNAME": "eth0"}
    return delegate.Delegate(kind, variables, b"{}", lambda: ())


def test_a_plugin_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegate, "SECONDS", 2)  # in which it begins
    script(tmp_path, "hangs", f"echo $$ >{tmp_path}/pid; sleep 1000")
    with pytest.raises(CniError, match="hangs ADD") as caught:
        directly(tmp_path, "hangs").add()
    assert caught.value.code == TRY_AGAIN_LATER
    pid = (tmp_path / "pid").read_text().strip()
    eventually(lambda: not Path("/proc", pid).exists())


def test_so_many_and_no_more_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegate, "PATIENCE", 0.01)
    script(tmp_path, "quick", "exit 0")
    for _ in range(delegate.AT_ONCE):
        delegate.RUNS.acquire()
    try:
        with pytest.raises(CniError, match="have not ended") as caught:
            directly(tmp_path, "quick").delete()
    finally:
        delegate.RUNS.release(delegate.AT_ONCE)
    assert caught.value.code == TRY_AGAIN_LATER
    directly(tmp_path, "quick").delete()


SCALARS = st.none() | st.integers() | st.text(max_size=8)
WORDS = SCALARS | st.sampled_from(["10.1.1.1/24", "fd00::1/64", "0.0.0.0/0", "::/0"])
ENTRIES = st.dictionaries(st.sampled_from(["address", "dst", "gw", "interface"]), WORDS)
RESULTS = st.dictionaries(
    st.sampled_from(["ips", "routes", "dns", "interfaces", "cniVersion"]),
    WORDS | st.lists(ENTRIES, max_size=3) | ENTRIES,
)


@given(RESULTS | WORDS | st.lists(WORDS))
def test_whatever_a_plugin_says_is_a_lease_or_refused(answer: object) -> None:
    try:
        lease = parse_lease(answer)
    except ValueError:
        return
    assert lease.addresses
    assert all(net.is_host for net in lease.addresses)
    assert {net.version for net in lease.routes} <= {net.version for net in lease.addresses}


def test_others_do_not_wait_for_a_slow_plugin(rig: Rig, tmp_path: Path) -> None:
    """While a plugin hangs, pods with addresses of ours come and go; then it ends as it would."""
    fifo = tmp_path / "fifo"
    begun = tmp_path / "begun"
    script(
        tmp_path,
        "slow",
        f"""case $CNI_COMMAND in ADD) : >{begun}; mkfifo {fifo}; read x <{fifo}
echo '{{"ips": [{{"address": "10.91.0.5/24"}}]}}';; esac""",
    )
    conf = configuration(ipam={"type": "slow"})
    slow, other = rig.container(), rig.container()
    waiting = rig.begin("ADD", slow, conf, CNI_PATH=str(tmp_path))
    eventually(lambda: begun.exists() and fifo.exists())
    rig.add(other)
    rig.delete(other)
    assert waiting.poll() is None
    fifo.write_text("go\n")
    assert addresses(rig.end(waiting).ok()) == ["10.91.0.5/32"]
    rig.call("DEL", slow, conf, CNI_PATH=str(tmp_path)).ok()


def told(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_status_and_gc_reach_the_plugin(rig: Rig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script(
        tmp_path,
        "witness",
        f"""echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >>{log}
case $CNI_COMMAND in
ADD) echo '{{"ips": [{{"address": "10.92.0.5/24"}}]}}';;
STATUS) echo '{{"code": 50, "msg": "not today"}}'; exit 1;;
esac""",
    )
    conf = configuration(ipam={"type": "witness"})

    def call(command: str, pod: Container | None = None, valid: Any = None) -> Answer:
        return rig.call(command, pod, conf | {VALID_ATTACHMENTS: valid}, CNI_PATH=str(tmp_path))

    pod = rig.container()
    call("ADD", pod).ok()
    status = call("STATUS")
    assert status.error == NOT_AVAILABLE
    assert "not today" in status.json["msg"]
    call("GC", valid=[{"containerID": pod.id, "ifname": "eth0"}]).ok()
    assert len(rig.links()) == 1
    pod.namespace.close()  # takes the interface along, so only the endpoint tells of it
    eventually(lambda: rig.links() == set())
    call("GC", valid=[]).ok()
    assert told(log) == [f"ADD {pod.id} eth0", "STATUS  ", "GC  ", f"DEL {pod.id} eth0", "GC  "]


def test_without_the_executable(rig: Rig) -> None:
    pod = rig.container()
    conf = configuration(ipam={"type": "nowhere"})
    for command in ("ADD", "DEL"):
        answer = rig.call(command, pod, conf, CNI_PATH=REFERENCE)
        assert answer.error == INVALID_CONFIGURATION
        assert REFERENCE in json.dumps(answer.json)
    assert rig.call("STATUS", conf=conf).error == NOT_AVAILABLE


def test_a_pod_that_names_its_addresses(rig: Rig, data: Path) -> None:
    """The plugin chooses addresses itself; it is not asked where no IPAM is to be."""
    prefix = "cni.projectcalico.org/"
    conf = host_local(data) | {"feature_control": {"ip_addrs_no_ipam": True}}
    for name, annotation in (("specific", "ipAddrs"), ("outside", "ipAddrsNoIpam")):
        annotations = {prefix + annotation: '["10.88.0.77"]'}
        rig.create("Pod", name, "red", metadata={"annotations": annotations}, spec={})
    refused = rig.call("ADD", rig.container("specific"), conf)
    assert refused.error == ANNOTATIONS
    assert "host-local" in refused.json["msg"]
    pod = rig.container("outside")
    result = rig.call("ADD", pod, conf).ok()
    assert addresses(result) == ["10.88.0.77/32"]
    assert leases(data) == set()
    rig.call("CHECK", pod, conf | {"prevResult": result}).ok()
    rig.call("DEL", pod, conf).ok()
    for name in ("specific", "outside"):
        rig.store.delete(Key("Pod", name, "red"))
