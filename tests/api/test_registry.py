"""Finding kinds, parsing with every problem named, dumping, updates."""

from __future__ import annotations

from typing import Any

import pytest

from api.errors import UNREADABLE, InvalidObjectError
from api.ippool import IPPool, IPPoolSpec
from api.metadata import ObjectMeta
from api.policy import NetworkPolicy
from api.registry import (
    KINDS,
    check_update,
    dump,
    find_kind,
    key_parts,
    kind_of,
    parse,
    parse_as,
    selectors,
    validate,
)

V3 = "projectcalico.org/v3"


def policy(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": V3,
        "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": spec,
    }


def pool(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": V3,
        "kind": "IPPool",
        "metadata": {"name": "pods"},
        "spec": {"cidr": "10.0.0.0/16"} | spec,
    }


def problems(obj: object) -> dict[str, tuple[object, str]]:
    with pytest.raises(InvalidObjectError) as caught:
        parse(obj)
    return {problem.field: (problem.value, problem.expected) for problem in caught.value.problems}


def test_every_problem_is_reported_with_path_value_and_expectation() -> None:
    found = problems(
        policy(
            engress=[],
            ingress=[
                {"action": "Alow", "source": {"netz": ["10.0.0.0/8"]}},
                {"action": "Deny", "protocol": "tcp"},
                {"action": "Deny", "destination": {"ports": [80]}},
                {"action": "Deny", "source": {"nets": ["10.0.0.1/8"]}},
            ],
        )
    )
    assert found == {
        "spec.engress": ([], "no such field; did you mean egress?"),
        "spec.ingress[0].action": ("Alow", "'Allow', 'Deny', 'Log' or 'Pass'"),
        "spec.ingress[0].source.netz": (["10.0.0.0/8"], "no such field; did you mean nets?"),
        "spec.ingress[1].protocol": (
            "tcp",
            "one of TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite, or a number from 1 to 255",
        ),
        "spec.ingress[2].destination.ports": (
            [80],
            "protocol TCP, UDP or SCTP beside numeric ports",
        ),
        "spec.ingress[3].source.nets[0]": (
            "10.0.0.1/8",
            "a CIDR such as 10.0.0.0/24 without bits beyond its prefix length",
        ),
    }


def test_the_error_names_the_object() -> None:
    with pytest.raises(InvalidObjectError) as caught:
        parse(pool(blockSize=40))
    assert str(caught.value) == "IPPool pods: spec.blockSize: 40: 20 to 32 for an IPv4 pool"


def test_contradictions_of_one_model_are_reported_together() -> None:
    found = problems(pool(cidr="fd00::/64", blockSize=26, ipipMode="Always", vxlanMode="Always"))
    assert set(found) == {"spec.blockSize", "spec.ipipMode"}


def test_required_fields() -> None:
    found = problems({"apiVersion": V3, "kind": "IPPool", "metadata": {"name": "p"}, "spec": {}})
    assert found == {"spec.cidr": (None, "required")}
    assert problems({"apiVersion": V3, "kind": "IPPool"}) == {
        "metadata": (None, "required"),
        "spec": (None, "required"),
    }
    assert problems(pool() | {"metadata": {}}) == {"metadata.name": ("", "required")}


def test_field_names_in_any_case_as_calicoctl() -> None:
    parsed = parse(policy(Egress=[{"ACTION": "Deny"}], serviceaccountselector="all()"))
    assert isinstance(parsed, NetworkPolicy)
    assert parsed.spec.egress[0].action == "Deny"
    assert parsed.spec.service_account_selector == "all()"


def test_a_field_twice_in_different_case_is_refused() -> None:
    assert problems(policy(egress=[], Egress=[])) == {
        "spec": ({"egress": [], "Egress": []}, "'egress' must be given only once")
    }


def test_attribute_names_are_not_field_names() -> None:
    assert "spec.block_size" in problems(pool(block_size=27))


def test_null_and_empty_mean_absent_in_optional_fields() -> None:
    parsed = parse(policy(ingress=None, selector="", order=None))
    assert dump(parsed)["spec"] == {"tier": "default", "types": ["Ingress"]}


def test_false_survives_where_absent_means_something_else() -> None:
    obj = {
        "apiVersion": V3,
        "kind": "BGPConfiguration",
        "metadata": {"name": "default"},
        "spec": {"nodeToNodeMeshEnabled": False, "asNumber": 0},
    }
    spec = dump(parse(obj))["spec"]
    assert spec["nodeToNodeMeshEnabled"] is False
    assert spec["asNumber"] == 0


def test_values_of_the_wrong_type_are_not_converted() -> None:
    assert problems(pool(disabled="True", blockSize="26", natOutgoing=1)) == {
        "spec.disabled": ("True", "a valid boolean"),
        "spec.blockSize": ("26", "a valid integer"),
        "spec.natOutgoing": (1, "a valid boolean"),
    }


def test_defaults() -> None:
    assert dump(parse(pool()))["spec"] == {
        "cidr": "10.0.0.0/16",
        "blockSize": 26,
        "ipipMode": "Never",
        "vxlanMode": "Never",
        "nodeSelector": "all()",
        "allowedUses": ["Workload", "Tunnel"],
        "assignmentMode": "Automatic",
    }
    six = parse(pool(cidr="fd00:1::/64"))
    assert isinstance(six, IPPool)
    assert six.spec.block_size == 122


