"""``manx-ipam`` by itself, and under ``ptp`` and ``bridge`` of the reference set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.call import parse_call
from cni.config import VALID_ATTACHMENTS
from cni.errors import (
    ADDRESSES,
    INTERNAL,
    INVALID_CONFIGURATION,
    NOT_AS_ADDED,
    TRY_AGAIN_LATER,
)
from cni.ipam_plugin import IpamPlugin
from cni.node import Node
from datastore.interface import JSON
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from kernel.links import delete_link
from kernel.netlink import NetlinkSocket
from kernel.netns import inside
from tests.cni.rig import NETWORK, NODE, Answer, Container, Rig, configuration, running
from tests.ipam.world import Interposed, add_pool, until, until_heard

REFERENCE = "/usr/lib/cni"
VERSION = "1.0.0"  # the newest that Debian's plugins speak
POOL = "10.66.0.0/24"
BLOCK_SIZE = 29  # eight addresses, of which five are for containers
DEFAULT_ROUTE = [{"dst": "0.0.0.0/0"}]


class Caller:
    """Runs a plugin of ``bin_dir`` or the reference set, as a runtime or a main plugin does."""

    def __init__(self, rig: Rig, bin_dir: Path) -> None:
        self.rig = rig
        self.bin_dir = bin_dir

    def __call__(
        self, command: str, pod: Container | None, conf: JSON, plugin: str = "manx-ipam"
    ) -> Answer:
        environment = {
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": command,
            "CNI_PATH": f"{self.bin_dir}:{REFERENCE}",
            "MANX_CNI_SOCKET": str(self.rig.socket),
        }
        if pod is not None:
            environment |= {
                "CNI_CONTAINERID": pod.id,
                "CNI_IFNAME": pod.ifname,
                "CNI_NETNS": pod.netns,
                "CNI_ARGS": pod.arguments,
            }
        program = self.bin_dir / plugin if plugin == "manx-ipam" else Path(REFERENCE, plugin)
        with inside(self.rig.namespace.fd):
            done = subprocess.run(
                [program],
                env=environment,
                input=json.dumps(conf).encode(),
                capture_output=True,
                timeout=100,
                check=False,
            )
        return Answer(done.returncode, done.stdout)


@pytest.fixture(scope="module")
def _subnet_node(c_client: Path) -> Iterator[Rig]:
    with running(c_client, pool="10.67.0.0/24") as rig:
        rig.create("IPPool", "subnets", spec={"cidr": POOL, "blockSize": BLOCK_SIZE})
        rig.create("IPPool", "six", spec={"cidr": "fd00:66::/112"})
        yield rig


@pytest.fixture
def call(_subnet_node: Rig, client: Path, tmp_path: Path) -> Iterator[Caller]:
    """The plugin under its name, as each client; afterwards no container holds anything."""
    shutil.copy(client, tmp_path / "manx-ipam")
    caller = Caller(_subnet_node, tmp_path)
    yield caller
    left = held(_subnet_node)
    caller("GC", None, conf("1.1.0") | {VALID_ATTACHMENTS: []})
    assert left == {}


def conf(version: str = VERSION, **ipam: Any) -> JSON:
    """A main plugin's configuration, as the IPAM plugin gets it too."""
    ipam = {"type": "manx-ipam", "ipv4_pools": ["subnets"], **ipam}
    return configuration(version) | {"type": "bridge", "ipam": ipam}


def held(rig: Rig) -> dict[str, int]:
    """How many addresses each container has."""
    return {k: n for k, n in rig.held().items() if not k.startswith("manx-ipam-subnet")}


def addresses(result: Any) -> list[str]:
    return [entry["address"] for entry in result["ips"]]


def test_the_runtime_asks_for_an_address(call: Caller) -> None:
    pod, other, third = (call.rig.container() for _ in range(3))
    pod.arguments += ";IP=10.66.0.27"
    result = call("ADD", pod, conf()).ok()
    assert addresses(result) == ["10.66.0.27/29"]
    assert result["ips"][0]["gateway"] == "10.66.0.25"
    assert call("ADD", pod, conf()).ok() == result
    assert call("ADD", other, conf() | {"args": {"cni": {"ips": ["10.66.0.27"]}}}).error == 100
    third.arguments += ";IP=10.66.0.25"  # the gateway's
    assert call("ADD", third, conf()).error == 100
    for each in (pod, other, third):
        call("DEL", each, conf()).ok()


