"""The generated admission policies in an API server of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from api.felix import FelixConfiguration
from api.felix_defaults import DEFAULTS
from api.kinds import KINDS, kind_of
from api.metadata import ObjectMeta
from api.policy import TIER_LABEL
from api.registry import dump, parse
from manifests import admission, crds
from policy.selector import parse as parse_selector
from tests.api.examples import EXAMPLES
from tests.manifests.test_crds import UNSAID, refused_by_model, thing, url
from tests.support import vectors
from tests.support.crds import install_admission, install_crds
from tests.support.kube import KubeApiserver, api_server

# to start an API server takes a busy machine a minute
pytestmark = pytest.mark.timeout(300)

_PATH = "/apis/admissionregistration.k8s.io/v1"


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApiserver]:
    """Its own: what is refused here is not refused to the tests of stores."""
    with api_server() as server:
        install_crds(server)
        install_admission(server)
        yield server


def created(server: KubeApiserver, obj: dict[str, Any]) -> tuple[int, Any]:
    """What would be stored."""
    return server.request("POST", f"{url(kind_of(obj))}?dryRun=All&fieldValidation=Strict", obj)


def test_the_api_server_finds_no_fault_in_the_expressions(server: KubeApiserver) -> None:
    """It checks their types against the CRDs, some time after they were written."""

    def checked() -> list[Any]:
        items = server.request("GET", f"{_PATH}/validatingadmissionpolicies")[1]["items"]
        return [item.get("status", {}) for item in items]

    assert len(checked()) == len(admission.validating()) / 2
    for status in checked():
        assert not status.get("typeChecking", {}).get("expressionWarnings"), status


RULES: tuple[dict[str, Any], ...] = (
    {},
    {"ingress": [{}]},
    {"egress": [{}]},
    {"ingress": [{}], "egress": [{}]},
    {"ingress": [], "egress": [{}]},
)
DEFAULTED: list[dict[str, Any]] = [
    thing("IPPool", "x", spec={"cidr": "10.0.0.0/16"}),
    thing("IPPool", "x", spec={"cidr": "fd00::/64"}),
    thing("IPPool", "x", spec={"cidr": "10.0.0.0/16", "namespaceSelector": "a == 'b'"}),
    thing("IPPool", "x", spec={"cidr": "10.0.0.0/16", "blockSize": 28, "allowedUses": ["Tunnel"]}),
    *(
        thing(kind, "x", spec=spec)
        for kind in (*admission.POLICIES, admission.DRAFT)
        for spec in RULES
    ),
    *(
        thing(kind, "x", spec={"stagedAction": "Delete"})
        for kind in (*admission.POLICIES[2:], admission.DRAFT)
    ),
]


def with_actions(obj: dict[str, Any]) -> dict[str, Any]:
    """Rules of Calico's policies need an action; those of Kubernetes have none."""
    if obj["kind"] not in admission.POLICIES:
        return obj
    rules = {
        name: [{"action": "Allow"} for _ in value] if isinstance(value, list) else value
        for name, value in obj["spec"].items()
    }
    return obj | {"spec": rules}


@pytest.mark.parametrize("obj", DEFAULTED, ids=lambda o: f"{o['kind']}-{o['spec']}")
def test_defaults_that_depend_on_other_fields_are_the_models(
    server: KubeApiserver, obj: dict[str, Any]
) -> None:
    obj = with_actions(obj)
    code, stored = created(server, obj)
    assert code == 201, stored
    wanted = dump(parse(obj, selector=parse_selector))["spec"]
    assert {name: stored["spec"].get(name) for name in wanted} == wanted
    if obj["kind"] in admission.POLICIES:
        assert stored["metadata"]["labels"] == {TIER_LABEL: "default"}