def test_a_pool_for_some_namespaces_is_not_for_tunnels_by_default() -> None:
    parsed = parse(pool(namespaceSelector="team == 'red'"))
    assert dump(parse(dump(parsed))) == dump(parsed)
    assert dump(parsed)["spec"]["allowedUses"] == ["Workload"]


@pytest.mark.parametrize(
    ("ingress", "egress", "types"),
    [
        ([], [], ["Ingress"]),
        ([{"action": "Allow"}], [], ["Ingress"]),
        ([], [{"action": "Allow"}], ["Egress"]),
        ([{"action": "Allow"}], [{"action": "Allow"}], ["Ingress", "Egress"]),
    ],
)
def test_tricky_7_missing_types(ingress: list[Any], egress: list[Any], types: list[str]) -> None:
    parsed = parse(policy(ingress=ingress, egress=egress))
    assert isinstance(parsed, NetworkPolicy)
    assert parsed.spec.types == types


def test_tricky_31_protocols() -> None:
    parsed = parse(policy(ingress=[{"action": "Allow", "protocol": "6"}]))
    assert isinstance(parsed, NetworkPolicy)
    assert parsed.spec.ingress[0].protocol == 6
    assert "spec.ingress[0].protocol" in problems(
        policy(ingress=[{"action": "Allow", "protocol": "tcp"}])
    )
    assert "spec.ingress[0].destination.ports" in problems(
        policy(ingress=[{"action": "Allow", "protocol": 50, "destination": {"ports": [1]}}])
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_stands_for_an_unreadable_object_is_refused(kind: str) -> None:
    """Also of kinds of which only a part is read, which is then as if it were absent."""
    names = {"name": "a"} | ({"namespace": "b"} if KINDS[kind].namespaced else {})
    with pytest.raises(InvalidObjectError, match=r"a: spec\.unreadable: 'why': no such field"):
        parse_as(kind, {"metadata": names, "spec": {UNREADABLE: "why"}})


def test_unknown_kinds_and_versions() -> None:
    assert problems({"apiVersion": V3, "kind": "IPPol"}) == {
        "kind": ("IPPol", "a kind Manx knows; did you mean IPPool?")
    }
    assert problems({"apiVersion": "v1", "kind": "NetworkPolicy"}) == {
        "apiVersion": ("v1", f"{V3} or networking.k8s.io/v1")
    }
    assert problems(["IPPool"]) == {"": (["IPPool"], "a mapping with a kind")}


def test_names() -> None:
    assert "metadata.name" in problems(pool() | {"metadata": {"name": "Pods"}})
    assert "metadata.name" in problems(pool() | {"metadata": {"name": "a" * 254}})
    assert "metadata.namespace" in problems(pool() | {"metadata": {"name": "a", "namespace": "b"}})
    assert "metadata.labels.a b" in problems(
        pool() | {"metadata": {"name": "a", "labels": {"a b": ""}}}
    )
    tier = {"apiVersion": V3, "kind": "Tier", "metadata": {"name": "a.b"}}
    assert "metadata.name" in problems(tier)


def test_find_kind() -> None:
    for kind in KINDS.values():
        assert (kind.model.namespaced, kind.model.__name__) == (kind.namespaced, kind.id)
        for word in (kind.id, kind.plural, *kind.short_names):
            assert find_kind(word.upper()) is kind
    with pytest.raises(LookupError, match="did you mean ippools"):
        find_kind("ippolls")


def test_words_for_kinds_are_unambiguous() -> None:
    words = [w for k in KINDS.values() for w in {k.id.lower(), k.plural, *k.short_names}]
    assert len(words) == len(set(words))


def test_two_kinds_named_network_policy() -> None:
    assert kind_of({"apiVersion": V3, "kind": "NetworkPolicy"}).id == "NetworkPolicy"
    kubernetes = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    assert kind_of(kubernetes).id == "KubernetesNetworkPolicy"


def test_key_parts() -> None:
    assert key_parts(policy()) == ("NetworkPolicy", "shop", "web")
    assert key_parts(pool()) == ("IPPool", "", "pods")


def test_parse_as_needs_no_kind() -> None:
    parsed = parse_as("IPPool", {"metadata": {"name": "p"}, "spec": {"cidr": "10.0.0.0/16"}})
    assert dump(parsed)["apiVersion"] == V3


def test_resources_made_in_python_are_the_same() -> None:
    made = IPPool(metadata=ObjectMeta(name="pods"), spec=IPPoolSpec(cidr="10.0.0.0/16"))
    assert dump(made) == dump(validate(IPPool, pool()))


def test_immutable_fields() -> None:
    old = parse(pool())
    check_update(old, parse(pool(disabled=True)))
    with pytest.raises(InvalidObjectError) as caught:
        check_update(old, parse(pool(cidr="10.1.0.0/16", blockSize=27)))
    assert [str(problem) for problem in caught.value.problems] == [
        "spec.cidr: '10.1.0.0/16': 10.0.0.0/16, as it is: immutable",
        "spec.blockSize: 27: 26, as it is: immutable",
    ]


def test_selectors_of_a_resource() -> None:
    parsed = parse(
        policy(
            selector="a == 'b'",
            ingress=[
                {
                    "action": "Allow",
                    "source": {
                        "namespaceSelector": "all()",
                        "serviceAccounts": {"selector": "has(x)"},
                    },
                }
            ],
        )
    )
    assert dict(selectors(parsed)) == {
        "spec.selector": "a == 'b'",
        "spec.ingress[0].source.namespaceSelector": "all()",
        "spec.ingress[0].source.serviceAccounts.selector": "has(x)",
    }