def test_the_result_in_old_words(call: Caller) -> None:
    pod = call.rig.container()
    result = call("ADD", pod, conf("0.2.0", routes=DEFAULT_ROUTE)).ok()
    assert result["ip4"]["ip"].endswith(f"/{BLOCK_SIZE}")
    assert result["ip4"]["routes"] == DEFAULT_ROUTE
    call("DEL", pod, conf("0.2.0")).ok()


def test_the_result_is_that_of_an_ipam_plugin(call: Caller) -> None:
    pod = call.rig.container()
    configured = conf(routes=[*DEFAULT_ROUTE, {"dst": "10.0.0.0/8", "gw": "10.66.0.5"}])
    result = call("ADD", pod, configured).ok()
    assert set(result) == {"cniVersion", "ips", "routes", "dns"}  # no interfaces
    (entry,) = result["ips"]
    assert entry["address"].endswith(f"/{BLOCK_SIZE}")  # the block's mask
    network = ip_interface(entry["address"]).network
    assert entry["gateway"] == str(network[1])
    assert result["routes"] == configured["ipam"]["routes"]
    assert call("ADD", pod, configured).ok() == result  # the same again
    previous = configured | {"prevResult": result}
    call("CHECK", pod, previous).ok()
    other = configured | {"prevResult": result | {"ips": []}}
    assert call("CHECK", pod, other).error == NOT_AS_ADDED
    call("STATUS", None, conf("1.1.0")).ok()
    for _ in range(2):
        assert call("DEL", pod, configured).ok() is None
    assert call("CHECK", pod, previous).error == NOT_AS_ADDED


def test_versions(call: Caller) -> None:
    assert "1.1.0" in call("VERSION", None, conf()).ok()["supportedVersions"]
    pod = call.rig.container()
    result = call("ADD", pod, conf("0.4.0")).ok()
    assert (result["cniVersion"], result["ips"][0]["version"]) == ("0.4.0", "4")
    call("DEL", pod, conf("0.4.0")).ok()


def test_both_families(call: Caller) -> None:
    pod = call.rig.container()
    result = call("ADD", pod, conf(assign_ipv6=True, ipv6_pools=["six"])).ok()
    four, six = result["ips"]
    assert four["address"].endswith(f"/{BLOCK_SIZE}")
    assert six["address"].endswith("/122")
    assert six["gateway"].startswith("fd00:66:")
    call("DEL", pod, conf()).ok()


def test_when_one_family_fails_the_other_is_released(call: Caller) -> None:
    pod = call.rig.container()
    answer = call("ADD", pod, conf(assign_ipv6=True, ipv6_pools=["nowhere"]))
    assert answer.error == ADDRESSES


def test_a_repeated_add_that_fails_takes_nothing_away(call: Caller) -> None:
    """The container runs with what the first ADD gave; nobody else may have that."""
    pod, path = call.rig.container(), call.rig.directory / "datastore.db"
    result = call("ADD", pod, conf()).ok()
    before = held(call.rig)
    wanted = conf(assign_ipv6=True, ipv6_pools=["nowhere"])
    assert call("ADD", pod, wanted).error == ADDRESSES
    assert held(call.rig) == before
    path.rename(path.with_suffix(".away"))
    try:
        assert call("ADD", pod, conf(assign_ipv6=True, ipv6_pools=["six"])).error == TRY_AGAIN_LATER
    finally:
        path.with_suffix(".away").rename(path)
    assert held(call.rig) == before
    both = call("ADD", pod, conf(assign_ipv6=True, ipv6_pools=["six"])).ok()
    assert addresses(both)[0] == addresses(result)[0]
    call("CHECK", pod, conf() | {"prevResult": both}).ok()
    call("DEL", pod, conf()).ok()


