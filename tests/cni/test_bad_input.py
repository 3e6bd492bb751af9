"""Requests that are wrong: the code of the spec, words that name what is wrong, nothing left."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel.netns import Namespace, inside
from tests.cni.rig import Container, Rig, configuration
from tests.support.netns import eventually

CONFIGURATIONS: dict[str, tuple[Any, int, list[str]]] = {
    "not JSON": (b'{"cniVersion": "1.1.0"', 6, ["stdin", "JSON"]),
    "no object": (b"[]", 6, ["stdin", "object"]),
    "empty": (b" ", 6, ["stdin"]),
    "newer version": (configuration("2.0.0"), 1, ["cniVersion", "2.0.0", "1.1.0"]),
    "odd version": (configuration("0.5.0"), 1, ["cniVersion", "0.5.0", "0.1.0"]),
    "future version": (configuration("2.0.0"), 1, ["cniVersion", "2.0.0"]),
    "version of another type": (configuration() | {"cniVersion": 1}, 7, ["cniVersion", "1"]),
    "no name": ({"cniVersion": "1.1.0", "type": "manx"}, 7, ["name", "required"]),
    "bad name": (configuration() | {"name": "a/b"}, 7, ["name", "'a/b'"]),
    "long name": (configuration() | {"name": "a" * 65}, 7, ["name", "64"]),
    "MTU as text": (configuration(mtu="1500"), 7, ["mtu", "'1500'", "integer"]),
    "MTU too large": (configuration(mtu=65536), 7, ["mtu", "65536", "65535"]),
    "MTU too small": (configuration(mtu=67), 7, ["mtu", "67", "68"]),
    "other IPAM": (configuration(ipam={"type": "not-there"}), 7, ["ipam.type", "not-there"]),
    "IPAM by path": (configuration(ipam={"type": "../sh"}), 7, ["ipam.type", "../sh"]),
    "IPAM of another type": (configuration(ipam=[]), 7, ["ipam", "[]"]),
    "pools": (configuration(ipam={"ipv4_pools": ["a", 1]}), 7, ["ipam.ipv4_pools[1]", "1"]),
    "no family": (configuration(ipam={"assign_ipv4": "false"}), 7, ["ipam", "assign_ipv6"]),
    "switch": (configuration(ipam={"assign_ipv4": "yes"}), 7, ["ipam.assign_ipv4", "'yes'"]),
    "forwarding": (
        configuration(container_settings={"allow_ip_forwarding": "maybe"}),
        7,
        ["container_settings.allow_ip_forwarding", "'maybe'"],
    ),
    "features": (
        configuration(feature_control={"ip_addrs_no_ipam": 1}),
        7,
        ["feature_control.ip_addrs_no_ipam", "1"],
    ),
    "wait": (
        configuration(policy_setup_timeout_seconds=-1),
        7,
        ["policy_setup_timeout_seconds", "-1", "0"],
    ),
    "dns": (configuration(dns={"nameservers": "1.1.1.1"}), 7, ["dns.nameservers", "1.1.1.1"]),
    "previous": (configuration(prevResult={"ips": {}}), 7, ["prevResult.ips", "{}"]),
    "previous address": (
        configuration(prevResult={"ips": [{"address": "10.0.0.300/24"}]}),
        7,
        ["prevResult.ips[0].address", "10.0.0.300/24"],
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(rig: Rig, name: str) -> None:
    conf, code, words = CONFIGURATIONS[name]
    answer = rig.call("ADD", rig.container(), conf)
    assert answer.error == code
    assert all(word in answer.json["msg"] for word in words), answer.json


ENVIRONMENTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "command": ({"CNI_COMMAND": "REPLACE"}, ["CNI_COMMAND", "REPLACE", "ADD"]),
    "no container": ({"CNI_CONTAINERID": ""}, ["CNI_CONTAINERID"]),
    "container": ({"CNI_CONTAINERID": "../x"}, ["CNI_CONTAINERID", "../x"]),
    "long container": ({"CNI_CONTAINERID": "x" * 129}, ["CNI_CONTAINERID", "128"]),
    "container in newline": ({"CNI_CONTAINERID": "x\n"}, ["CNI_CONTAINERID"]),
    "no interface": ({"CNI_IFNAME": ""}, ["CNI_IFNAME"]),
    "long interface": ({"CNI_IFNAME": "x" * 16}, ["CNI_IFNAME", "15"]),
    "long interface in bytes": ({"CNI_IFNAME": "ä" * 8}, ["CNI_IFNAME", "15"]),
    "interface": ({"CNI_IFNAME": "a/b"}, ["CNI_IFNAME", "a/b"]),
    "dots": ({"CNI_IFNAME": ".."}, ["CNI_IFNAME", "'..'"]),
    "pattern": ({"CNI_IFNAME": "eth%d"}, ["CNI_IFNAME", "eth%d"]),
    "arguments": ({"CNI_ARGS": "K8S_POD_NAME"}, ["CNI_ARGS", "KEY=VALUE"]),
    "bad namespace": (
        {"CNI_ARGS": "K8S_POD_NAMESPACE=A;K8S_POD_NAME=x"},
        ["CNI_ARGS", "K8S_POD_NAMESPACE=A"],
    ),
    "pod": (
        {"CNI_ARGS": "K8S_POD_NAMESPACE=a;K8S_POD_NAME=../x"},
        ["CNI_ARGS", "K8S_POD_NAME=../x"],
    ),
    "no namespace": ({"CNI_NETNS": ""}, ["CNI_NETNS", "required"]),
    "namespace gone": ({"CNI_NETNS": "/no/such"}, ["CNI_NETNS", "/no/such", "No such file"]),
    "namespace is a file": ({"CNI_NETNS": "/etc/passwd"}, ["CNI_NETNS", "/etc/passwd"]),
    "namespace of another kind": ({"CNI_NETNS": "/proc/self/ns/uts"}, ["CNI_NETNS", "network"]),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(rig: Rig, name: str) -> None:
    variables, words = ENVIRONMENTS[name]
    answer = rig.call("ADD", rig.container(), None, **variables)
    assert answer.error == 4
    assert all(word in answer.json["msg"] for word in words), answer.json


def test_the_nodes_own_namespace(rig: Rig) -> None:
    netns = Container(rig.namespace, "x").netns
    answer = rig.call("ADD", rig.container(), None, CNI_NETNS=netns)
    assert answer.error == 4
    assert "CNI_NETNS" in answer.json["msg"]


@pytest.mark.parametrize(
    ("command", "version"), [("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0")]
)
def test_verbs_that_a_version_does_not_have(rig: Rig, command: str, version: str) -> None:
    answer = rig.call(command, rig.container(), configuration(version))
    assert answer.error == 1
    assert answer.json["cniVersion"] == version


def test_check_needs_the_result(rig: Rig) -> None:
    assert rig.call("CHECK", rig.container()).error == 7


def test_unknown_keys_are_left_alone(rig: Rig) -> None:
    pod = rig.container()
    rig.add(pod, args={"x": 1}, runtimeConfig={"y": []}, log_level="info", kubernetes=None)
    rig.delete(pod)


def test_interface_that_the_container_has(rig: Rig) -> None:
    pod = rig.container()
    pod.run("ip", "link", "add", "eth0", "type", "bridge")
    answer = rig.call("ADD", pod)
    assert answer.error == 4
    assert "eth0" in answer.json["msg"]
    assert pod.links() == {"eth0"}


def test_pools_that_are_full_or_missing(rig: Rig) -> None:
    rig.create("IPPool", "tiny", spec={"cidr": "10.67.0.0/32", "blockSize": 32})
    conf = configuration(ipam={"ipv4_pools": ["tiny"]})
    first, second = rig.container(), rig.container()
    rig.call("ADD", first, conf).ok()
    answer = rig.call("ADD", second, conf)
    assert answer.error == 100
    assert "tiny" in answer.json["msg"]
    assert second.links() == set()
    assert rig.call("ADD", second, configuration(ipam={"ipv4_pools": ["none"]})).error == 100
    rig.delete(first)


# Anything at all, over the socket and without a client.

NAMES = st.sampled_from(["", "eth0", "lo", "x" * 15, "é", "a b", "..", "net%d", "\x01"])
VARIABLES = st.fixed_dictionaries(
    {},
    optional={
        "CNI_COMMAND": st.sampled_from(["ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION", "add"]),
        "CNI_CONTAINERID": st.just("c1") | NAMES | st.text(max_size=140),
        "CNI_IFNAME": st.just("eth0") | NAMES | st.text(max_size=20),
        "CNI_ARGS": st.sampled_from(
            [
                "",
                ";",
                "=",
                "K8S_POD_NAME=a;K8S_POD_NAMESPACE=b",
                "IP=10.65.0.9;MAC=02:00:5e:10:00:01",
            ]
        )
        | st.text(max_size=50),
        "CNI_NETNS": st.text(max_size=20),
        "MANX_NETNS_ERROR": st.text(max_size=20),
    },
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ASKED = st.fixed_dictionaries(
    {
        "ips": JSON_VALUES
        | st.lists(
            st.sampled_from(["10.65.0.9", "10.65.0.10/24", "fd00::9", "::1", "x"]), max_size=3
        ),
        "mac": JSON_VALUES | st.sampled_from(["02:00:5e:10:00:01", "ff:ff:ff:ff:ff:ff"]),
        "dns": JSON_VALUES | st.just({"servers": ["10.0.0.10"]}),
    },
)
DOCUMENTS = st.fixed_dictionaries(
    {
        "cniVersion": st.sampled_from(["", "0.2.0", "0.3.1", "1.0.0", "1.1.0"]),
        "name": st.just("k8s-pod-network"),
        # 0, or nothing that could be waited for: no felix is there
        "policy_setup_timeout_seconds": st.just(0) | st.sampled_from([-1, "1", None, True]),
    },
    optional={
        "type": JSON_VALUES,
        "mtu": st.integers(-1, 70000) | JSON_VALUES,
        "ipam": JSON_VALUES | st.just({"type": "manx-ipam", "assign_ipv6": True}),
        "dns": JSON_VALUES,
        "prevResult": JSON_VALUES
        | st.fixed_dictionaries({"ips": JSON_VALUES, "interfaces": JSON_VALUES}),
        "cni.dev/valid-attachments": JSON_VALUES,
        "args": JSON_VALUES | st.fixed_dictionaries({"cni": JSON_VALUES | ASKED}),
        "runtimeConfig": JSON_VALUES | ASKED,
        "container_settings": JSON_VALUES | st.just({"allow_ip_forwarding": "true"}),
        "feature_control": JSON_VALUES | st.just({"floating_ips": True}),
    },
)
STDIN = DOCUMENTS.map(lambda document: json.dumps(document).encode()) | st.binary(max_size=60)


def ask(rig: Rig, data: bytes, descriptors: list[int]) -> bytes:
    """Send bytes to the daemon and return all it says."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(rig.socket))
        try:
            socket.send_fds(connection, [data or b"M"], descriptors)
            connection.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass  # it has heard enough
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def frame(variables: dict[str, str], stdin: bytes) -> bytes:
    environment = b"".join(
        f"{name}={value}".encode(errors="surrogatepass").replace(b"\0", b"") + b"\0"
        for name, value in variables.items()
    )
    return struct.pack(">4sII", b"MNX1", len(environment), len(stdin)) + environment + stdin


