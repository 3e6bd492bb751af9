"""manxctl where the datastore is a Kubernetes API server, beside what kubectl writes there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from manxctl.main import main
from tests.datastore.kubernetes_world import kubeconfig
from tests.support.crds import install_crds
from tests.support.kube import NOBODY, KubeApiserver
from tests.support.netns import eventually

SPACE = "manxctl-there"
V3 = "projectcalico.org/v3"
POLICIES = f"/apis/{V3}/namespaces/{SPACE}/networkpolicies"


class Cluster:
    """A namespace of an API server, for manxctl and as kubectl sees it."""

    def __init__(self, server: KubeApiserver) -> None:
        self._server = server
        self._environment = {"MANX_DATASTORE": f"kubernetes://?kubeconfig={server.kubeconfig}"}

    def run(self, *arguments: str, stdin: Any = None) -> Result:
        text = None if stdin is None else json.dumps(stdin)
        result = CliRunner().invoke(main, arguments, input=text, env=self._environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def make(self, path: str, value: Any) -> None:
        code, answer = self._server.request("POST", path, value)
        assert code in (201, 409), answer

    def get(self, path: str) -> Any:
        code, answer = self._server.request("GET", path)
        assert code == 200, answer
        return answer


@pytest.fixture(scope="module")
def cluster(kube_apiserver: KubeApiserver) -> Iterator[Cluster]:
    install_crds(kube_apiserver)
    cluster = Cluster(kube_apiserver)
    cluster.make("/api/v1/namespaces", {"metadata": {"name": SPACE}})
    yield cluster
    kube_apiserver.request("DELETE", f"{POLICIES}/web")


def test_objects_of_kubernetes_are_not_shortened_to_what_manx_knows(cluster: Cluster) -> None:
    names = {"name": "web", "namespace": SPACE}
    account = {"metadata": names, "automountServiceAccountToken": False}
    ports = [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    service = {"metadata": names, "spec": {"ports": ports, "sessionAffinity": "ClientIP"}}
    for plural, kind, value in (
        ("serviceaccounts", "ServiceAccount", account),
        ("services", "Service", service),
    ):
        path = f"/api/v1/namespaces/{SPACE}/{plural}"
        cluster.make(path, value)
        before = cluster.get(f"{path}/web")
        document = {"apiVersion": "v1", "kind": kind} | value
        document["metadata"] = names | {"labels": {"a": "b"}}
        for verb in ("apply", "create", "replace"):
            result = cluster.run(verb, "-f", "-", stdin=document)
            assert result.exit_code == 1
            assert f"{kind} {SPACE}/web: kind: '{kind}': written with kubectl" in result.stderr
        result = cluster.run("patch", kind, "web", "-n", SPACE, "-p", "metadata: {labels: {a: b}}")
        assert result.exit_code == 1
        assert cluster.get(f"{path}/web") == before
        assert cluster.run("label", kind, "web", "-n", SPACE, "a=b").exit_code == 0
        after = cluster.get(f"{path}/web")
        assert after["metadata"]["labels"] == {"a": "b"}
        for part in ("spec", "automountServiceAccountToken"):
            assert after.get(part) == before.get(part)


def test_a_policy_of_kubernetes_is_written(cluster: Cluster) -> None:
    policy: dict[str, Any] = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": SPACE},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80, "endPort": 90}]}]},
    }
    title = f"NetworkPolicy {SPACE}/web"
    assert cluster.run("apply", "-f", "-", stdin=policy).output == f"{title} created\n"
    assert cluster.run("apply", "-f", "-", stdin=policy).output == f"{title} unchanged\n"


def test_a_secret_stays_as_it_is(cluster: Cluster) -> None:
    names = {"name": "bgp", "namespace": SPACE}
    secret = {"metadata": names, "type": "example.com/password", "immutable": True}
    path = f"/api/v1/namespaces/{SPACE}/secrets"
    cluster.make(path, secret | {"stringData": {"tor": "hidden"}})
    before = cluster.get(f"{path}/bgp")
    written = secret | {"data": before["data"], "apiVersion": "v1", "kind": "Secret"}
    result = cluster.run("apply", "-f", "-", stdin=written)
    assert result.output == f"Secret {SPACE}/bgp unchanged\n"
    assert cluster.run("label", "secret", "bgp", "-n", SPACE, "a=b").exit_code == 0
    after = cluster.get(f"{path}/bgp")
    assert {part: after[part] for part in ("data", "type", "immutable")} == {
        part: before[part] for part in ("data", "type", "immutable")
    }


def test_what_is_the_same_is_not_written(cluster: Cluster) -> None:
    """Though the API server has counted generations, and kubectl has left its copy."""
    rule = {"action": "Allow", "protocol": "TCP", "destination": {"ports": [80, "90:95"]}}
    policy: dict[str, Any] = {
        "apiVersion": V3,
        "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": SPACE},
        "spec": {"selector": "app == 'web'", "ingress": [rule]},
    }
    applied = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(policy)}
    labels = {"projectcalico.org/tier": "default"}
    metadata = policy["metadata"] | {"annotations": applied, "labels": labels}
    cluster.make(POLICIES, policy | {"metadata": metadata})
    before = cluster.get(f"{POLICIES}/web")
    title = f"NetworkPolicy {SPACE}/web"
    assert cluster.run("apply", "-f", "-", stdin=policy).output == f"{title} unchanged\n"
    assert cluster.get(f"{POLICIES}/web") == before
    policy["spec"]["order"] = 7
    assert cluster.run("apply", "-f", "-", stdin=policy).output == f"{title} configured\n"
    after = cluster.get(f"{POLICIES}/web")
    assert after["spec"]["order"] == 7
    assert after["metadata"]["annotations"].items() >= applied.items()
    assert after["metadata"]["labels"] == labels
    assert cluster.run("apply", "-f", "-", stdin=policy).output == f"{title} unchanged\n"


@pytest.fixture
def somebody(cluster: Cluster, kube_apiserver: KubeApiserver, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster for a user who may write policies in one namespace, and nothing else."""
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{SPACE}"
    rules = [{"apiGroups": ["projectcalico.org"], "resources": ["networkpolicies"], "verbs": ["*"]}]
    cluster.make(f"{rbac}/roles", {"metadata": {"name": "policies"}, "rules": rules})
    role = {"kind": "Role", "name": "policies", "apiGroup": "rbac.authorization.k8s.io"}
    user = {"kind": "User", "name": "nobody"}
    binding = {"metadata": {"name": "policies"}, "roleRef": role, "subjects": [user]}
    cluster.make(f"{rbac}/rolebindings", binding)
    config = kubeconfig(kube_apiserver, tmp_path / "kubeconfig", {"token": NOBODY})
    somebody = Cluster(replace(kube_apiserver, kubeconfig=config))
    policies = f"{POLICIES}/none"
    eventually(lambda: kube_apiserver.request("GET", policies, token=NOBODY)[0] == 404, seconds=30)
    yield somebody
    for path in ("rolebindings", "roles"):
        assert kube_apiserver.request("DELETE", f"{rbac}/{path}/policies")[0] == 200
    eventually(lambda: kube_apiserver.request("GET", policies, token=NOBODY)[0] == 403, seconds=30)


def test_who_may_write_in_one_namespace_may_do_so(somebody: Cluster) -> None:
    """A look whether it is meant, which they may not take, is no reason to refuse it."""
    policy = {
        "apiVersion": V3,
        "kind": "NetworkPolicy",
        "metadata": {"name": "security.own", "namespace": SPACE},
        "spec": {"tier": "security"},
    }
    name = ("networkpolicy", "security.own", "-n", SPACE)
    for command in (
        ("create", "-f", "-"),
        ("apply", "-f", "-"),
        ("replace", "-f", "-"),
        ("label", *name, "a=b"),
        ("patch", *name, "-p", "spec: {order: 5}"),
        ("delete", *name),
    ):
        result = somebody.run(*command, stdin=policy)
        assert result.exit_code == 0, result.stderr
        looks = ["the datastore is locked"]
        if command[0] not in ("label", "delete"):
            looks.append("the tiers of policies are there")
        warnings = result.stderr.splitlines()
        assert len(warnings) == len(looks)
        for warning, look in zip(warnings, looks, strict=True):
            assert warning.startswith(f"Warning: can't tell whether {look}: ")
            assert "forbidden" in warning