def test_no_container_gets_what_a_subnet_keeps(call: Caller) -> None:
    """Twelve containers, blocks of eight: never a first, second or last address of a block."""
    pods = [call.rig.container() for _ in range(12)]
    given = [addresses(call("ADD", pod, conf()).ok())[0] for pod in pods]
    assert len(set(given)) == 12
    ordinals = {int(address.split("/")[0].split(".")[3]) % 8 for address in given}
    assert ordinals <= {2, 3, 4, 5, 6}
    for pod in pods:
        call("DEL", pod, conf()).ok()


def test_an_add_that_was_cut_off_before_the_block_was_a_subnet(call: Caller, client: Path) -> None:
    """The container holds the block's first address, and does not keep it."""
    rig, pod = call.rig, call.rig.container()
    pool, net = f"cut-{client.name}", f"10.69.{len(client.name)}"
    rig.create("IPPool", pool, spec={"cidr": f"{net}.0/24"})
    cut_off = Allocator(rig.store, NODE).assign(f"{NETWORK}.{pod.id}", {"node": NODE}, pools=[pool])
    assert cut_off.address == cut_off.block._replace(length=32)
    (address,) = addresses(call("ADD", pod, conf(ipv4_pools=[pool])).ok())
    assert address.split("/")[0] != str(cut_off.address).split("/")[0]
    assert set(rig.held().values()) >= {3}  # what the subnet keeps
    call("DEL", pod, conf()).ok()


def test_many_at_once(call: Caller) -> None:
    """New blocks become subnets while others take addresses of them."""
    pods = [call.rig.container() for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pod: call("ADD", pod, conf()), pods))
    given = {addresses(answer.ok())[0] for answer in answers}
    assert len(given) == 16
    ordinals = {int(address.split("/")[0].split(".")[3]) % 8 for address in given}
    assert ordinals <= {2, 3, 4, 5, 6}
    with ThreadPoolExecutor(16) as pool:
        released = list(pool.map(lambda pod: call("DEL", pod, conf()), pods))
    assert all(answer.code == 0 for answer in released)


def test_what_an_add_reads(tmp_path: Path) -> None:
    """Where the store is followed a further ADD lists nothing, however large the cluster is."""
    seen = Interposed(SqliteDatastore(tmp_path / "datastore.db"))
    add_pool(seen, "subnets", POOL, 29)
    node = Node(seen, NODE, follow=True)
    node.start()
    try:
        until(lambda: node.allocator.following)
        plugin = IpamPlugin(node.cluster, node.allocator)

        def add(number: int) -> Any:
            environment = {
                "CNI_COMMAND": "ADD",
                "CNI_CONTAINERID": f"c{number}",
                "CNI_IFNAME": "eth0",
                "CNI_NETNS": "/x",
            }
            return plugin.answer(parse_call(environment, json.dumps(conf()).encode()))

        assert add(0)["ips"][0]["address"].startswith("10.66.0.")
        until_heard(node.allocator, seen)  # of its own claim, which it looks at anew
        add(1)
        seen.reads = seen.writes = 0
        seen.listed.clear()
        add(2)
        assert (seen.reads, seen.writes, seen.listed) == (1, 2, [])
        given = {entry["address"] for number in range(3, 24) for entry in add(number)["ips"]}
        assert len(given) == 21  # of several blocks
        with ThreadPoolExecutor(8) as pool:
            more = [answer["ips"][0]["address"] for answer in pool.map(add, range(24, 64))]
        assert len(given | set(more)) == 61
        ordinals = {int(text.split("/")[0].split(".")[3]) % 8 for text in (*given, *more)}
        assert ordinals == {2, 3, 4, 5, 6}
    finally:
        node.stop()
        seen.close()


def test_gc_releases_what_is_not_listed(call: Caller) -> None:
    one, two = call.rig.container(), call.rig.container(pod=False)
    for pod in (one, two):
        call("ADD", pod, conf()).ok()
    assert call("GC", None, conf("1.1.0")).error == INVALID_CONFIGURATION
    listed = [{"containerID": two.id, "ifname": "eth0"}]
    call("GC", None, conf("1.1.0") | {VALID_ATTACHMENTS: listed}).ok()
    assert list(held(call.rig)) == [f"{NETWORK}.{two.id}"]
    call("GC", None, conf("1.1.0") | {"name": "other", VALID_ATTACHMENTS: []}).ok()
    assert len(held(call.rig)) == 1
    call("GC", None, conf("1.1.0") | {VALID_ATTACHMENTS: []}).ok()


