"""What pods may ask for by annotation: what it means, and what is told when it can't be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.endpoint import QoSControls
from api.net import V4, V6, parse_net
from api.qos import quantity
from cni.errors import ANNOTATIONS, CniError
from cni.features import PREFIX, Allowed, Features, read

BOTH = ((V4, ("conf",)), (V6, ()))
ALL = Allowed(outside_ipam=True, floating=True)


def ask(
    own: dict[str, Any], namespace: dict[str, str] | None = None, allowed: Allowed = ALL
) -> Features:
    """Read annotations; values that are no texts are written as JSON."""
    texts = {
        name if "/" in name else PREFIX + name: v if isinstance(v, str) else json.dumps(v)
        for name, v in own.items()
    }
    return read("red/web", texts, namespace or {}, BOTH, allowed)


def test_nothing_asked() -> None:
    assert ask({}) == Features(BOTH)
    assert ask({"ipAddrs": "", "ipv4pools": "", "hwAddr": "", "floatingIPs": ""}) == Features(BOTH)


def test_pools_of_pod_namespace_and_configuration() -> None:
    namespace = {PREFIX + "ipv4pools": '["ns"]', PREFIX + "ipv6pools": '["ns6"]'}
    assert dict(ask({}, namespace).families) == {V4: ("ns",), V6: ("ns6",)}
    own = {"ipv4pools": ["10.0.0.0/8", "b"]}
    assert dict(ask(own, namespace).families) == {V4: ("10.0.0.0/8", "b"), V6: ("ns6",)}
    assert dict(ask({"ipv6pools": ["x"]}).families) == {V4: ("conf",), V6: ("x",)}
    assert ask({"ipFamilies": ["IPv6"]}, namespace).families == ((V6, ("ns6",)),)
    assert ask({"ipFamilies": ["IPv6", "IPv4"]}).versions == {V4, V6}


def test_addresses() -> None:
    four, six = parse_net("10.65.0.7"), parse_net("fd00::7")
    asked = ask({"ipAddrs": ["fd00::7", "10.65.0.7"]})
    assert asked.addresses == (four, six)
    assert not asked.outside_ipam
    assert ask({"ipAddrsNoIpam": ["10.65.0.7"]}).outside_ipam
    assert ask({"ipAddrs": ["10.65.0.7"]}).versions == {V4}
    floating = ask({"floatingIPs": ["192.0.2.7"]})
    assert floating.nats([four, six]) == [(parse_net("192.0.2.7"), four)]


def test_what_else_a_pod_may_ask_for() -> None:
    assert ask({"hwAddr": "02-00-5E-10-00-01"}).mac == "02:00:5e:10:00:01"
    sources = ask({"allowedSourcePrefixes": ["192.0.2.9/24", "fd00::/64"]}).sources
    assert sources == (parse_net("192.0.2.0/24"), parse_net("fd00::/64"))
    limited = ask(
        {"qos.projectcalico.org/egressBandwidth": "10M", "kubernetes.io/ingress-bandwidth": "1G"}
    )
    assert limited.controls["egressBandwidth"] == 10_000_000
    assert limited.controls["ingressBandwidth"] == 1_000_000_000
    QoSControls.model_validate(limited.controls)


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"ipAddrs": "10.65.0.7"}, ["ipAddrs", "10.65.0.7", "JSON list"]),
    ({"ipAddrs": []}, ["ipAddrs", "one address"]),
    ({"ipAddrs": ["10.65.0.0/24"]}, ["ipAddrs", "10.65.0.0/24"]),
    ({"ipAddrs": ["10.65.0.7", "10.65.0.8"]}, ["ipAddrs", "each IP version"]),
    ({"ipAddrs": ["127.0.0.1"]}, ["ipAddrs"]),
    ({"ipAddrs": ["10.0.0.1"], "ipAddrsNoIpam": ["10.0.0.1"]}, ["ipAddrs", "not both"]),
    ({"ipAddrsNoIpam": ["224.0.0.1"]}, ["ipAddrsNoIpam"]),
    ({"ipAddrsNoIpam": ["169.254.1.1"]}, ["ipAddrsNoIpam"]),
    ({"ipv4pools": "pool"}, ["ipv4pools", "'pool'", "JSON list"]),
    ({"ipv6pools": [1]}, ["ipv6pools", "[1]"]),
    ({"ipFamilies": ["IPv5"]}, ["ipFamilies", "IPv5", '["IPv4"]']),
    ({"ipFamilies": []}, ["ipFamilies"]),
    ({"hwAddr": "01:00:5e:00:00:01"}, ["hwAddr", "01:00:5e:00:00:01", "unicast"]),
    ({"hwAddr": "00:00:00:00:00:00"}, ["hwAddr"]),
    ({"hwAddr": "02:00:5e"}, ["hwAddr"]),
    ({"allowedSourcePrefixes": ["x"]}, ["allowedSourcePrefixes", "CIDR"]),
    ({"floatingIPs": ["fd00::1"], "ipFamilies": ["IPv4"]}, ["floatingIPs", "IPv6"]),
    ({"floatingIPs": ["0.0.0.0"]}, ["floatingIPs"]),
    ({"qos.projectcalico.org/ingressBandwidth": "fast"}, ["ingressBandwidth", "'fast'", "1k"]),
    ({"qos.projectcalico.org/ingressBandwidth": "1P1"}, ["ingressBandwidth"]),
    ({"qos.projectcalico.org/ingressBurst": "1M"}, ["ingressBurst", "ingressBandwidth"]),
    ({"qos.projectcalico.org/dscp": "99"}, ["dscp", "'99'", "63"]),
    ({"kubernetes.io/egress-bandwidth": "1"}, ["kubernetes.io/egress-bandwidth", "'1'"]),
]  # fmt: skip


@pytest.mark.parametrize(("own", "words"), WRONG)
def test_what_is_wrong_is_told(own: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CniError) as raised:
        ask(own)
    assert raised.value.code == ANNOTATIONS
    for word in ("pod red/web", *words):
        assert word in raised.value.msg


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(CniError) as raised:
        ask({"hwAddr": "x", "ipFamilies": "y"}, {PREFIX + "ipv4pools": "z"})
    assert all(word in raised.value.msg for word in ("'x'", "'y'", "'z'", "of its namespace"))


@pytest.mark.parametrize(
    ("name", "switch"), [("ipAddrsNoIpam", "ip_addrs_no_ipam"), ("floatingIPs", "floating_ips")]
)
def test_what_must_be_permitted(name: str, switch: str) -> None:
    with pytest.raises(CniError, match=f"feature_control.{switch}"):
        ask({name: ["192.0.2.7"]}, allowed=Allowed())


NAMES = [
    "ipAddrs", "ipAddrsNoIpam", "ipv4pools", "ipv6pools", "ipFamilies", "floatingIPs", "hwAddr",
    "allowedSourcePrefixes", "qos.projectcalico.org/ingressBandwidth",
    "qos.projectcalico.org/ingressPeakrate", "qos.projectcalico.org/dscp",
]  # fmt: skip
VALUES = (
    st.text(max_size=20)
    | st.lists(st.text(max_size=10) | st.integers() | st.none(), max_size=3).map(json.dumps)
    | st.sampled_from(["[", "{}", "null", '["10.0.0.1"]', '["IPv4"]', "1e99", "9" * 5000, "\ud800"])
)


@settings(max_examples=300, deadline=None)
@given(own=st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_any_annotation_is_understood_or_refused(own: dict[str, str]) -> None:
    try:
        features = ask(own)
    except CniError as error:
        assert error.code == ANNOTATIONS
        return
    assert features.versions <= {V4, V6}
    assert len(features.addresses) <= 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("10M", 10**7), ("1.5Gi", 3 << 29), ("1e6", 10**6), ("100m", 1), (".5k", 500), ("5.", 5)],
)
def test_quantities(text: str, value: int) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "x", "1.2.3", "-1", "1KiB", "1 M", "1e999", "9" * 40, "½"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        quantity(text)
