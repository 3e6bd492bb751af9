"""The datastore contract against an API server as clusters run it: with its watch cache.

All but what asks that the server forget what its etcd forgets: with the cache it doesn't.
"""

from __future__ import annotations

import inspect

import pytest

from tests.contracts import backends, test_datastore
from tests.contracts.backends import Backend
from tests.support.kube import KubeApiserver

for _name, _test in vars(test_datastore).items():
    if _name.startswith("test_") and "forget_history" not in inspect.getsource(_test):
        globals()[_name] = _test


@pytest.fixture(scope="module")
def server(kube_apiserver: KubeApiserver) -> KubeApiserver:
    backends.prepare(kube_apiserver)
    return kube_apiserver


@pytest.fixture
def backend(server: KubeApiserver) -> Backend:
    """An empty store."""
    return backends.kubernetes(server)
