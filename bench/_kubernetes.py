"""The Kubernetes store, beside the ``kubernetes`` package on the same API server."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import orjson

from bench._measure import (
    OBJECTS,
    Connect,
    cost,
    cost_of_list,
    in_turn,
    measure,
    plain_delays,
    quantiles,
    ratio,
    typical,
)
from bench._objects import block
from datastore import etcd_pb2 as pb
from datastore.etcd_client import TXN
from datastore.interface import JSON
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver, api_server

_LISTS = 3  # of each side


def run() -> dict[str, float]:
    """Measure."""
    with api_server() as server:
        install_crds(server)
        server.request("POST", "/api/v1/namespaces", {"metadata": {"name": "shop"}})
        kubeconfig = str(server.kubeconfig)
        connect = partial(KubernetesDatastore, KubernetesSettings(kubeconfig))
        figures = measure(connect)
        figures |= quantiles("plain_watch", _plain_watch(connect, kubeconfig))
        figures |= _swaps_in_turn(connect, kubeconfig)
        _fill(server)
        return figures | _lists_in_turn(connect, kubeconfig)


def _lists_in_turn(connect: Connect, kubeconfig: str) -> dict[str, float]:
    """In turn: the first list of all is dearer, whoever asks for it."""
    rounds = [
        (
            cost_of_list(connect, "WorkloadEndpoint"),
            cost_of_list(connect, "Pod"),
            cost(partial(_plain_list, kubeconfig)),
        )
        for _ in range(_LISTS)
    ]
    endpoints, pods, plain = map(typical, zip(*rounds, strict=True))
    return endpoints.named("list_10k") | pods.named("list_10k_pods") | plain.named("plain_list_10k")


def _plain_watch(connect: Connect, kubeconfig: str) -> list[float]:
    """The package's watch."""
    from kubernetes import client, config, watch

    config.load_kube_config(kubeconfig)  # type: ignore[no-untyped-call]
    api = client.CustomObjectsApi()
    where = ("projectcalico.org", "v3", "ipamblocks")
    listed: Any = api.list_cluster_custom_object(*where)
    now = listed["metadata"]["resourceVersion"]
    stream = watch.Watch().stream(  # type: ignore[no-untyped-call]
        api.list_cluster_custom_object, *where, resource_version=now, timeout_seconds=120
    )
    return plain_delays(connect, lambda: [next(stream)["object"]])


def _swaps_in_turn(connect: Connect, kubeconfig: str) -> dict[str, float]:
    """Swaps a second of one client: ours, and the package's, in turn."""
    from kubernetes import client, config

    store = connect()
    entry = store.create(*block(10))
    config.load_kube_config(kubeconfig)  # type: ignore[no-untyped-call]
    api = client.CustomObjectsApi()
    where = ("projectcalico.org", "v3", "ipamblocks")
    key, value = block(11)
    theirs: Any = api.create_cluster_custom_object(*where, value)

    def ours() -> None:
        nonlocal entry
        entry.value["spec"]["sequenceNumber"] += 1
        entry = store.update(entry.key, entry.value, entry.revision)

    def plain() -> None:
        nonlocal theirs
        theirs["spec"]["sequenceNumber"] += 1
        theirs = api.replace_cluster_custom_object(*where, key.name, theirs)

    rates = in_turn({"ours": ours, "plain": plain})
    store.close()
    return {
        "cas_one_client_per_s": statistics.median(rates["ours"]),
        "plain_cas_per_s": statistics.median(rates["plain"]),
        "cas_ratio": ratio(rates["ours"], rates["plain"]),
    }


def _plain_list(kubeconfig: str) -> Callable[[], int]:
    """All pods, in parts, as models of the package."""
    from kubernetes import client, config

    config.load_kube_config(kubeconfig)  # type: ignore[no-untyped-call]
    api = client.CoreV1Api()
    api.list_namespace()
    pods: list[Any] = []

    def list_all() -> int:
        after = None
        while True:
            part: Any = api.list_pod_for_all_namespaces(limit=500, _continue=after)
            pods.extend(part.items)
            after = part.metadata._continue
            if not after:
                return len(pods)

    return list_all


def _fill(server: KubeApiserver) -> None:
    """Pods to list, straight into the API server's etcd: it also reads JSON there."""
    puts = [
        pb.RequestOp(
            request_put=pb.PutRequest(
                key=f"/registry/pods/shop/web-{number}".encode(), value=orjson.dumps(_pod(number))
            )
        )
        for number in range(OBJECTS)
    ]
    with grpc.insecure_channel(server.etcd.endpoints[0]) as channel:
        txn = channel.unary_unary(
            TXN.path,
            request_serializer=pb.TxnRequest.SerializeToString,
            response_deserializer=pb.TxnResponse.FromString,
        )
        for first in range(0, len(puts), 100):
            txn(pb.TxnRequest(success=puts[first : first + 100]))
    # answered once the server has heard of them all
    server.request("GET", "/api/v1/pods?limit=1")


def _pod(number: int) -> JSON:
    """A pod as a cluster has them, about 3.3 KB."""
    name, address = f"web-{number}", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    container_id = f"{number:064x}"
    condition = {"status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "shop",
            "uid": f"30316465-6365-4463-ad63-{number:012}",
            "generateName": "web-",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "web", "pod-template-hash": "7d4b9c6f5", "tier": "front"},
            "annotations": {
                "cni.projectcalico.org/containerID": container_id,
                "cni.projectcalico.org/podIP": f"{address}/32",
                "cni.projectcalico.org/podIPs": f"{address}/32",
            },
            "ownerReferences": [
                {
                    "apiVersion": "apps/v1",
                    "kind": "ReplicaSet",
                    "name": "web-7d4b9c6f5",
                    "uid": "30316465-6365-4463-ad63-000000000000",
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
            "managedFields": [
                {
                    "manager": "kubelet",
                    "operation": "Update",
                    "apiVersion": "v1",
                    "time": "2026-01-01T00:00:00Z",
                    "fieldsType": "FieldsV1",
                    "fieldsV1": {f"f:field{index}": {"f:value": {}} for index in range(24)},
                }
            ],
        },
        "spec": {
            "nodeName": f"node-{number % 100}",
            "serviceAccountName": "default",
            "restartPolicy": "Always",
            "dnsPolicy": "ClusterFirst",
            "containers": [
                {
                    "name": "web",
                    "image": "registry.example.org/shop/web:1.2.3",
                    "imagePullPolicy": "IfNotPresent",
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                    "env": [
                        {"name": f"SETTING_{index}", "value": "a value of some length"}
                        for index in range(10)
                    ],
                    "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
                }
            ],
        },
        "status": {
            "phase": "Running",
            "hostIP": "10.1.0.1",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [
                {"type": type_, **condition}
                for type_ in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
            ],
            "containerStatuses": [
                {
                    "name": "web",
                    "image": "registry.example.org/shop/web:1.2.3",
                    "imageID": f"registry.example.org/shop/web@sha256:{container_id}",
                    "containerID": f"containerd://{container_id}",
                    "ready": True,
                    "restartCount": 0,
                    "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
                }
            ],
        },
    }
