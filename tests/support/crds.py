"""The generated CRDs and admission policies in a real API server."""

from __future__ import annotations

from typing import Any

import yaml

from api.kinds import CALICO, KINDS
from manifests import admission
from manifests.crds import DIRECTORY
from tests.support.kube import KubeApiserver
from tests.support.netns import eventually

_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def install_crds(server: KubeApiserver) -> None:
    """Install those of manifests/crds; returns when all are served."""
    crds = [yaml.safe_load(file.read_text()) for file in sorted(DIRECTORY.glob("*.yaml"))]
    for crd in crds:
        code, answer = server.request("POST", f"{_PATH}?fieldValidation=Strict", crd)
        assert code in (201, 409), answer
    eventually(lambda: all(_served(server, crd) for crd in crds))


def _served(server: KubeApiserver, crd: Any) -> bool:
    group, plural = crd["spec"]["group"], crd["spec"]["names"]["plural"]
    version = crd["spec"]["versions"][0]["name"]
    return server.request("GET", f"/apis/{group}/{version}/{plural}?limit=1")[0] == 200


def install_admission(server: KubeApiserver) -> None:
    """Install manifests/admission, after the CRDs; returns when all of it is at work."""
    for file in sorted(admission.DIRECTORY.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            resource = document["kind"].lower().replace("policy", "policies")
            resource = resource.replace("policiesbinding", "policybindings")
            path = f"{_ADMISSION}/{resource}?fieldValidation=Strict"
            code, answer = server.request("POST", path, document)
            assert code == 201, answer
    eventually(lambda: _active(server))


def _active(server: KubeApiserver) -> bool:
    """Whether the last of both kinds is at work.

    Until the defaults are, what checks their results may refuse the pool.
    """

    def created(kind: str, metadata: Any, spec: Any) -> tuple[int, Any]:
        value = {"apiVersion": CALICO, "kind": kind, "metadata": metadata, "spec": spec}
        space = "/namespaces/default" if KINDS[kind].namespaced else ""
        path = f"/apis/{CALICO}{space}/{KINDS[kind].resource}?dryRun=All&fieldValidation=Strict"
        return server.request("POST", path, value)

    labels = {"projectcalico.org/namespace": "a"}
    metadata = {"name": "x", "namespace": "default", "labels": labels}
    if created("NetworkSet", metadata, {})[0] != 422:
        return False
    code, stored = created("IPPool", {"name": "x"}, {"cidr": "10.0.0.0/16"})
    return code == 201 and "blockSize" in stored["spec"]
