"""The real etcd and kube-apiserver that other tests lean on."""

from __future__ import annotations

from tests.support.etcd import Etcd
from tests.support.kube import NEXT_ADMIN, NOBODY, KubeApiserver, version
from tests.support.netns import eventually


def test_etcd_keeps_what_it_was_given_when_killed(etcd: Etcd) -> None:
    put = {"key": "c3VwcG9ydA==", "value": "MQ=="}
    etcd.members[0].call("/v3/kv/put", put)
    assert etcd.members[0].call("/v3/kv/range", {"key": put["key"]})["kvs"][0]["value"] == "MQ=="
    assert etcd.leader() is etcd.members[0]


def test_a_cluster_outlives_its_leader(etcd_cluster: Etcd) -> None:
    leader = etcd_cluster.leader()
    assert leader.url.startswith("https://")
    leader.kill()

    def other_leads() -> bool:
        try:
            return etcd_cluster.leader() is not leader
        except RuntimeError:
            return False

    eventually(other_leads, 30)
    leader.start()
    assert all(member.ready() for member in etcd_cluster.members)


def test_an_api_server_knows_users_and_version(kube_apiserver: KubeApiserver) -> None:
    assert kube_apiserver.request("GET", "/version")[1]["gitVersion"] == version()
    namespaces = "/api/v1/namespaces"
    assert kube_apiserver.request("GET", namespaces, token=NEXT_ADMIN)[0] == 200
    assert kube_apiserver.request("GET", namespaces, token=NOBODY)[0] == 403
    assert kube_apiserver.request("GET", namespaces, token="wrong")[0] == 401