def test_every_kind_is_stored_with_the_models_defaults(server: KubeApiserver) -> None:
    """Whoever reads from the API server sees what our programs see."""
    seen = set()
    settings = dump(FelixConfiguration(metadata=ObjectMeta(name="x"), spec=DEFAULTS))
    for example in [*EXAMPLES, settings]:
        kind = kind_of(example)
        if kind not in crds.kinds():
            continue
        seen.add(kind.id)
        least = {name: value for name, value in example["spec"].items() if required(kind.id, name)}
        for spec in (least, example["spec"]):
            obj = {
                "apiVersion": kind.api_version,
                "kind": kind.kind,
                "metadata": {"name": example["metadata"]["name"]},
                "spec": spec,
            }
            if refused_by_model(obj):
                continue
            code, stored = created(server, obj)
            assert code == 201, stored
            wanted = dump(parse(obj, selector=parse_selector)).get("spec", {})
            found = {name: stored["spec"].get(name) for name in wanted}
            assert found == wanted, kind.id
    assert seen == {kind.id for kind in crds.kinds()}


def required(kind: str, name: str) -> bool:
    schema = crds.definition(KINDS[kind])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return name in schema["properties"]["spec"].get("required", ())


def test_what_crds_cannot_refuse(server: KubeApiserver) -> None:
    """All that was recorded, but for what is wrong in a request and not in an object."""
    accepted = []
    for name in ("validation", "validation_resources"):
        for case in vectors.load(name)["cases"]:
            obj = case["resource"]
            if obj is None or obj["kind"] not in {kind.id for kind in crds.kinds()}:
                continue
            problems = refused_by_model(obj)
            if not any(
                problem.field != "metadata.namespace" and _unsaid(problem.field)
                for problem in problems
            ):
                continue
            if KINDS[obj["kind"]].namespaced:
                obj = obj | {"metadata": obj["metadata"] | {"namespace": "default"}}
            code, _ = created(server, obj)
            accepted += [(case["id"], problems)] * (code == 201)
    assert accepted == []


def _unsaid(field: str) -> bool:
    return any(re.match(pattern, field) for pattern in UNSAID.values())


@pytest.mark.parametrize(
    ("exceptions", "code"),
    [
        ([], 201),
        (["10.1.0.0/16", "10.2.3.4/32"], 201),
        (["10.1.0.1/16"], 201),
        (["10.1.0.0/16", "11.0.0.0/16"], 422),
        (["10.0.0.0/8"], 422),
        (["0.0.0.0/0"], 422),
        (["fd00::/16"], 422),
    ],
)
def test_exceptions_lie_inside_their_network(
    server: KubeApiserver, exceptions: list[str], code: int
) -> None:
    block = {"ipBlock": {"cidr": "10.0.0.0/8", "except": exceptions}}
    obj = thing(admission.DRAFT, "x", spec={"podSelector": {}, "egress": [{"to": [block]}]})
    assert bool(refused_by_model(obj)) == (code == 422)
    found, answer = created(server, obj)
    assert found == code, answer


def test_built_in_tiers_stay(server: KubeApiserver) -> None:
    for name, refused in (("default", True), ("other", False)):
        tier = thing("Tier", name, spec={"order": 1_000_000})
        assert server.request("POST", url(KINDS["Tier"]), tier)[0] == 201
        code, answer = server.request("DELETE", url(KINDS["Tier"], name=name))
        assert code == (422 if refused else 200), answer
        assert not refused or "built in and cannot be deleted" in answer["message"]


def test_policy_moves_its_label_with_its_tier(server: KubeApiserver) -> None:
    kind = KINDS["GlobalNetworkPolicy"]
    obj = thing(kind.id, "moves", spec={"tier": ""})
    obj["metadata"]["labels"] = {"team": "a", TIER_LABEL: "lie"}
    code, stored = server.request("POST", url(kind), obj)
    assert code == 201, stored
    assert stored["spec"]["tier"] == "default"
    assert stored["metadata"]["labels"] == {"team": "a", TIER_LABEL: "default"}
    stored["spec"]["tier"] = "security"
    code, changed = server.request("PUT", url(kind, name="moves"), stored)
    assert code == 200, changed
    assert changed["metadata"]["labels"][TIER_LABEL] == "security"
