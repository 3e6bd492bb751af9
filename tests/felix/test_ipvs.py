"""Services of kube-proxy's mode ipvs: policy sees their clients and their pods, whoever asks.

The rules are those that felix makes in the kernel here, which has no ipvs; packets meet them in a
guest whose kernel has.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api.net import parse_net
from api.profile import DEFAULT_ALLOW
from datastore.interface import JSON
from felix.chains import Mark
from felix.conntrack_judge import Judge
from kernel.conntrack import Tuple
from kernel.netns import Namespace, inside
from kernel.nftables import Nftables, Transaction
from tests.felix import ipvs_guest
from tests.felix.fabric import MAKERS
from tests.felix.gateway import FAR, NEAR, NODE, NODE_FAR, POD, Gateway, allowed, dropped
from tests.felix.world import V3, Pod, cluster, felix_configuration, global_policy
from tests.felix.world import Node as AgentNode
from tests.support.guest import run_in_guest
from tests.support.netns import connect, eventually, fresh_namespace, run

ROOT = Path(__file__).parents[2]
CLIENT = {4: "10.0.0.2", 6: "fd10::2"}
SERVICE = {4: "10.96.0.10", 6: "fd96::10"}
BACKENDS = ("nftables", "iptables")

# As kube-proxy's, but for its kind, which is dummy.
DEVICE = ("ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "other")

Probes = AbstractSet[tuple[str, str]]  # from whom, to what
SERVICES = {"pod": 8080, "far": 8081, "host": 8082, "stray": 81}
WAYS = [(who, what) for who in ("client", "near") for what in ("pod", "far", "node port")]
ASKING = set(WAYS)
# What ipvs leaves to the node: a service whose target it is, and a port that no service has.
NEARS = [("near", "host"), ("near", "stray")]
OWN_WAYS = [("client", "host"), ("client", "stray"), *NEARS]


class Node(Gateway):
    """A gateway with another pod, and the interface that kube-proxy makes in mode ipvs."""

    def __init__(self, backend: str, stack: ExitStack) -> None:
        self.transactions: list[list[tuple[int, int, str]]] = []
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setattr(Nftables, "commit", self._committing(Nftables.commit))
        super().__init__(backend, stack)
        self.client = self.node.pod("client", CLIENT[4], endpoint=False)
        stack.callback(self.client.netns.close)
        self.client.add_address(CLIENT[6])
        self.plug(self.client)
        self.add_device()

    def add_device(self) -> None:
        """What kube-proxy does first."""
        run(self.node.netns, *DEVICE)
        for address in SERVICE.values():
            added = ("ip", "address", "add", address, "dev", "kube-ipvs0", "nodad")
            run(self.node.netns, *added)
        self.look()

    def _committing(
        self, commit: Callable[[Nftables, Transaction], None]
    ) -> Callable[[Nftables, Transaction], None]:
        """Does that, and notes what was committed."""

        def noting(table: Nftables, transaction: Transaction) -> None:
            commit(table, transaction)
            messages = [(each.type, each.flags, each.body.hex()) for each in transaction.messages]
            self.transactions.append(messages)

        return noting

    def plug(self, pod: Pod, **spec: Any) -> None:
        """The pod's endpoint is written."""
        networks = [f"{CLIENT[4]}/32", f"{CLIENT[6]}/128"]
        obj = pod.endpoint(ipNetworks=networks, labels={"app": "client"}, **spec)
        self.brain.snapshot.update(pod.key, obj)
        self.brain.read()
        self.brain.enforce()

    def look(self) -> None:
        """See which addresses the node has."""
        self.brain.read()
        with inside(self.node.netns.fd):
            self.brain.dataplane.want(self.brain.calculator.calculate(self.brain.snapshot))
        self.brain.settle()  # a set goes only when the kernel has let go of its rules

    def listed(self) -> str:
        """All that enforces, as it is shown."""
        commands = ["nft -s list ruleset"]
        if self.backend != "nftables":
            variant = "legacy" if self.backend.endswith("legacy") else "nft"
            commands = [f"{each}-{variant}-save" for each in ("iptables", "ip6tables")]
            commands.append("ipset list -name")
        shown = (run(self.node.netns, *each.split()).stdout for each in commands)
        # When it was written, how many packets there were.
        return re.sub(r"(?m)^#.*$|\[.*\]$", "", "".join(shown))

    def forbids(self, target: str = POD[4], address: str = SERVICE[4], port: int = 8080) -> bool:
        """Whether a connection of the client to a service of the target is one to be ended."""
        client = parse_net(CLIENT[4])
        began = Tuple(client, parse_net(address), 6, 40000, port)
        answered = Tuple(parse_net(target), client, 6, 80, 40000)
        with inside(self.node.netns.fd):
            judge = Judge(self.brain.calculator, lambda _: None)
            try:
                return judge.forbids_tuple(began, answered)
            finally:
                judge.look_around()

    def rules(self) -> dict[str, Any]:
        """What felix told nftables since it was last asked, or all that iptables has."""
        if self.backend == "nftables":
            made, self.transactions = self.transactions, []
            return {"nftables": made}
        netns = self.node.netns
        sets = run(netns, "ipset", "save").stdout
        commands = [f"{command}-nft" for command in ("iptables", "ip6tables")]
        return {
            "ipset": re.sub(r"(?m)^create (\S+) .*$", r"\g<0>\nflush \1", sets),
            "iptables": {each: run(netns, f"{each}-save").stdout for each in commands},
        }