def test_a_daemon_that_restarts_leaves_them_alone(call: Caller) -> None:
    """They have neither endpoint nor interface of ours, and are no leftovers all the same."""
    pod = call.rig.container()
    result = call("ADD", pod, conf()).ok()
    call.rig.kill()
    call.rig.start()
    call("CHECK", pod, conf() | {"prevResult": result}).ok()
    call("GC", None, conf("1.1.0") | {"type": "manx", "name": "other", VALID_ATTACHMENTS: []}).ok()
    assert len(held(call.rig)) == 1
    call("DEL", pod, conf()).ok()


def test_a_pool_shared_with_routed_pods_is_refused(call: Caller, client: Path) -> None:
    """The gateway of a subnet, or what the subnet keeps for itself, can't be a pod's address."""
    rig, routed = call.rig, call.rig.container()
    rig.create("IPPool", client.name, spec={"cidr": f"10.68.{len(client.name)}.0/24"})
    rig.add(routed, ipam={"type": "manx-ipam", "ipv4_pools": [client.name]})
    answer = call("ADD", rig.container(), conf(ipv4_pools=[client.name]))
    assert answer.error == ADDRESSES
    assert "IPPool of their own" in answer.json["msg"]
    rig.delete(routed)


def test_another_plugins_configuration_is_refused(call: Caller) -> None:
    configured = conf() | {"ipam": {"type": "host-local"}}
    answer = call("ADD", call.rig.container(), configured)
    assert answer.error == INVALID_CONFIGURATION


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["subnets", "10.66.0.0/24", "::/0"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["dst", "gw", "address", "containerID"]), inner)
    ),
    max_leaves=4,
)
IPAM_KEYS = ["assign_ipv4", "assign_ipv6", "ipv4_pools", "ipv6_pools", "routes", "subnet"]
KEYS = ["prevResult", VALID_ATTACHMENTS, "dns", "mtu", "ipam"]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.sampled_from(["ADD", "CHECK", "DEL", "GC", "STATUS"]),
    st.dictionaries(st.sampled_from(IPAM_KEYS), VALUES),
    st.dictionaries(st.sampled_from(KEYS), VALUES),
)
def test_fuzzed(call: Caller, command: str, ipam: dict[str, Any], keys: dict[str, Any]) -> None:
    """Every answer is a result or an error that was foreseen, and a DEL undoes it."""
    pod = call.rig.container()
    answer = call(command, pod, conf("1.1.0", **ipam) | keys)
    assert answer.code == 0 or answer.error != INTERNAL
    call("DEL", pod, conf()).ok()
    pod.namespace.close()


@pytest.mark.parametrize("main", ["ptp", "bridge"])
def test_under_a_main_plugin(call: Caller, main: str) -> None:
    """Containers wired by others have our addresses, and reach each other and the node."""
    rig = call.rig
    keys = {"bridge": f"br-{main}", "isGateway": True} if main == "bridge" else {}
    configured = conf(routes=DEFAULT_ROUTE) | {"type": main} | keys
    one, two = rig.container(), rig.container()
    results = [call("ADD", pod, configured, main).ok() for pod in (one, two)]
    for pod, result in zip((one, two), results, strict=True):
        call("CHECK", pod, configured | {"prevResult": result}, main).ok()
        assert pod.pings(result["ips"][0]["gateway"])
    assert one.pings(addresses(results[1])[0].split("/")[0])
    assert two.pings(addresses(results[0])[0].split("/")[0])
    assert len(held(rig)) == 2
    for pod in (one, two):
        call("DEL", pod, configured, main).ok()
    assert held(rig) == {}
    if main == "bridge":
        # it keeps its subnet, and the next client's containers may begin with another block
        with NetlinkSocket(netns_fd=rig.namespace.fd) as netlink:
            assert netlink.batch([delete_link(f"br-{main}")]) == []
