"""CRDs in a real API server."""

from __future__ import annotations

from typing import Any

import yaml

from api.kinds import CALICO, KINDS
from tests.support.kube import REPOSITORY, KubeApiserver
from tests.support.netns import eventually

CRDS = REPOSITORY / "manifests" / "crds-later"
_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def install_crds(server: KubeApiserver) -> None:
    """Install those of manifests/crds; returns when all are served."""
    names = []
    for crd in _crds():
        code, answer = server.request("POST", _PATH, crd)
        assert code in (201, 409), answer
        names.append(crd["metadata"]["name"])
    eventually(lambda: all(_served(server, name) for name in names), seconds=30)


def _served(server: KubeApiserver, name: str) -> bool:
    plural, _, group = name.partition(".")
    version = "v3" if group == "projectcalico.org" else "v1alpha2"
    return server.request("GET", f"/apis/{group}/{version}/{plural}?limit=1")[0] == 200


def _crds() -> list[Any]:
    if CRDS.is_dir():
        return [
            document
            for file in sorted(CRDS.glob("*.yaml"))
            for document in yaml.safe_load_all(file.read_text())
            if document
        ]
    return [
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{kind.resource}.projectcalico.org"},
            "spec": {
                "group": "projectcalico.org",
                "scope": "Namespaced" if kind.namespaced else "Cluster",
                "names": {"plural": kind.resource, "kind": kind.kind, "singular": kind.id.lower()},
                "versions": [
                    {
                        "name": "v3",
                        "served": True,
                        "storage": True,
                        "schema": {
                            "openAPIV3Schema": {
                                "type": "object",
                                "x-kubernetes-preserve-unknown-fields": True,
                            }
                        },
                    }
                ],
            },
        }
        for kind in KINDS.values()
        if kind.api_version == CALICO and kind.id not in ("Node", "WorkloadEndpoint", "Profile")
    ]