@dataclass(frozen=True)
class Step:
    """What is there, and who gets to what then.

    ``talks``: a connection ``begins``, or ``ends`` when the kernel is told to know it no more.
    """

    name: str
    objects: tuple[JSON, ...]
    answered: Probes
    by_host: Probes = frozenset(NEARS)  # what only nftables judges behind ipvs
    talks: str = ""
    plugged: bool = True  # whether the client has an endpoint


TO_FAR = {("near", "far"), ("client", "far")}
OF_NEAR = {each for each in ASKING if each[0] == "near"}
OF_CLIENT = ASKING - OF_NEAR
TO_POD = ASKING - TO_FAR


def on_port_80(
    *, source: JSON | None = None, selector: str = "", nets: dict[int, str] | None = None
) -> list[JSON]:
    """Allowed to the pod's own port, where services have others: of a selector or of addresses."""
    target: JSON = {"ports": [80]} | ({"selector": selector} if selector else {})
    targets = [target]
    if nets is not None:
        targets = [target | {"nets": [str(parse_net(address))]} for address in nets.values()]
    return [
        {"action": "Allow", "protocol": protocol, "source": source or {}, "destination": each}
        for protocol in ("TCP", "UDP")
        for each in targets
    ]


def of_pod(*ingress: JSON) -> JSON:
    return global_policy("pod", selector="!has(app)", types=["Ingress"], ingress=list(ingress))


def of_client(*egress: JSON) -> JSON:
    return global_policy("client", selector="has(app)", types=["Egress"], egress=list(egress))


def host_endpoint(
    interface: str, *, name: str = "", profiles: Sequence[str] = (DEFAULT_ALLOW,)
) -> JSON:
    """Guards an interface, and allows all to and from the node itself."""
    return {
        "apiVersion": V3,
        "kind": "HostEndpoint",
        "metadata": {"name": name or interface, "labels": {"interface": name or interface}},
        "spec": {"node": "node1", "interfaceName": interface, "profiles": list(profiles)},
    }


def of_interface(name: str, **spec: Any) -> JSON:
    """For what is forwarded through it."""
    where = f"interface == '{name}'"
    return global_policy(name, selector=where, applyOnForward=True, **spec)


FROM_NEAR = [{"nets": [str(parse_net(address))]} for address in NEAR.values()]
TO_HOST = felix_configuration("default", defaultEndpointToHostAction="Accept")
HOSTS = (host_endpoint("eth0"), host_endpoint("eth1"))
STEPS = (
    Step("no policy", (), ASKING, talks="begins"),
    Step("nothing may go to the pod", (of_pod(),), TO_FAR, talks="ends"),
    Step(
        "what a pod may reach is known by the pod, not by the service",
        (of_pod(*on_port_80(source={"selector": "app == 'client'"})),),
        TO_FAR | (TO_POD & OF_CLIENT),
    ),
    Step(
        "so is what comes from outside",
        (of_pod(*(rule for source in FROM_NEAR for rule in on_port_80(source=source))),),
        TO_FAR | (TO_POD & OF_NEAR),
    ),
    Step("the client may send nothing", (of_client(),), OF_NEAR),
    Step(
        "the client may send to the pod",
        (of_client(*on_port_80(selector="!has(app)")), TO_HOST),
        ASKING - {("client", "far")},
    ),
    Step(
        "what comes by a guarded interface",
        (*HOSTS, of_interface("eth0", types=["Ingress"], ingress=on_port_80(nets=POD))),
        ASKING - {("near", "far")},
        by_host=frozenset(),  # it is for what the node gets, too
    ),
    Step(
        "what leaves by a guarded interface",
        (*HOSTS, of_interface("eth1", types=["Egress"], egress=[])),
        TO_POD,
    ),
    Step(
        "what is for the node itself",
        (host_endpoint("eth0", profiles=[]), TO_HOST),
        ASKING,
        by_host=set(OWN_WAYS) - set(NEARS),
    ),
    Step("an endpoint that is not there", (), OF_NEAR, plugged=False),
    Step("no policy any more", (), ASKING),
)


