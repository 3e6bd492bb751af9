"""A node on the Kubernetes API: a kubelet registers it, policy is applied, packets judge."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.registry import parse
from datastore.connect import connect
from datastore.interface import JSON, Key
from datastore.kubernetes import KubernetesDatastore
from datastore.kubernetes_client import KubernetesSettings
from tests.felix.world import Listener, Node, is_dropped, reaches
from tests.support.crds import install_crds
from tests.support.kube import KubeApiserver
from tests.support.netns import eventually, run
from tests.support.relay import Relay

# to start an API server takes a busy machine a minute
pytestmark = pytest.mark.timeout(300)

PORT = 8080
POLICY_KINDS = (
    "GlobalNetworkPolicy",
    "ClusterNetworkPolicy",
    "AdminNetworkPolicy",
    "BaselineAdminNetworkPolicy",
)
POLICIES = """
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: only-frontend}
spec:
  selector: app == 'web'
  ingress:
    - {action: Allow, source: {selector: app == 'frontend'}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: frontend-is-closed}
spec:
  podSelector: {matchLabels: {app: frontend}}
  policyTypes: [Ingress]
"""
PATHS = {
    "projectcalico.org/v3": "/apis/projectcalico.org/v3",
    "networking.k8s.io/v1": "/apis/networking.k8s.io/v1",
}


class Cluster:
    """One node of a cluster whose API server it reaches through a relay in its namespace."""

    def __init__(self, server: KubeApiserver, directory: Path, stack: ExitStack) -> None:
        self.server = server
        self.store = stack.enter_context(closing(client(server)))
        self.name = f"node-{uuid.uuid4().hex[:8]}"
        self.space = f"space-{uuid.uuid4().hex[:8]}"
        self.node = Node(self.name, self.store, "", directory, None)
        stack.callback(self.node.close)
        self.relay = Relay(server.url.removeprefix("https://"), self.node.netns)
        stack.callback(self.relay.close)
        config = directory / "kubeconfig"
        there = f"https://{self.relay.endpoint}"
        config.write_text(server.kubeconfig.read_text().replace(server.url, there))
        self.node.url = f"kubernetes://?kubeconfig={config}"
        self.ask("POST", "/api/v1/namespaces", {"metadata": {"name": self.space}})

    def ask(self, method: str, path: str, body: Any = None) -> JSON:
        code, answer = self.server.request(method, path, body)
        assert code < 300, answer
        found: JSON = answer
        return found

    def apply(self, text: str) -> None:
        """``kubectl apply --server-side -f -``"""
        for document in yaml.safe_load_all(text):
            resource = f"{PATHS[document['apiVersion']]}/namespaces/{self.space}/networkpolicies"
            code, answer = self.server.request(
                "PATCH",
                f"{resource}/{document['metadata']['name']}?fieldManager=test&fieldValidation=Strict",
                document,
                media_type="application/apply-patch+yaml",
            )
            assert code in (200, 201), answer

    def vxlan_pool(self) -> Key:
        spec = {"cidr": "10.98.0.0/16", "vxlanMode": "Always"}
        return self.node.put(
            {
                "apiVersion": "projectcalico.org/v3",
                "kind": "IPPool",
                "metadata": {"name": f"pool-{self.name}"},
                "spec": spec,
            }
        )

    def register(self, *addresses: str) -> None:
        """As a kubelet does: the Node, then its status, as a patch.

        The patch names no revision: others, such as we, write the Node as soon as it is there.
        """
        self.ask("POST", "/api/v1/nodes", {"metadata": {"name": self.name}})
        told = [{"type": "InternalIP", "address": text} for text in addresses]
        code, answer = self.server.request(
            "PATCH",
            f"/api/v1/nodes/{self.name}/status",
            {"status": {"addresses": [*told, {"type": "Hostname", "address": self.name}]}},
            media_type="application/strategic-merge-patch+json",
        )
        assert code == 200, answer

    def pod(self, name: str, address: str) -> Any:
        """A pod as the scheduler and the CNI plugin leave it."""
        container = {"name": "c", "image": "x"}
        value = {
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"nodeName": self.name, "containers": [container]},
        }
        self.ask("POST", f"/api/v1/namespaces/{self.space}/pods", value)
        return self.node.pod(name, address, namespace=self.space)


def client(server: KubeApiserver) -> KubernetesDatastore:
    return KubernetesDatastore(KubernetesSettings(str(server.kubeconfig)))


@pytest.fixture
def cluster(kube_apiserver: KubeApiserver, tmp_path: Path) -> Iterator[Cluster]:
    install_crds(kube_apiserver)
    with ExitStack() as stack:
        made = Cluster(kube_apiserver, tmp_path, stack)
        for kind in POLICY_KINDS:  # the server is shared: what others left would count here
            for entry in made.store.list(kind).entries:
                made.store.delete(entry.key)
        yield made


def test_a_node_that_a_kubelet_registered_becomes_one_of_ours(cluster: Cluster) -> None:
    node, key = cluster.node, Key("Node", cluster.name)
    for number in (0, 1):
        name = f"eth{number}"
        run(node.netns, "ip", "link", "add", name, "type", "veth", "peer", f"peer{number}")
        run(node.netns, "ip", "address", "add", f"192.0.2.{number + 7}/24", "dev", name)
        run(node.netns, "ip", "link", "set", name, "up")
    pool = cluster.vxlan_pool()
    node.start()
    # before the kubelet came there is nothing to write to
    eventually(lambda: "kubelet" in node.errors().get(str(key), ""))
    cluster.register("203.0.113.9", "192.0.2.8")
    eventually(lambda: str(key) not in node.errors())
    with closing(connect(f"kubernetes://?kubeconfig={cluster.server.kubeconfig}")) as other:
        # two rooms write it, neither waits for the other
        wanted = {"bgp", "ipv4VXLANTunnelAddr", "vxlanTunnelMACAddr"}
        eventually(lambda: wanted <= other.get(key).value["spec"].keys())
        value = other.get(key).value
        parse(value)
        spec = value["spec"]
        assert spec["bgp"] == {"ipv4Address": "192.0.2.8/24"}
        assert spec["ipv4VXLANTunnelAddr"].startswith("10.98.")
        assert spec["vxlanTunnelMACAddr"].startswith("66:")
        assert spec["orchRefs"] == [{"nodeName": cluster.name, "orchestrator": "k8s"}]
        assert {"address": "192.0.2.8/24", "type": "CalicoNodeIP"} in spec["addresses"]
        handle = other.get(Key("IPAMHandle", f"vxlan-tunnel-addr-{cluster.name}"))
        assert sum(handle.value["spec"]["block"].values()) == 1
        other.delete(pool)
        # the pool is gone: so is the tunnel, and its address is given back
        eventually(lambda: "ipv4VXLANTunnelAddr" not in other.get(key).value["spec"])
        assert other.get(key).value["spec"]["bgp"] == {"ipv4Address": "192.0.2.8/24"}


def test_policy_applied_to_the_api_server_judges_packets(cluster: Cluster) -> None:
    cluster.register("192.0.2.7")
    cluster.node.address = "192.0.2.7/24"
    cluster.node.start()
    web = cluster.pod("web", "10.0.0.1")
    frontend = cluster.pod("frontend", "10.0.0.2")
    other = cluster.pod("other", "10.0.0.3")
    with Listener(web.netns, PORT), Listener(frontend.netns, PORT):
        for source, target in ((other, web), (frontend, web), (web, frontend)):
            assert reaches(source.netns, target.address, PORT)
        cluster.apply(POLICIES)
        eventually(lambda: is_dropped(other.netns, web.address, PORT))
        eventually(lambda: is_dropped(web.netns, frontend.address, PORT))
        assert reaches(frontend.netns, web.address, PORT)
        # a label that somebody changes in the API counts at once
        path = f"/api/v1/namespaces/{cluster.space}/pods/other"
        code, answer = cluster.server.request(
            "PATCH",
            path,
            {"metadata": {"labels": {"app": "frontend"}}},
            media_type="application/merge-patch+json",
        )
        assert code == 200, answer
        eventually(lambda: not is_dropped(other.netns, web.address, PORT))
