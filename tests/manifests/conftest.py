"""A real API server that has the generated CRDs."""

from __future__ import annotations

import pytest

from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver


@pytest.fixture(scope="session")
def server(kube_apiserver: KubeApiserver) -> KubeApiserver:
    install_crds(kube_apiserver)
    return kube_apiserver
