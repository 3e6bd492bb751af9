"""The generated CRDs: current, accepted by a real API server, and as strict as the models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPSConnection
from typing import Any

import pytest
from click.testing import CliRunner

from api.errors import InvalidObjectError, Problem
from api.felix import FelixConfiguration
from api.felix_defaults import DEFAULTS
from api.kinds import KINDS, Kind, kind_of
from api.metadata import Fault, ObjectMeta
from api.policy import Tier
from api.registry import dump, parse
from manifests import crds, files
from manifests.__main__ import main
from manifests.rules import rules_of
from policy.selector import parse as parse_selector
from tests.api.examples import EXAMPLES
from tests.support import vectors
from tests.support.kube import KubeApiserver

# to start an API server takes a busy machine a minute
pytestmark = pytest.mark.timeout(300)

V3 = "projectcalico.org/v3"
CRD_KINDS = {kind.id for kind in crds.kinds()}

# What CRDs don't say, and by what its problem is known. Everything else that the models refuse,
# the API server refuses by them; of this, much by admission policies (test_admission.py).
UNSAID = {
    "labels: a rule on an object sees none": r"(metadata\.labels|.*\.matchLabels|.*\.values)\b",
    "annotations: their keys cannot be named in a schema": r".*metadata\.annotations\b",
    "budget: ports and their order, of 1024 rules": r".*[pP]orts\[\d+\]$",
    "budget: 500 names, each looked for among 500": r"spec\.prefixAdvertisements.*communities\[",
    "metadata: the namespace of the request counts": r"metadata\.namespace$",
}


def url(kind: Kind, namespace: str = "default", name: str = "") -> str:
    space = f"/namespaces/{namespace}" if kind.namespaced else ""
    return f"/apis/{kind.api_version}{space}/{kind.resource}" + (f"/{name}" if name else "")


def thing(kind: str, name: str, **rest: Any) -> dict[str, Any]:
    return {"apiVersion": V3, "kind": kind, "metadata": {"name": name}, **rest}


def refused_by_model(obj: dict[str, Any]) -> tuple[Problem, ...]:
    try:
        parse(obj, selector=parse_selector)
    except InvalidObjectError as error:
        return error.problems
    return ()


@pytest.fixture
def connection(server: KubeApiserver) -> Iterator[HTTPSConnection]:
    with closing(server.connection()) as made:
        yield made


def tried(
    server: KubeApiserver, connection: HTTPSConnection, obj: dict[str, Any]
) -> tuple[int, str]:
    """Code and message of creating an object without storing it, as strictly as kubectl asks."""
    kind = kind_of(obj)
    if kind.namespaced and isinstance(obj.get("metadata"), dict):
        obj = obj | {"metadata": obj["metadata"] | {"namespace": "default"}}
    path = f"{url(kind)}?dryRun=All&fieldValidation=Strict"
    code, answer = server.request("POST", path, obj, connection=connection)
    assert code in (201, 400, 422), answer
    return code, answer.get("message", "")


@pytest.mark.parametrize("what", ["crds", "admission"])
def test_files_are_what_the_models_say(what: str) -> None:
    result = CliRunner().invoke(main, [what, "--check"])
    assert (result.exit_code, result.output) == (0, "")


def test_a_stale_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(crds, "DIRECTORY", tmp_path)
    assert CliRunner().invoke(main, ["crds"]).exit_code == 0
    changed, superfluous = tmp_path / "projectcalico.org_tiers.yaml", tmp_path / "other.yaml"
    changed.write_text(changed.read_text() + "#\n")
    superfluous.write_text("")
    assert files.stale(tmp_path, crds.files()) == [superfluous, changed]
    result = CliRunner().invoke(main, ["crds", "--check"])
    assert result.exit_code == 1
    assert "projectcalico.org_tiers.yaml: not what the models say" in result.output
    assert CliRunner().invoke(main, ["crds"]).exit_code == 0
    assert files.stale(tmp_path, crds.files()) == []


def test_all_of_calico_and_cluster_network_policy() -> None:
    v3 = {kind.id for kind in KINDS.values() if kind.api_version == V3}
    derived = {"Node", "WorkloadEndpoint", "Profile"}
    administrators = {
        "ClusterNetworkPolicy",
        "AdminNetworkPolicy",
        "BaselineAdminNetworkPolicy",
    }
    assert v3 - derived | administrators == CRD_KINDS
    assert len(CRD_KINDS) == 25


def test_a_model_without_rules_is_not_forgotten() -> None:
    class Forgotten(Tier):
        def faults(self) -> Iterator[Fault]:
            return iter(())

    with pytest.raises(LookupError, match="Forgotten checks itself, but has no rules"):
        rules_of(Forgotten)


def test_the_api_server_accepts_them(server: KubeApiserver) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for crd in server.request("GET", path)[1]["items"]:
        conditions = {c["type"]: c["status"] for c in crd["status"]["conditions"]}
        assert conditions["Established"] == "True", crd["metadata"]["name"]
        assert conditions.get("NonStructuralSchema", "False") == "False", crd["metadata"]["name"]
        assert conditions.get("KubernetesAPIApprovalPolicyConformant", "True") == "True"


def test_what_the_models_refuse_the_api_server_refuses(
    server: KubeApiserver, connection: HTTPSConnection
) -> None:
    counts: Counter[str] = Counter()
    wrong: list[tuple[str, object]] = []
    for name in ("validation", "validation_resources"):
        for case in vectors.load(name)["cases"]:
            obj = case["resource"]
            if obj is None or obj["kind"] not in CRD_KINDS:
                continue
            problems = refused_by_model(obj)
            code, message = tried(server, connection, obj)
            if problems and code == 201:
                reasons = {reason(problem) for problem in problems}
                counts.update(map(str, reasons))
                if None in reasons:
                    wrong.append((case["id"], problems))
            elif not problems and code != 201:
                counts["valid, but refused"] += 1
                if "Duplicate value" not in message:  # a set in the CRD, as in Calico's
                    wrong.append((case["id"], message))
            else:
                counts["refused by both" if problems else "accepted by both"] += 1
    assert not wrong
    assert counts["accepted by both"] > 550, counts
    assert counts["valid, but refused"] <= 5, counts
    assert counts["refused by both"] > 1250, counts


def test_every_field_of_every_kind_is_kept(
    server: KubeApiserver, connection: HTTPSConnection
) -> None:
    seen = set()
    settings = FelixConfiguration(metadata=ObjectMeta(name="x"), spec=DEFAULTS)
    for example in [*EXAMPLES, dump(settings)]:
        kind = kind_of(example)
        if kind.id not in CRD_KINDS:
            continue
        seen.add(kind.id)
        path = f"{url(kind)}?dryRun=All&fieldValidation=Strict"
        obj = example | {"metadata": {"name": example["metadata"]["name"]}}
        code, stored = server.request("POST", path, obj, connection=connection)
        assert code == 201, stored
        assert stored["spec"].items() >= example["spec"].items(), kind.id
    assert seen == CRD_KINDS


def reason(problem: Problem) -> str | None:
    """Why the API server is not told of such a problem; None when it should be."""
    return next((why for why, field in UNSAID.items() if re.match(field, problem.field)), None)


@pytest.mark.parametrize(
    ("kind", "spec", "says"),
    [
        ("IPPool", {"cidr": "10.0.0.1/16"}, "spec.cidr: .*a CIDR such as 10.0.0.0/24 without bits"),
        ("IPPool", {"cidr": "10.0.0.0/16", "blockSize": 33}, "blockSize: 20 to 32 for an IPv4"),
        ("IPPool", {"cidr": "10.0.0.0/16", "blokSize": 26}, 'unknown field "spec.blokSize"'),
        ("BGPPeer", {"peerIP": "192.0.2.1:0"}, r"an IP address, IPv4:port or \[IPv6\]:port"),
        ("BGPPeer", {"peerIP": "peer", "asNumber": "1.2.3"}, r"dotted form and in quotes.*YAML"),
        ("BGPPeer", {"node": "a", "nodeSelector": "b"}, "nodeSelector must be absent, because"),
        ("BGPPeer", {"nodeSelector": "rack = 'a'"}, "a selector such as app == 'web'"),
        ("FelixConfiguration", {"mtuIfacePattern": "["}, "mtuIfacePattern"),
        ("FelixConfiguration", {"routeRefreshInterval": "-5s"}, "a duration that is not negative"),
        ("FelixConfiguration", {"natOutgoingAddress": "fd00::1"}, "an IPv4 address"),
        ("HostEndpoint", {"node": "a"}, "interfaceName is required, unless expectedIPs is set"),
        ("IPReservation", {"reservedCIDRs": ["10.0.0.300"]}, r"spec.reservedCIDRs\[0\]"),
        ("GlobalNetworkSet", {"nets": ["10.0.0.0/33"]}, r"spec.nets\[0\]"),
        ("CalicoNodeStatus", {"node": "a", "classes": ["BGP"]}, "updatePeriodSeconds: Required"),
        ("StagedGlobalNetworkPolicy", {"stagedAction": "Delete", "order": 1}, "order must be abs"),
        ("StagedGlobalNetworkPolicy", {"preDNAT": True}, "applyOnForward must be true, because"),
        ("GlobalNetworkPolicy", {"selector": "global()"}, r"selector without global\(\)"),
        ("GlobalNetworkPolicy", {"doNotTrack": True}, "applyOnForward must be true"),
    ],
)
def test_what_people_read(
    server: KubeApiserver, connection: HTTPSConnection, kind: str, spec: Any, says: str
) -> None:
    obj = thing(kind, "x", spec=spec)
    assert refused_by_model(obj)
    code, message = tried(server, connection, obj)
    assert code in (400, 422)
    assert re.search(says, message), message


RULE_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"protocol": "tcp"}, "one of TCP, UDP, ICMP"),
    ({"protocol": 256}, "one of TCP, UDP, ICMP"),
    ({"destination": {"ports": [80]}}, "destination.ports need protocol TCP, UDP or SCTP"),
    ({"protocol": 50, "source": {"ports": [80]}}, "source.ports need protocol"),
    ({"icmp": {"type": 8}}, "protocol must be ICMP or ICMPv6"),
    ({"protocol": "ICMP", "icmp": {"code": 8}}, "type is required, because code is set"),
    ({"protocol": "ICMPv6", "ipVersion": 4}, "ipVersion must be 6, because protocol is ICMPv6"),
    ({"source": {"nets": ["10.0.0.1/8"]}}, "without bits beyond its prefix length"),
    ({"source": {"nets": ["10.0.0.0/8", "fd00::/8"]}}, "nets of one IP version"),
    ({"source": {"nets": ["10.0.0.0/8"]}, "destination": {"nets": ["::/1"]}}, "one IP version in"),
    ({"ipVersion": 6, "source": {"nets": ["10.0.0.0/8"]}}, "nets of ipVersion only"),
    ({"source": {"notNets": ["0.0.0.0/0"]}}, "not everything"),
    ({"source": {"namespaceSelector": "global() && a == 'b'"}}, r"global\(\) alone"),
    ({"source": {"selector": "a == b"}}, r"spec.ingress\[0\].source.selector"),
    ({"source": {"services": {"name": "s", "namespace": "n"}, "nets": ["::/1"]}}, "nets must be a"),
    ({"source": {"services": {"name": "s"}}}, "services need a namespace"),
    ({"destination": {"services": {"name": "s", "namespace": "n"}}}, "services must be absent in"),
    ({"action": "Deny", "http": {}}, "action must be Allow, because http is set"),
    ({"http": {"paths": [{"exact": "a"}]}}, r"http.paths\[0\].exact"),
    ({"http": {"paths": [{}]}}, r"http.paths\[0\]"),
    ({"http": {"methods": ["GET", "GET"]}}, "Duplicate value"),
]


@pytest.mark.parametrize(("rule", "says"), RULE_FAULTS)
def test_what_people_read_of_rules(
    server: KubeApiserver, connection: HTTPSConnection, rule: dict[str, Any], says: str
) -> None:
    spec = {"ingress": [{"action": "Allow"} | rule]}
    obj = thing("GlobalNetworkPolicy", "x", spec=spec)
    assert refused_by_model(obj)
    code, message = tried(server, connection, obj)
    assert code == 422
    assert re.search(says, message), message


ADMIN: dict[str, Any] = {
    "tier": "Admin",
    "priority": 10,
    "subject": {"namespaces": {}},
    "egress": [
        {
            "name": "out",
            "action": "Deny",
            "to": [{"networks": ["10.0.0.0/8", "fd00::/8"]}, {"domainNames": ["*.example.com"]}],
            "protocols": [{"tcp": {"destinationPort": {"range": {"start": 1, "end": 9}}}}],
        }
    ],
    "ingress": [
        {
            "action": "Accept",
            "from": [{"pods": {"podSelector": {"matchLabels": {"a": "b"}}}}],
            "protocols": [{"destinationNamedPort": "http"}],
        }
    ],
}


def test_cluster_network_policy(server: KubeApiserver, connection: HTTPSConnection) -> None:
    kind = KINDS["ClusterNetworkPolicy"]
    obj = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": {"name": "x"}}
    assert refused_by_model(obj | {"spec": ADMIN}) == ()
    assert tried(server, connection, obj | {"spec": ADMIN}) == (201, "")
    (out,) = ADMIN["egress"]
    changes: list[dict[str, Any]] = [
        {"tier": "admin"},
        {"priority": 1001},
        {"subject": {}},
        {"subject": {"namespaces": {}, "pods": {"podSelector": {}}}},
        {"egress": [out | {"to": []}]},
        {"egress": [out | {"to": [{}]}]},
        {"egress": [out | {"to": [{"networks": ["10.0.0.0/33"]}]}]},
        {"egress": [out | {"to": [{"networks": ["::/0", "::/0"]}]}]},
        {"egress": [out | {"protocols": [{"destinationNamedPort": "http"}]}]},
        {"egress": [out | {"protocols": [{"udp": {}}]}]},
        {"egress": [out | {"protocols": [{"tcp": {"destinationPort": {"number": 0}}}]}]},
        {"egress": [out | {"nodes": {}}]},
        {"egress": [out] * 26},
    ]
    for wrong in changes:
        changed = obj | {"spec": ADMIN | wrong}
        assert refused_by_model(changed), wrong
        assert tried(server, connection, changed)[0] in (400, 422), wrong


def test_a_field_that_is_not_known(server: KubeApiserver, connection: HTTPSConnection) -> None:
    """kubectl is told; from others the API server takes the rest, so nobody reads the field."""
    kind = KINDS["ClusterNetworkPolicy"]
    (out,) = ADMIN["egress"]
    newer = {"spec": ADMIN | {"egress": [out | {"onlyAtNight": True}]}}
    obj = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": {"name": "x"}} | newer
    (problem,) = refused_by_model(obj)
    assert problem.field == "spec.egress[0].onlyAtNight"
    code, message = tried(server, connection, obj)
    assert code == 400
    assert 'unknown field "spec.egress[0].onlyAtNight"' in message
    code, stored = server.request("POST", f"{url(kind)}?dryRun=All&fieldValidation=Warn", obj)
    assert code == 201, stored
    assert stored["spec"]["egress"] == ADMIN["egress"]
    assert refused_by_model(stored) == ()
    stored["status"] = {"conditions": [], "newer": {}}
    assert refused_by_model(stored) == ()


def test_defaults_are_the_models(server: KubeApiserver) -> None:
    for obj, dependent in (
        (thing("IPPool", "defaults", spec={"cidr": "10.0.0.0/16"}), {"blockSize", "allowedUses"}),
        (thing("Tier", "defaults"), set()),
        (thing("BGPConfiguration", "defaults"), set()),
        (thing("BGPPeer", "defaults"), set()),
        (thing("IPAMConfiguration", "defaults"), set()),
        (thing("KubeControllersConfiguration", "defaults"), set()),
        (thing("GlobalNetworkPolicy", "defaults"), {"types"}),
        (thing("StagedGlobalNetworkPolicy", "defaults"), {"types"}),
    ):
        kind = kind_of(obj)
        code, stored = server.request("POST", url(kind), obj)
        assert code == 201, stored
        spec = dump(parse(obj))["spec"]
        missing = {name: value for name, value in spec.items() if name not in dependent}
        found = {name: value for name, value in stored["spec"].items() if name in missing}
        assert found == missing, kind.id
        assert dump(parse(stored))["spec"] == spec, kind.id
        assert server.request("DELETE", url(kind, name="defaults"))[0] == 200


def test_what_must_stay_stays(server: KubeApiserver) -> None:
    kind = KINDS["IPPool"]
    pool = thing("IPPool", "stays", spec={"cidr": "10.0.0.0/16", "nodeSelector": ""})
    code, stored = server.request("POST", url(kind), pool)
    assert code == 201, stored
    path = url(kind, name="stays")
    for change, says in (
        ({"cidr": "10.1.0.0/16"}, "cidr is immutable"),
        ({"blockSize": 27}, "blockSize is immutable"),
        ({"allowedUses": ["LoadBalancer"]}, "LoadBalancer is neither added nor removed"),
    ):
        code, answer = server.request("PUT", path, stored | {"spec": stored["spec"] | change})
        assert code == 422
        assert says in answer["message"]
    same = {"cidr": "10.0.0.0/16", "blockSize": 26, "disabled": True}
    code, changed = server.request("PUT", path, stored | {"spec": same})
    assert code == 200, changed
    old = server.request("PUT", path, stored | {"spec": same | {"natOutgoing": True}})
    assert old[0] == 409
    assert server.request("DELETE", path)[0] == 200


def test_status_is_a_resource_of_its_own(server: KubeApiserver) -> None:
    kind = KINDS["CalicoNodeStatus"]
    spec = {"node": "n", "classes": ["BGP"], "updatePeriodSeconds": 10}
    status = {"bgp": {"numberEstablishedV4": 2}}
    code, stored = server.request("POST", url(kind), thing(kind.id, "status", spec=spec))
    assert code == 201, stored
    path = url(kind, name="status")
    assert "status" not in server.request("PUT", path, stored | {"status": status})[1]
    code, answer = server.request("PUT", f"{path}/status", stored | {"status": status})
    assert code == 200, answer
    assert answer["status"]["bgp"]["numberNotEstablishedV4"] == 0
    assert server.request("DELETE", path)[0] == 200


def test_columns_and_selectable_fields(server: KubeApiserver) -> None:
    kind = KINDS["NetworkPolicy"]
    for name, tier in (("columns-a", "default"), ("columns-b", "security")):
        obj = thing(kind.id, name, spec={"tier": tier, "order": 1.5})
        assert server.request("POST", url(kind), obj)[0] == 201
    code, table = server.request(
        "GET",
        f"{url(kind)}?fieldSelector=spec.tier%3Dsecurity",
        accept="application/json;as=Table;v=v1;g=meta.k8s.io",
    )
    assert code == 200, table
    titles = [column["name"] for column in table["columnDefinitions"]]
    assert titles == ["Name", "Tier", "Order", "Age"]
    assert [row["cells"][:3] for row in table["rows"]] == [["columns-b", "security", 1.5]]
    for name in ("columns-a", "columns-b"):
        assert server.request("DELETE", url(kind, name=name))[0] == 200
