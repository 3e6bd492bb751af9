"""The demo's steps, each a function of the running demo."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network
from pathlib import Path

from demo.report import Expected, Report
from lab.client import Lab, PodInfo
from lab.errors import LabError
from lab.fabric import Fabric, Pod
from lab.flow import Flow, arrivals
from lab.probe import Pair, Probe, Reach, Station, first_reply

FOLDER = Path(__file__).parent
PATIENCE = 60.0  # seconds for the network to become what it should be
ADD_GOAL = 0.025  # seconds from CNI ADD to the first ping's answer, median
SAMPLES = 8  # pods a node creates for that figure


def everything(pair: Pair) -> tuple[bool, bool]:
    """All pairs reach each other."""
    return True, True


class Demo:
    """The running demo: the lab, its pods, what is printed."""

    def __init__(self, lab: Lab, fabric: Fabric, report: Report) -> None:
        self.lab = lab
        self.report = report
        self.nodes = [node.name for _, node in fabric.all_nodes()]
        self.racks = {node.name: rack.name for rack, node in fabric.all_nodes()}
        self.pods: list[PodInfo] = []

    def names(self) -> list[str]:
        """What stands in the matrix: pods, nodes, the host outside."""
        return [*(pod.name for pod in self.pods), *self.nodes, "outside"]

    def manxctl(self, *arguments: str, show: bool = True) -> str:
        """Run manxctl on the first node; its output. Raises LabError when it fails."""
        result = self.lab.run(self.nodes[0], "manxctl", *arguments)
        if result.returncode != 0:
            raise LabError(f"manxctl {' '.join(arguments)} failed", result.stdout + result.stderr)
        if show:
            shown = [each.removeprefix(f"{FOLDER.parent}/") for each in arguments]
            self.report.output(self.nodes[0], " ".join(["manxctl", *shown]), result.stdout)
        return result.stdout

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is so; whether it became so in time."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def show_matrix(
        self, expected: Expected, sentence: str, names: Iterable[str] | None = None
    ) -> dict[Pair, Reach]:
        """Measure, print and check the matrix of all names."""
        listed = list(names or self.names())
        deadline = time.monotonic() + PATIENCE
        with Probe.of(self.lab, listed) as probe:
            while True:
                found = probe.matrix()
                wrong = [
                    f"{a} → {b}"
                    for (a, b), reach in found.items()
                    if (reach.tcp, reach.icmp) != expected((a, b))
                ]
                if not wrong or time.monotonic() > deadline:
                    break
        self.report.matrix(listed, found, expected)
        self.report.check(sentence, not wrong, wrong)
        return found


def programs(demo: Demo) -> None:
    """Everything that should run runs."""
    members = demo.lab.status()["members"]
    for role, text in (("router", "{} routers run"), ("node", "{} nodes run")):
        mine = [each for each in members if each["role"] == role]
        names = sorted({program["name"] for each in mine for program in each["programs"]})
        broken = [
            f"{each['name']}: {program['name']}"
            for each in mine
            for program in each["programs"]
            if not program["ready"] or program["restarts"]
        ]
        demo.report.check(f"{text.format(len(mine))} {', '.join(names)}", not broken, broken)


def create_pods(demo: Demo) -> None:
    """Pods on every node, timed from exec of the plugin to the first answer to a ping."""
    demo.report.step("Pods: CNI ADD to first ping")
    rows = []
    times: list[float] = []
    for node in demo.nodes:
        with demo.lab.open(node) as place:
            station = Station(node, place.addresses[0], place.namespaces.net)
            made = [_timed_pod(demo, node, number, station) for number in range(SAMPLES)]
        adds = [pod.add_seconds for pod, _ in made]
        pings = [seconds for _, seconds in made]
        times += pings
        rows.append([node, str(len(made)), *(_ms(x) for x in (
            statistics.median(adds), statistics.median(pings), max(pings)
        ))])  # fmt: skip
        demo.pods += [pod for pod, _ in made[:2]]
        for pod, _ in made[2:]:
            demo.lab.delete_pod(pod.key)
    demo.report.table(
        "milliseconds", ["node", "pods", "ADD p50", "to first ping p50", "slowest"], rows
    )
    p50 = _ms(statistics.median(times))
    demo.report.note(
        f"half of {len(times)} pods answered a ping {p50} ms after the plugin's exec, or sooner "
        f"(goal on an idle machine: {_ms(ADD_GOAL)})"
    )
    addresses = {pod.address for pod in demo.pods}
    demo.report.check(
        f"the {len(demo.pods)} pods that stay have an address each, of pool plain",
        len(addresses) == len(demo.pods)
        and all(ip_address(each) in ip_network("10.65.0.0/16") for each in addresses),
        addresses,
    )


def _timed_pod(demo: Demo, node: str, number: int, station: Station) -> tuple[PodInfo, float]:
    """A pod, and the seconds from the plugin's exec to the first answer to the node's ping."""
    place = node.removeprefix("node-")
    name = {0: f"web-{place}", 1: f"db-{place}"}.get(number, f"brief-{place}-{number}")
    labels = {"app": name.partition("-")[0], "pod": name}
    info = demo.lab.add_pod(Pod(name=name, node=node, labels=labels))
    answered = first_reply(station, info.address, time.monotonic() + PATIENCE)
    return info, answered - info.add_started


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def connectivity(demo: Demo) -> None:
    """All pairs, and that nobody translated an address on the way."""
    demo.report.step("Everybody reaches everybody: pods, nodes, the host outside")
    found = demo.show_matrix(everything, "all pairs reach each other over TCP and ICMP")
    own = {pod.name: pod.address for pod in demo.pods}
    for node in [*demo.nodes, "outside"]:
        with demo.lab.open(node) as place:
            own[node] = place.addresses[0]
    changed = [
        f"{a} → {b} was seen as {reach.seen}"
        for (a, b), reach in found.items()
        if reach.seen != own[a]
    ]
    demo.report.check(
        "no NAT: every TCP server saw the address of its caller itself", not changed, changed
    )
    first, last = demo.pods[0], demo.pods[-1]
    for pair in ((first.name, last.name), ("outside", last.name)):
        demo.report.note(f"{pair[1]} saw {pair[0]} as {found[pair].seen}")


def routers(demo: Demo) -> None:
    """The racks' own routers know where the pods are, and there is no bridge on a node."""
    demo.report.step("The racks know: routes to the pods' blocks in the routers' own tables")
    blocks = _blocks(demo)
    birdc = demo.lab.run("tor-1", "birdc", "show", "route").stdout
    demo.report.output("tor-1", "birdc show route", _only(birdc, "10.6", 1))
    vtysh = demo.lab.run("tor-2", "vtysh", "-c", "show ip route bgp").stdout
    demo.report.output("tor-2", "vtysh -c 'show ip route bgp'", _only(vtysh, "10.6", 0))
    for block, node in blocks.items():
        router = "tor-1" if demo.racks[node] == "rack-1" else "tor-2"
        address = _address(demo, node)
        route = demo.lab.run(router, "ip", "route", "get", block.partition("/")[0]).stdout
        demo.report.check(
            f"{router} sends {block} to {address}, which is {node}",
            f"via {address} " in route,
            route,
        )
    bridges = {
        node: demo.lab.run(node, "ip", "-o", "link", "show", "type", "bridge").stdout
        for node in demo.nodes
    }
    demo.report.check("there is no bridge on any node", not any(bridges.values()), bridges)


