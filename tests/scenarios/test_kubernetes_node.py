"""A whole node whose only store is the Kubernetes API: what a kubelet would do, packets tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from datastore.interface import JSON
from tests.bird_glue.world import Station
from tests.felix.world import Listener, is_dropped, reaches
from tests.scenarios.machine import ADDRESS, NAMESPACE, NODE, Machine, machine
from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver, api_server
from tests.support.netns import eventually, fresh_namespace, run
from tests.support.relay import Relay

# to start an API server takes a busy machine a minute
pytestmark = pytest.mark.timeout(300)

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
CALICO = "/apis/projectcalico.org/v3"
PREFIX = "cni.projectcalico.org/"
PORT = 8080
TRY_AGAIN_LATER = 11


class Cluster:
    """An API server, and a node that reaches it through a relay."""

    def __init__(self, server: KubeApiserver, node: Machine) -> None:
        self.server = server
        self.node = node

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        code, answer = self.server.request(method, path, body)
        assert code < 300, answer
        return answer

    def pod(self, name: str, **annotations: str) -> Station:
        """As the scheduler leaves it, and its namespace, not plugged yet."""
        value: JSON = {
            "metadata": {
                "name": name,
                "labels": {"app": name},
                "annotations": {PREFIX + key: text for key, text in annotations.items()},
            },
            "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "x"}]},
        }
        self.ask("POST", PODS, value)
        return self.node.container(name)

    def annotations(self, name: str) -> dict[str, str]:
        """What the pod says of itself now."""
        own = self.ask("GET", f"{PODS}/{name}")["metadata"].get("annotations") or {}
        return {key.removeprefix(PREFIX): text for key, text in own.items()}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        server = stack.enter_context(api_server())
        install_crds(server)
        ground = stack.enter_context(fresh_namespace())
        run(ground, "ip", "link", "add", "eth0", "up", "type", "veth", "peer", "name", "wire")
        run(ground, "ip", "link", "set", "wire", "up")
        run(ground, "ip", "address", "add", ADDRESS, "dev", "eth0")
        relay = Relay(server.url.removeprefix("https://"), ground)
        stack.callback(relay.close)
        config = tmp_path / "kubeconfig"
        there = f"https://{relay.endpoint}"
        config.write_text(server.kubeconfig.read_text().replace(server.url, there))
        url = f"kubernetes://?kubeconfig={config}"
        node = stack.enter_context(machine(url, namespace=ground))
        made = Cluster(server, node)
        made.ask("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        made.ask("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
        for name, cidr in (("pods", "10.65.0.0/16"), ("rare", "10.66.0.0/24")):
            pool = {"apiVersion": "projectcalico.org/v3", "kind": "IPPool"}
            spec = {"cidr": cidr} | ({"nodeSelector": "!all()"} if name == "rare" else {})
            body = pool | {"metadata": {"name": name}, "spec": spec}
            made.ask("POST", f"{CALICO}/ippools", body)
        node.start()
        eventually(node.followed)
        yield made


def test_pods_from_their_annotations_to_packets(cluster: Cluster) -> None:
    node = cluster.node
    plain = cluster.pod("plain")
    fixed = cluster.pod("fixed", ipAddrs='["10.65.9.9"]', hwAddr="0a:58:0a:41:09:09")
    rare = cluster.pod("rare", ipv4pools='["rare"]')
    pods = {
        name: node.plug(pod) for name, pod in (("plain", plain), ("fixed", fixed), ("rare", rare))
    }
    assert pods["fixed"] == "10.65.9.9"
    assert pods["rare"].startswith("10.66.0.")
    for name, address in pods.items():
        assert cluster.annotations(name)["podIP"] == f"{address}/32"
        assert cluster.annotations(name)["containerID"] == f"container-{name}"
        eventually(lambda to=address: plain.reaches(to))  # type: ignore[misc]
    assert "0a:58:0a:41:09:09" in run(fixed.namespace, "ip", "link", "show", "eth0").stdout
    eventually(lambda: len(node.status()["bgp"]["blocks"]) == 3)

    with Listener(fixed.namespace, PORT):
        assert reaches(plain.namespace, pods["fixed"], PORT)
        policy = {
            "metadata": {"name": "only-rare"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "fixed"}},
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "rare"}}}]}],
            },
        }
        policies = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"
        cluster.ask("POST", policies, policy)
        eventually(lambda: is_dropped(plain.namespace, pods["fixed"], PORT))
        assert reaches(rare.namespace, pods["fixed"], PORT)

    told = node.manx("explain", "plain", "fixed", "-n", NAMESPACE, "-p", str(PORT)).stdout
    assert told.splitlines()[-1] == "Denied"
    for name, pod in (("plain", plain), ("fixed", fixed), ("rare", rare)):
        assert node.call("DEL", pod)[0] == 0
        assert cluster.annotations(name)["podIP"] == ""
    checked = node.manx("ipam", "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert node.manx("ipam", "show", "--ip", "10.65.9.9").stdout == "10.65.9.9 is not in use\n"


def test_an_api_server_that_goes_and_comes(cluster: Cluster) -> None:
    node = cluster.node
    one, late = cluster.pod("one"), cluster.pod("late")
    address = node.plug(one)
    cluster.server.kill()
    code, answer = node.call("ADD", late)
    assert (code != 0, answer["code"]) == (True, TRY_AGAIN_LATER)
    assert one.reaches(address)
    cluster.server.start()
    eventually(lambda: node.call("ADD", late)[0] == 0)
    found = cluster.annotations("late")["podIP"].partition("/")[0]
    eventually(lambda: one.reaches(found))
    assert node.call("DEL", one)[0] == 0
    eventually(node.followed)