FUZZ = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(variables=VARIABLES, stdin=STDIN, with_netns=st.booleans())
def test_any_request_is_answered(
    rig: Rig, variables: dict[str, str], stdin: bytes, with_netns: bool
) -> None:
    with Namespace.create() as netns:
        answer = ask(rig, frame(variables, stdin), [netns.fd] if with_netns else [])
        magic, code, size = struct.unpack_from(">4sII", answer)
        output = answer[12:]
        assert (magic, size) == (b"MNX1", len(output))
        if code:
            report = json.loads(output)
            assert report["code"] != 999, report
            assert report["msg"]
        elif variables.get("CNI_COMMAND") == "ADD":
            json.loads(output)
            undone = ask(rig, frame(variables | {"CNI_COMMAND": "DEL"}, stdin), [])
            assert undone[4:8] == b"\0\0\0\0", undone
        rig.assert_empty()
        with inside(netns.fd):
            assert socket.if_nameindex() == [(1, "lo")]
    assert rig.daemon is not None
    assert rig.daemon.poll() is None


@FUZZ
@given(
    data=st.binary(max_size=40)
    | st.tuples(st.integers(0, 1 << 32), st.integers(0, 1 << 32), st.binary(max_size=40)).map(
        lambda parts: (
            b"MNX1"
            + (parts[0] % (1 << 32)).to_bytes(4, "big")
            + (parts[1] % (1 << 32)).to_bytes(4, "big")
            + parts[2]
        )
    ),
    files=st.integers(0, 6),
)
def test_any_bytes_are_survived(rig: Rig, data: bytes, files: int) -> None:
    descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(files)]
    try:
        ask(rig, data, descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert rig.daemon is not None
    assert rig.daemon.poll() is None


def test_no_descriptor_is_kept(rig: Rig) -> None:
    """Of many requests, good and bad, with descriptors that nobody asked for."""
    assert rig.daemon is not None
    folder = Path(f"/proc/{rig.daemon.pid}/fd")
    rig.call("STATUS")
    before = len(list(folder.iterdir()))
    with Namespace.create() as netns:
        for number in range(50):
            status = frame({"CNI_COMMAND": "STATUS"}, b"{}")
            ask(rig, status[: number % 20], [netns.fd] * (number % 7))
            ask(rig, status, [netns.fd] * (number % 7))
    # those of the last request are closed after its answer; a few more sockets for workers that
    # came meanwhile
    eventually(lambda: len(list(folder.iterdir())) < before + 10)
