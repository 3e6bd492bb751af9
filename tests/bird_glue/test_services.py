"""Which service addresses are announced: policies, ranges, endpoints, in any order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import Net, parse_net
from bird_glue.services import ServiceRanges, Services
from datastore.interface import JSON, Key

CLUSTER, EXTERNAL, BALANCER = (
    parse_net(text) for text in ("10.96.0.0/16", "203.0.113.0/24", "198.51.100.0/24")
)
CLUSTER6 = parse_net("fd00:96::/112")
RANGES = ServiceRanges((CLUSTER, CLUSTER6), (EXTERNAL,), (BALANCER,))
CLUSTER_IP, EXTERNAL_IP, BALANCER_IP = (
    parse_net(text) for text in ("10.96.0.5", "203.0.113.9", "198.51.100.9")
)
CLUSTER_IP6 = parse_net("fd00:96::5")
ADDRESSES = {CLUSTER_IP, EXTERNAL_IP, BALANCER_IP}


def service(name: str = "web", **spec: Any) -> tuple[Key, JSON]:
    whole = {
        "type": "LoadBalancer",
        "clusterIPs": ["10.96.0.5"],
        "externalIPs": ["203.0.113.9", "192.0.2.1"],
        "externalTrafficPolicy": "Local",
        **spec,
    }
    ingress = [{"ip": "198.51.100.9"}, {"ip": "192.0.2.2"}, {"hostname": "lb"}, {"ip": "no/32"}]
    return Key("Service", name, "default"), {
        "metadata": {"name": name, "namespace": "default"},
        "spec": whole,
        "status": {"loadBalancer": {"ingress": ingress}},
    }


def endpoints(
    name: str = "web-1", node: str = "n1", ready: bool | None = True, family: str = "IPv4"
) -> tuple[Key, JSON]:
    labels = {"kubernetes.io/service-name": "web"}
    conditions = {} if ready is None else {"ready": ready}
    found = [{"addresses": ["10.1.0.1"], "nodeName": node, "conditions": conditions}]
    return Key("EndpointSlice", name, "default"), {
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "addressType": family,
        "endpoints": found,
    }


def made(*objects: tuple[Key, JSON]) -> Services:
    services = Services("n1")
    for key, value in objects:
        services.update(key, value)
    return services


def singles(*objects: tuple[Key, JSON], ranges: ServiceRanges = RANGES) -> set[Net]:
    found = made(*objects).announced(ranges, excluded=False)
    assert ranges.whole <= found
    return set(found - ranges.whole)


def test_policy_local_needs_a_ready_endpoint_here() -> None:
    assert singles(service(), endpoints()) == ADDRESSES
    assert singles(service(), endpoints(ready=None)) == ADDRESSES
    assert singles(service(), endpoints(ready=False)) == set()
    assert singles(service(), endpoints(node="n2")) == set()
    assert singles(service()) == set()
    both = (endpoints("web-1", ready=False), endpoints("web-2"))
    assert singles(service(), *both) == singles(service(), *both[::-1]) == ADDRESSES


def test_policy_cluster_is_left_to_the_ranges() -> None:
    cluster = service(externalTrafficPolicy="Cluster")
    assert singles(cluster, endpoints()) == set()
    assert singles(service(externalTrafficPolicy=None), endpoints()) == set()
    internal = service(externalTrafficPolicy="Cluster", internalTrafficPolicy="Local")
    assert singles(internal, endpoints()) == {CLUSTER_IP}
    # a range of one address is that of one service
    alone = ServiceRanges((), (EXTERNAL_IP,), (BALANCER_IP,))
    assert alone.whole == frozenset()
    assert singles(cluster, ranges=alone) == {EXTERNAL_IP, BALANCER_IP}
    assert singles(service(), endpoints(node="n2"), ranges=alone) == set()
    apart = ServiceRanges((CLUSTER,), (EXTERNAL,), (BALANCER,), aggregated=False)
    assert apart.whole == {CLUSTER, EXTERNAL}
    assert singles(cluster, endpoints(node="n2"), ranges=apart) == ADDRESSES
    assert singles(cluster, ranges=apart) == set()


def test_each_ip_version_by_itself() -> None:
    dual = service(clusterIPs=["10.96.0.5", "fd00:96::5"], externalIPs=[])
    assert CLUSTER_IP6 not in singles(dual, endpoints())
    assert singles(dual, endpoints(family="IPv6")) == {CLUSTER_IP6}
    assert singles(dual, endpoints(family="FQDN")) == set()


@pytest.mark.parametrize(
    "spec", [{"clusterIPs": ["None"]}, {"clusterIPs": []}, {"type": "ExternalName"}]
)
def test_services_without_addresses(spec: dict[str, Any]) -> None:
    assert singles(service(**spec), endpoints()) == set()


def test_only_load_balancers_have_load_balancer_addresses() -> None:
    assert singles(service(type="NodePort"), endpoints()) == {CLUSTER_IP, EXTERNAL_IP}


def test_nothing_from_nodes_that_are_left_out() -> None:
    assert made(service(), endpoints()).announced(RANGES, excluded=True) == frozenset()


def test_what_is_not_valid_is_named_and_what_it_was_stands() -> None:
    services = made(service(), endpoints())
    key, value = endpoints()
    assert services.update(key, {**value, "addressType": "IPX"})
    (problem,) = services.problems
    assert str(problem).startswith("EndpointSlice default/web-1: addressType: 'IPX'")
    assert services.announced(RANGES, excluded=False) >= ADDRESSES
    assert services.update(key, None)
    assert services.problems == []
    assert not services.announced(RANGES, excluded=False) & ADDRESSES


def test_changes_that_do_not_matter() -> None:
    services = made(service(), endpoints())
    assert not services.update(*service())
    assert not services.update(*endpoints())
    assert not services.update(*endpoints("web-2", ready=False))
    assert services.update(*endpoints(node="n2"))


OBJECTS = st.one_of(
    st.builds(
        service,
        st.sampled_from(("web", "db")),
        externalTrafficPolicy=st.sampled_from(("Local", "Cluster", None)),
    ),
    st.builds(
        endpoints,
        st.sampled_from(("web-1", "web-2")),
        st.sampled_from(("n1", "n2")),
        st.sampled_from((True, False, None)),
        st.sampled_from(("IPv4", "IPv6")),
    ),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(OBJECTS, st.booleans()), max_size=12))
def test_only_what_is_counts_not_how_it_came_about(
    changes: list[tuple[tuple[Key, JSON], bool]],
) -> None:
    services = Services("n1")
    final: dict[Key, JSON] = {}
    for (key, value), deleted in changes:
        services.update(key, None if deleted else value)
        final.pop(key, None)
        if not deleted:
            final[key] = value
    expected = made(*reversed(final.items()))
    for ranges in (RANGES, ServiceRanges((CLUSTER,), (EXTERNAL_IP,), (BALANCER,), False)):
        assert services.announced(ranges, excluded=False) == expected.announced(
            ranges, excluded=False
        )