def _blocks(demo: Demo) -> dict[str, str]:
    """Block → node."""
    listed = json.loads(demo.manxctl("get", "blockaffinities", "-o", "json", show=False))
    return {each["spec"]["cidr"]: each["spec"]["node"] for each in listed["items"]}


def _address(demo: Demo, member: str) -> str:
    with demo.lab.open(member) as place:
        return place.addresses[0]


def _only(text: str, wanted: str, following: int) -> str:
    """The lines that hold ``wanted``, each with so many that follow it."""
    lines = text.splitlines()
    kept = {
        i + n
        for i, line in enumerate(lines)
        if wanted in line
        for n in range(following + 1)
        if i + n < len(lines)
    }
    return "\n".join(lines[i] for i in sorted(kept))


def policy(demo: Demo) -> None:
    """A policy that cuts one path, one as Kubernetes users write it, and their removal."""
    demo.report.step("A policy cuts one path, and leaves the others")
    cut = ("web-1a", "db-2b")
    demo.manxctl("apply", "-f", str(FOLDER / "cut.yaml"))
    demo.show_matrix(
        lambda pair: (pair != cut, pair != cut), f"only {cut[0]} → {cut[1]} is cut, and one way"
    )
    demo.manxctl("delete", "-f", str(FOLDER / "cut.yaml"))

    demo.report.step("A Kubernetes NetworkPolicy: databases hear web pods, on one TCP port")
    own_node = {pod.name: pod.node for pod in demo.pods}

    def expected(pair: Pair) -> tuple[bool, bool]:
        source, target = pair
        # a pod's own node may always reach it: it is how kubelet probes pods
        if not target.startswith("db-") or source == own_node[target]:
            return True, True
        return source.startswith("web-"), False

    demo.manxctl("apply", "-f", str(FOLDER / "database.yaml"))
    demo.show_matrix(
        expected, "of pods and hosts only web pods reach databases; their own nodes still may"
    )
    demo.manxctl("delete", "-f", str(FOLDER / "database.yaml"))
    demo.show_matrix(everything, "with the policies gone all pairs reach each other again")


