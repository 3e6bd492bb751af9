"""On the Kubernetes datastore, where an endpoint is what its Pod's annotations say of it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.errors import NO_ENDPOINT
from datastore.interface import Key
from kernel.netlink import NetlinkSocket
from kernel.qdiscs import Qdiscs
from tests.cni.rig import NODE, Container, Felix, Rig, configuration
from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver
from tests.support.netns import eventually
from tests.support.relay import Relay

# to start an API server takes a busy machine a minute
pytestmark = pytest.mark.timeout(300)

NAMESPACE = "cni-red"
PREFIX = "tapc"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
NODE_PATH = f"/api/v1/nodes/{NODE}"


@pytest.fixture(scope="module")
def _node(kube_apiserver: KubeApiserver, c_client: Path) -> Iterator[tuple[Rig, Felix]]:
    install_crds(kube_apiserver)
    for path, name in (("/api/v1/namespaces", NAMESPACE), ("/api/v1/nodes", NODE)):
        code, answer = kube_apiserver.request("POST", path, {"metadata": {"name": name}})
        assert code in (201, 409), answer
    url = f"kubernetes://?kubeconfig={kube_apiserver.kubeconfig}"
    with tempfile.TemporaryDirectory(prefix="manx-cni-") as directory:
        rig = Rig(Path(directory), c_client, url, PREFIX)
        relay = Relay(kube_apiserver.url.removeprefix("https://"), rig.namespace)
        kubeconfig = Path(directory, "kubeconfig")
        there = f"https://{relay.endpoint}"
        kubeconfig.write_text(
            kube_apiserver.kubeconfig.read_text().replace(kube_apiserver.url, there)
        )
        rig.url = f"kubernetes://?kubeconfig={kubeconfig}"
        felix = Felix(rig)
        try:
            rig.create("IPPool", "cni-pods", spec={"cidr": "10.65.0.0/24"})
            rig.create("FelixConfiguration", "default", spec={"interfacePrefix": PREFIX})
            rig.start()
            felix.start()
            yield rig, felix
        finally:
            felix.kill()
            for kind in ("IPAMBlock", "BlockAffinity"):
                for entry in rig.store.list(kind).entries:
                    rig.store.delete(entry.key)
            rig.store.delete(Key("IPPool", "cni-pods"))
            rig.store.delete(Key("FelixConfiguration", "default"))
            rig.close()
            relay.close()
            kube_apiserver.request("DELETE", NODE_PATH)


@pytest.fixture
def rig(_node: tuple[Rig, Felix]) -> Rig:
    return _node[0]


@pytest.fixture
def pod(rig: Rig, kube_apiserver: KubeApiserver) -> Iterator[Container]:
    """A container of a Pod that is bound to the node."""
    name = f"web-{uuid.uuid4().hex[:8]}"
    spec = {"nodeName": NODE, "containers": [{"name": "c", "image": "x"}]}
    code, answer = kube_apiserver.request("POST", PODS, {"metadata": {"name": name}, "spec": spec})
    assert code == 201, answer
    container = rig.container(name)
    container.arguments = f"K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name}"
    yield container
    code, answer = kube_apiserver.request("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
    assert code == 200, answer


def test_wires_that_are_called_otherwise(rig: Rig, pod: Container) -> None:
    """Felix finds the wire by the name that the endpoint says, and the DEL does, too."""
    conf, pod_name = (
        configuration(policy_setup_timeout_seconds=30),
        pod.arguments.rpartition("=")[2],
    )
    result = rig.call("ADD", pod, conf).ok()
    (name,) = rig.links()
    assert name == result["interfaces"][0]["name"]
    assert name.startswith(PREFIX)
    (spec,) = (e["spec"] for e in rig.endpoints().values() if e["spec"]["pod"] == pod_name)
    assert (spec["interfaceName"], len(spec["ipNetworks"])) == (name, 1)
    assert rig.call("CHECK", pod, conf | {"prevResult": result}).ok() is None
    rig.delete(pod)
    assert rig.links() == set()
    assert rig.held() == {}
    rig.delete(pod)


def test_a_pod_that_names_the_beginning_itself(
    rig: Rig, pod: Container, kube_apiserver: KubeApiserver
) -> None:
    """It is only the beginning, and the ADD puts it right."""
    name = pod.arguments.rpartition("=")[2]
    annotations = {"cni.manx.dev/interfacePrefix": "eth", "cni.manx.dev/other": "kept"}
    rig.kill()
    code, answer = kube_apiserver.request("GET", f"{PODS}/{name}")
    assert code == 200
    answer["metadata"]["annotations"] = annotations
    assert kube_apiserver.request("PUT", f"{PODS}/{name}", answer)[0] == 200
    (spec,) = (e["spec"] for e in rig.endpoints().values() if e["spec"]["pod"] == name)
    assert spec["interfaceName"].startswith("eth")
    rig.start()
    rig.call("ADD", pod, configuration()).ok()
    (spec,) = (e["spec"] for e in rig.endpoints().values() if e["spec"]["pod"] == name)
    assert spec["interfaceName"] in rig.links()
    rig.delete(pod)


def test_limits_follow_the_annotations(
    rig: Rig, pod: Container, kube_apiserver: KubeApiserver
) -> None:
    """Of a pod that runs, as ``kubectl annotate`` changes them."""
    path = f"{PODS}/{pod.arguments.rpartition('=')[2]}"

    def annotate(bandwidth: str | None) -> None:
        annotations = {"qos.projectcalico.org/ingressBandwidth": bandwidth}
        patch = {"metadata": {"annotations": annotations}}
        code, answer = kube_apiserver.request(
            "PATCH", path, patch, media_type="application/merge-patch+json"
        )
        assert code == 200, answer

    def rates() -> list[int]:
        with NetlinkSocket(netns_fd=rig.namespace.fd) as netlink:
            return [bucket.rate for bucket in Qdiscs(netlink).buckets().values()]

    rig.call("ADD", pod, configuration(policy_setup_timeout_seconds=30)).ok()
    assert rates() == []
    for asked, rate in (("8M", [10**6]), ("16M", [2 * 10**6]), (None, [])):
        annotate(asked)
        eventually(lambda rate=rate: rates() == rate)  # type: ignore[misc]
    rig.delete(pod)


def test_what_has_no_endpoint_there(rig: Rig, pod: Container) -> None:
    """A second interface, and a container that is no pod's, are refused before they are made."""
    second = Container(pod.namespace, pod.id, pod.arguments, "net1")
    other = rig.container(pod=False)
    for container, what in ((second, "net1"), (other, "K8S_POD_NAME")):
        answer = rig.call("ADD", container, configuration())
        assert answer.error == NO_ENDPOINT
        assert what in answer.json["msg"]
        assert "Kubernetes" in answer.json["msg"]
        assert container.links() == set()
        rig.delete(container)
    assert rig.held() == {}
    assert rig.links() == set()
