"""The generated CRDs in a real API server."""

from __future__ import annotations

from typing import Any

import yaml

from manifests.crds import DIRECTORY
from tests.support.kube import KubeApiserver
from tests.support.netns import eventually

_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def install_crds(server: KubeApiserver) -> None:
    """Install those of manifests/crds; returns when all are served."""
    crds = [yaml.safe_load(file.read_text()) for file in sorted(DIRECTORY.glob("*.yaml"))]
    for crd in crds:
        code, answer = server.request("POST", f"{_PATH}?fieldValidation=Strict", crd)
        assert code in (201, 409), answer
    eventually(lambda: all(_served(server, crd) for crd in crds), seconds=30)


def _served(server: KubeApiserver, crd: Any) -> bool:
    group, plural = crd["spec"]["group"], crd["spec"]["names"]["plural"]
    version = crd["spec"]["versions"][0]["name"]
    return server.request("GET", f"/apis/{group}/{version}/{plural}?limit=1")[0] == 200