def spoofing(demo: Demo) -> None:
    """A pod can't send with an address that is not its own."""
    demo.report.step("A forged source address is dropped")
    source, target, other = demo.pods[0], demo.pods[1], demo.pods[2]
    with Probe.of(demo.lab, [source.name, target.name]) as probe:
        here, there = probe.stations[source.name], probe.stations[target.name]
        honest = arrivals(here, there, sender=source.address, timeout=PATIENCE)
        forged = arrivals(here, there, sender=other.address)
        outside = arrivals(here, there, sender="198.51.100.10")
    demo.report.check(
        f"{source.name} to {target.name}: 5 of 5 raw packets with its own address arrive",
        honest == 5,
        honest,
    )
    demo.report.check(
        f"with the address of {other.name} or of the host outside: 0 of 10",
        forged + outside == 0,
        forged + outside,
    )


def crashes(demo: Demo) -> None:
    """felix and ExaBGP of a node are killed under traffic."""
    demo.report.step("felix and ExaBGP of node-1a get SIGKILL while packets flow")
    node, router = "node-1a", "tor-1"
    local, far = demo.pods[0], demo.pods[-1]
    with Probe.of(demo.lab, [local.name, far.name, "outside"]) as probe:
        stations = probe.stations
        with (
            Flow(stations[local.name], stations[far.name]) as across,
            Flow(stations["outside"], stations[local.name]) as inward,
        ):
            demo.wait(lambda: min(across.report.received, inward.report.received) > 200)
            session = _session(demo, router, node)
            for program in ("felix", "exabgp"):
                _kill(demo, node, program)
            back = demo.wait(lambda: _session(demo, router, node) not in (session, None))
            demo.report.check(f"{router} has a new session with {node}, Established", back)
            ready = demo.wait(lambda: _all_ready(demo, node))
            demo.report.check(f"all programs on {node} are in sync again", ready)
            seen = across.report.received
            demo.wait(lambda: across.report.received > seen + 500)
    for flow, path in (
        (across, f"{local.name} to {far.name}, through both racks"),
        (inward, f"the host outside to {local.name}"),
    ):
        result = flow.report
        demo.report.check(
            f"{path}: {result.sent} packets there and back, {result.lost} lost, TCP intact",
            result.lost == 0 and result.tcp_intact,
            f"longest silence {_ms(result.longest_gap)} ms, TCP intact: {result.tcp_intact}",
        )


def _kill(demo: Demo, node: str, program: str) -> None:
    before = _pids(demo, node, program)
    for pid in before:
        demo.lab.run(node, "kill", "-9", str(pid))
    demo.report.note(f"kill -9 {' '.join(map(str, sorted(before)))}  # {program}")
    back = demo.wait(lambda: bool(_pids(demo, node, program) - before))
    demo.report.check(f"{program} was killed and runs again", bool(before) and back)


def _pids(demo: Demo, node: str, program: str) -> set[int]:
    """The processes of a program, by the module or file that they run."""
    return {
        pid
        for pid, argv in demo.lab.processes(node)
        if any(Path(word).name.startswith(program) for word in argv[:4])
    }