Answers = list[tuple[dict[str, Any], dict[str, Any]]]  # what was asked for, and what was seen


@pytest.fixture(scope="module")
def seen() -> dict[str, Answers]:
    """By backend, of all steps. One guest is for all, as it takes long to start."""
    steps: dict[str, list[dict[str, Any]]] = {}
    plan: dict[str, Any] = {}
    for backend in BACKENDS:
        with ExitStack() as stack:
            node = Node(backend, stack)
            steps[backend] = [_planned(node, step) for step in STEPS]
            plan = _plan(node)
        steps[backend][0]["rules"]["anew"] = True
    plan["steps"] = [step for own in steps.values() for step in own]
    command = [sys.executable, "-I", "-S", ipvs_guest.__file__]
    done = run_in_guest(command, directory=ROOT, stdin=json.dumps(plan))
    assert done.returncode == 0, done.stderr
    answers = iter(json.loads(done.stdout))
    return {backend: [(step, next(answers)) for step in own] for backend, own in steps.items()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_sees_what_ipvs_sends_to_pods(seen: dict[str, Answers], backend: str) -> None:
    """From pods and from outside, to services' addresses and node ports, TCP and UDP."""
    for step, answer in seen[backend]:
        wrong = [
            probe
            for probe, answered in zip(step["probes"], answer["answered"], strict=True)
            if probe[-1] != answered
        ]
        assert wrong == [], step["name"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_policy_forbids_later_ends_at_a_service_too(
    seen: dict[str, Answers], backend: str
) -> None:
    """ipvs remembers the connection by itself; what connection tracking forgot is judged anew."""
    (_, first), (_, second), *_ = seen[backend]
    ends = (CLIENT, SERVICE, "[0-9]+", 8080), (POD, CLIENT, 80, "[0-9]+")
    told = " ".join(f"src={s[4]} dst={d[4]} sport={sp} dport={dp}" for s, d, sp, dp in ends)
    assert re.search(told, first["flow"]), "so do we judge it"
    assert second["went_on"] and second["ended"]
    known = [
        (step, each) for step, (each, _) in zip(STEPS, seen[backend], strict=True) if step.plugged
    ]
    assert [each["forbidden"] for _, each in known] == [
        ("client", "pod") not in step.answered for step, _ in known
    ]


def _planned(node: Node, step: Step) -> dict[str, Any]:
    if not step.plugged:
        node.brain.snapshot.update(node.client.key, None)
    node.enforce(*step.objects)
    ways = [(*way, protocol) for way in WAYS for protocol in ("tcp", "udp")]
    answered = {*step.answered}
    if node.backend == "nftables":
        ways += [(*way, "tcp") for way in OWN_WAYS]
        answered |= step.by_host
    planned = {
        "name": step.name,
        "rules": node.rules(),
        "forbidden": node.forbids(),
        "talks": step.talks,
        "probes": [
            [who, *_target(what, version), protocol, (who, what) in answered]
            for who, what, protocol in ways
            for version in (4, 6)
        ],
    }
    node.clean()
    if not step.plugged:
        node.plug(node.client)
    return planned


def _target(what: str, version: int) -> tuple[str, int]:
    if what == "node port":
        return NODE[version], 30080
    return SERVICE[version], SERVICES[what]


def _plan(node: Node) -> dict[str, Any]:
    """All that the guest has to know but for the steps."""

    def host(interface: str, here: dict[int, str], there: dict[int, str]) -> dict[str, Any]:
        ends = [[f"{end[4]}/24", f"{end[6]}/64"] for end in (here, there)]
        return {"interface": interface, "node": ends[0], "own": ends[1]}

    def pod(made: Pod, addresses: dict[int, str]) -> dict[str, Any]:
        networks = [str(parse_net(address)) for address in addresses.values()]
        return {"interface": made.interface, "addresses": networks}

    goals = {"pod": (POD, 80), "far": (FAR, 80), "node port": (POD, 80), "host": (NODE_FAR, 81)}
    return {
        "hosts": {"near": host("eth0", NODE, NEAR), "far": host("eth1", NODE_FAR, FAR)},
        "pods": {"pod": pod(node.pod, POD), "client": pod(node.client, CLIENT)},
        "virtual": list(SERVICE.values()),
        "services": [
            [_ported(*_target(what, version)), _ported(goal[version], port)]
            for what, (goal, port) in goals.items()
            for version in (4, 6)
        ],
        "listeners": [["pod", 80], ["far", 80], ["node", 81]],
    }


def _ported(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


# --- in the kernel here: who may send from others' addresses does as ipvs does ---


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest) -> Iterator[Node]:
    with ExitStack() as stack:
        yield Node(request.param, stack)


@pytest.fixture
def node(made: Node) -> Iterator[Node]:
    yield made
    made.clean()


def passes(
    sender: Namespace, source: dict[int, str], to: dict[int, str], mark: int = 0
) -> set[int]:
    """The IP versions in which a packet leaves that claims to be from an address."""
    found = set()
    for version, address in source.items():
        with inside(sender.fd):
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            made = socket.socket(family, socket.SOCK_DGRAM)
        with made:
            made.setsockopt(*_TRANSPARENT[version], 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            made.bind((address, 0))
            with contextlib.suppress(PermissionError):  # dropped in OUTPUT
                made.sendto(b"", (to[version], 80))
                found.add(version)
    return found


_TRANSPARENT = {4: (socket.SOL_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}  # linux/in.h, linux/in6.h
BOTH = {4, 6}


def test_rules_for_ipvs_are_recognised_by_who_made_them(node: Node) -> None:
    """Nothing of them is made anew at a restart."""
    both = ["Ingress", "Egress"]
    node.enforce(*HOSTS, of_interface("eth0", types=both), of_interface("eth1", types=both))
    node.brain.read()
    assert node.brain.apply() == 0


def test_there_is_no_chain_for_ipvs_that_nothing_leads_to(node: Node) -> None:
    node.enforce(*HOSTS, of_interface("eth0", types=["Ingress", "Egress"]))
    listed = node.listed()
    made = set(re.findall(r"cali-ipvs-[a-z-]+", listed))
    led_to = set(re.findall(r"(?:jump|goto|-j|-g) (?:filter-)?(cali-ipvs-[a-z-]+)", listed))
    assert made == led_to != set()


def test_what_the_host_sends_to_its_pods_is_its_own(node: Node) -> None:
    node.enforce(of_pod())
    assert passes(node.node.netns, NODE, POD) == BOTH
    assert passes(node.node.netns, NEAR, POD) == set()
    assert passes(node.node.netns, CLIENT, POD) == set()
    of_services = node.brain.calculator.settings.nftables.bits(Mark.SERVICE)
    assert passes(node.node.netns, NODE, POD, of_services) == set(), "it came as another's"


def test_what_is_not_tracked_of_the_host_lets_nothing_of_others_through(node: Node) -> None:
    """RAW OUTPUT sees packets that ipvs sends as if they were the host's."""
    allow = [{"action": "Allow"}]
    types = ["Ingress", "Egress"]
    untracked = of_interface("all", doNotTrack=True, types=types, ingress=allow, egress=allow)
    forward = of_interface("all", types=["Ingress"], ingress=[])
    forward["metadata"]["name"] = "forward"
    node.enforce(host_endpoint("*", name="all"), untracked)
    for target in (POD, FAR):
        assert passes(node.node.netns, NEAR, target) == BOTH
    node.enforce(forward)
    for target in (POD, FAR):
        assert passes(node.node.netns, NEAR, target) == set(), "it came by a guarded interface"
        assert passes(node.node.netns, NODE, target) == BOTH


def test_of_many_pods_each_is_known_by_its_address(node: Node) -> None:
    """So many that iptables has a chain for each sixteen."""
    with ExitStack() as stack:
        for number in range(30):
            pod = node.node.pod(f"p{number}", f"10.0.0.{100 + number}", endpoint=False)
            stack.callback(pod.netns.close)
            spec = {"labels": {"app": f"p{number}"}}
            node.brain.snapshot.update(pod.key, pod.endpoint(**spec))
            stack.callback(node.brain.snapshot.update, pod.key, None)
        node.brain.read()
        forbidden = "app == 'p17'"
        node.enforce(global_policy("one", selector=forbidden, types=["Egress"], egress=[]))
        for number in range(30):
            source = {4: f"10.0.0.{100 + number}", 6: CLIENT[6]}
            expected = {6} if number == 17 else BOTH
            assert passes(node.node.netns, source, POD) == expected, number
    node.brain.enforce()


def test_what_ipvs_leaves_to_the_node_is_for_the_node(node: Node) -> None:
    """Here that is everything. iptables can't ask again behind ipvs."""
    client = node.client.netns
    assert dropped(client, NODE, 80), "no service has the port"
    node.enforce(felix_configuration("default", kubeNodePortRanges=["80:80"]))
    assert dropped(client, NODE, 81)
    for target in (SERVICE, NODE):
        judged = dropped if node.backend == "nftables" else allowed
        assert judged(client, target, 80)
    node.enforce(TO_HOST)
    assert allowed(client, SERVICE, 80) and allowed(client, NODE, 80)


def test_what_is_for_the_node_goes_on_as_iptables_cannot_judge_it(node: Node) -> None:
    assert not node.forbids(NODE[4])
    assert not node.forbids(NODE[4], NODE[4], 30000)
    assert node.forbids(NODE[4], NODE[4], 80), "no service has the port"
    run(node.node.netns, "ip", "link", "del", "kube-ipvs0")
    node.look()
    assert node.forbids(NODE[4], NODE[4], 30000)
    node.add_device()
    node.look()


def test_without_bits_to_mark_them_packets_for_services_are_dropped(node: Node) -> None:
    masks = {f"{enforcer}MarkMask": 0x30000 for enforcer in ("iptables", "nftables")}
    node.enforce(felix_configuration("default", defaultEndpointToHostAction="Accept", **masks))
    assert dropped(node.client.netns, SERVICE, 80) and allowed(node.client.netns, NODE, 80)


def test_without_ipvs_there_is_nothing_of_it(node: Node) -> None:
    node.enforce(*HOSTS, of_interface("eth0", types=["Ingress", "Egress"]))
    run(node.node.netns, "ip", "link", "del", "kube-ipvs0")
    node.look()
    before = node.listed()
    assert "ipvs" not in before and "wl-address" not in before
    node.add_device()
    node.look()
    assert node.listed() != before
    run(node.node.netns, "ip", "link", "del", "kube-ipvs0")
    node.look()
    assert node.listed() == before
    node.add_device()
    node.look()


def test_ipvs_comes_and_goes_while_the_agent_runs() -> None:
    """With its interface; what it sent to pods before that was judged is ended."""
    with cluster("node1") as (node,), fresh_namespace() as near:
        connect(node.netns, "eth0", near, "eth0", [f"{NODE[4]}/24", f"{NEAR[4]}/24"])
        node.put(of_pod())
        pod = node.pod("pod", POD[4])
        node.start()

        def unjudged() -> bool:
            return passes(node.netns, {4: NEAR[4]}, {4: pod.address}) == {4}

        assert unjudged() and "ipvs" not in _nft(node)
        for _ in range(2):
            run(node.netns, *DEVICE)
            eventually(lambda: not unjudged())
            run(node.netns, "ip", "address", "add", SERVICE[4], "dev", "kube-ipvs0")
            eventually(lambda: f"elements = {{ {SERVICE[4]} }}" in _nft(node))
            node.kill()
            assert not unjudged()
            node.start()
            assert not unjudged() and SERVICE[4] in _nft(node)
            run(node.netns, "ip", "link", "del", "kube-ipvs0")
            eventually(unjudged)
            assert "ipvs" not in _nft(node)
        assert node.errors() == {}


def _nft(node: AgentNode) -> str:
    return run(node.netns, "nft", "list", "table", "ip", "calico").stdout