def _session(demo: Demo, router: str, peer: str) -> str | None:
    """When a router's session with a peer was Established; None when it is not."""
    for line in demo.lab.run(router, "birdc", "show", "protocols").stdout.splitlines():
        words = line.split()
        if words[:1] == [peer] and words[-1] == "Established":
            return words[-2]
    return None


def _all_ready(demo: Demo, node: str) -> bool:
    members = demo.lab.status()["members"]
    programs = next(each["programs"] for each in members if each["name"] == node)
    return all(each["ready"] for each in programs)


def overlay(demo: Demo) -> None:
    """A pool that is encapsulated where it must be, and only there."""
    demo.report.step("A second pool: VXLAN between racks, plain inside a rack")
    demo.manxctl("apply", "-f", str(FOLDER / "overlay.yaml"))
    pods = []
    for node in demo.nodes:
        name = f"vx-{node.removeprefix('node-')}"
        pods.append(demo.lab.add_pod(Pod(name=name, node=node, labels={"app": "vx", "pod": name})))
    demo.report.check(
        "pods created from now on have addresses of pool overlay",
        all(ip_address(pod.address) in ip_network("10.66.0.0/16") for pod in pods),
        [pod.address for pod in pods],
    )
    demo.pods += pods
    names = [pod.name for pod in pods]
    others = ["web-1a", "web-2b", "node-1a", "node-2b", "outside"]
    demo.show_matrix(everything, "they reach each other, and everybody else", [*names, *others])
    with Probe.of(demo.lab, names) as probe:
        for target, encapsulated in (("vx-1b", False), ("vx-2a", True)):
            before = _vxlan_packets(demo, "node-1a")
            with Flow(probe.stations["vx-1a"], probe.stations[target]) as flow:
                demo.wait(lambda: flow.report.received >= 100)
            count = _vxlan_packets(demo, "node-1a") - before
            way = "in VXLAN" if encapsulated else "plain"
            demo.report.check(
                f"vx-1a to {target}: {flow.report.received} packets were answered, all {way}",
                flow.report.lost == 0
                and (count >= flow.report.sent if encapsulated else count == 0),
                f"{count} left through vxlan.calico, {flow.report.lost} were lost",
            )


def _vxlan_packets(demo: Demo, node: str) -> int:
    listed = demo.lab.run(node, "ip", "-s", "-j", "link", "show", "dev", "vxlan.calico").stdout
    return int(json.loads(listed)[0]["stats64"]["tx"]["packets"]) if listed.strip() else 0


def status(demo: Demo) -> None:
    """What manxctl says about all of it."""
    demo.report.step("manxctl looks at it")
    peers = demo.manxctl("node", "status")
    demo.report.check(
        "node-1a's session with tor-1 is Established",
        "172.31.1.1" in peers and "Established" in peers,
    )
    demo.manxctl("ipam", "show")
    blocks = json.loads(demo.manxctl("get", "ipamblocks", "-o", "json", show=False))["items"]
    used = sum(index is not None for block in blocks for index in block["spec"]["allocations"])
    tunnels = len(demo.nodes)
    demo.report.check(
        f"{len(demo.pods)} pods and {tunnels} VXLAN devices hold an address each, and nobody else",
        used == len(demo.pods) + tunnels,
        f"{used} addresses are in use",
    )


def removal(demo: Demo) -> None:
    """Pods go, and with them everything that was theirs."""
    demo.report.step("Pods go without a trace")
    for pod in demo.pods:
        demo.lab.delete_pod(pod.key)
    look = "(ip -o link; ip route) | grep -E 'cali[0-9a-f]{11}'"
    left = {node: demo.lab.run(node, "sh", "-c", look).stdout for node in demo.nodes}
    demo.report.check("no interface and no route of a pod is left", not any(left.values()), left)
    endpoints = json.loads(demo.manxctl("get", "workloadendpoints", "-A", "-o", "json", show=False))
    handles = json.loads(demo.manxctl("get", "ipamhandles", "-o", "json", show=False))
    held = [each["spec"]["handleID"] for each in handles["items"]]
    of_pods = [each for each in held if not each.startswith("vxlan-tunnel-addr-")]
    demo.report.check(
        "no endpoint is left, and all their addresses are free again",
        not endpoints["items"] and not of_pods,
        of_pods,
    )


STEPS = (
    create_pods,
    connectivity,
    routers,
    policy,
    spoofing,
    crashes,
    overlay,
    status,
)
