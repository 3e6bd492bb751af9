"""Whole labs: built, worked in, taken down, crashed; on the real kernel with real routers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernel.netns import inside
from lab import control
from lab.client import Lab
from lab.errors import LabError
from lab.fabric import Pod
from lab.fabricfile import parse
from lab.flow import Flow, arrivals
from lab.probe import Probe, first_reply
from tests.lab.fabrics import JSON, lab_name, small

# to start a lab takes a busy machine a minute
pytestmark = pytest.mark.timeout(300)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.05)


def build(document: JSON, name: str | None = None) -> Lab:
    return Lab.up(parse(document, Path()), name=name or lab_name(), timeout=110)


def tiny() -> JSON:
    """One rack, one node."""
    document = small()
    spec = document["spec"]
    spec["racks"] = spec["racks"][:1]
    spec["racks"][0]["nodes"] = spec["racks"][0]["nodes"][:1]
    spec["links"], spec["hosts"] = [], []
    spec["pods"] = spec["pods"][:1]
    return document


def lab_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with build(small()) as running:
        yield running


# -- what is in a lab --------------------------------------------------------------------


def test_routers_learn_from_each_other_and_hosts_reach_nodes(lab: Lab) -> None:
    def known(router: str, *command: str) -> str:
        return lab.run(router, *command).stdout

    until(lambda: "172.31.2.0/24" in known("tor-1", "birdc", "show", "route"))
    until(lambda: "172.31.1.0/24" in known("tor-2", "vtysh", "-c", "show ip route bgp"))
    names = ["node-1a", "node-1b", "node-2a", "outside"]
    with Probe.of(lab, names) as probe:
        # what a router has learned it may not have told its kernel yet
        until(lambda: all(reach.icmp and reach.tcp for reach in probe.matrix().values()))
        for (source, _), reach in probe.matrix(timeout=30).items():
            assert reach.icmp
            assert reach.seen == probe.stations[source].address


def test_a_member_has_a_world_of_its_own(lab: Lab) -> None:
    assert lab.run("node-1a", "hostname").stdout == "node-1a\n"
    assert lab.run("node-1a", "ls", "/sys/class/net").stdout.split()[:2] == ["eth0", "lo"]
    assert "172.31.2.11" in lab.run("node-1a", "getent", "hosts", "node-2a").stdout
    lab.run("node-1a", "touch", "/run/mine", "/etc/cni/mine", "/var/lib/cni/mine")
    assert "mine" not in lab.run("node-1b", "ls", "/run", "/etc/cni", "/var/lib/cni").stdout
    lab.run("node-1a", "touch", "/var/lib/manx/ours")
    assert "ours" in lab.run("node-1b", "ls", "/var/lib/manx").stdout
    # processes of the machine can't be seen, let alone signalled
    pids = lab.run("node-1a", "sh", "-c", "cd /proc && echo [0-9]*").stdout.split()
    assert str(os.getpid()) not in pids or lab.run("node-1a", "cat", "/proc/1/cmdline").stdout


def test_mtu_is_the_fabrics(lab: Lab) -> None:
    assert "mtu 1500" in lab.run("node-1a", "ip", "link", "show", "eth0").stdout
    assert "mtu 1500" in lab.run("tor-1", "ip", "link", "show", "node-1a").stdout


def test_status_tells_all(lab: Lab) -> None:
    status = lab.status()
    members = {each["name"]: each for each in status["members"]}
    assert list(members) == ["tor-1", "tor-2", "node-1a", "node-1b", "node-2a", "outside"]
    assert [each["name"] for each in members["tor-2"]["programs"]] == ["zebra", "bgpd"]
    assert members["node-2a"]["addresses"] == ["172.31.2.11"]
    bird = members["tor-1"]["programs"][0]
    assert (bird["pid"], "bird") in [(pid, argv[0]) for pid, argv in lab.processes("tor-1")]


def test_a_killed_router_comes_back(lab: Lab) -> None:
    def bird() -> JSON:
        (program,) = lab.status()["members"][0]["programs"]
        return dict(program)

    before = bird()
    lab.run("tor-1", "kill", "-9", str(before["pid"]))
    until(lambda: bird()["pid"] not in (None, before["pid"]))
    assert bird()["restarts"] == before["restarts"] + 1
    until(lambda: "172.31.2.0/24" in lab.run("tor-1", "birdc", "show", "route").stdout)


# -- pods --------------------------------------------------------------------------------


def test_pods_talk_and_are_seen_as_themselves(lab: Lab) -> None:
    with Probe.of(lab, ["a", "default/b"]) as probe:
        reach = probe.matrix(timeout=30)
        a, b = probe.stations["a"], probe.stations["default/b"]
        assert reach["a", "default/b"].seen == a.address
        assert reach["default/b", "a"].icmp
        assert first_reply(a, b.address, time.monotonic() + 60) <= time.monotonic()
        with Flow(a, b) as flow:
            until(lambda: flow.report.received > 100)
        assert flow.report.lost == 0
        assert flow.report.tcp_intact
        assert flow.report.tcp_bytes > 100
        # the sender of forged packets works: ptp does not stop them
        assert arrivals(a, b, sender=a.address, timeout=30) == 5
        assert arrivals(a, b, sender="192.0.2.66", timeout=30) == 5


def test_a_blocked_path_is_told_from_an_open_one(lab: Lab) -> None:
    with Probe.of(lab, ["a", "b", "node-2a"]) as probe:
        drop = ["iptables", "-I", "FORWARD", "-s", probe.stations["a"].address, "-j", "DROP"]
        assert lab.run("node-1a", *drop).returncode == 0
        try:
            with Flow(probe.stations["node-2a"], probe.stations["node-2a"]) as flow:
                reach = probe.matrix()
            assert flow.report.lost == 0
            assert not reach["a", "b"].tcp
            assert not reach["a", "b"].icmp
            assert reach["a", "b"].tcp_error == "no answer"
            assert reach["node-2a", "a"].seen is None  # no route back either way
        finally:
            drop[1] = "-D"
            assert lab.run("node-1a", *drop).returncode == 0


def test_a_flow_counts_what_is_lost(lab: Lab) -> None:
    with Probe.of(lab, ["a", "b"]) as probe:
        a, b = probe.stations["a"], probe.stations["b"]
        with Flow(a, b) as flow:
            until(lambda: flow.report.received > 50)
            lab.run("a", "ip", "link", "set", "eth0", "down")
            sent = flow.report.sent
            until(lambda: flow.report.sent > sent + 50)
            lab.run("a", "ip", "link", "set", "eth0", "up")
            lab.run("a", "ip", "route", "replace", "default", "via", "10.65.0.1", "dev", "eth0")
        assert flow.report.lost >= 50
        assert flow.report.longest_gap > 0.05


def test_pods_come_and_go(lab: Lab) -> None:
    store = "/var/lib/manx/datastore.db"
    pod = Pod(name="web", node="node-2a", namespace="shop", labels={"app": "web"})
    info = lab.add_pod(pod)
    assert info.key == "shop/web"
    assert info.add_seconds > 0
    assert info.address in lab.run("shop/web", "ip", "-4", "addr", "show", "eth0").stdout
    assert "LOOPBACK,UP" in lab.run("web", "ip", "link", "show", "lo").stdout
    assert "shop_web" in lab.run("node-2a", "ip", "netns").stdout
    assert "shop_web" not in lab.run("node-1a", "ip", "netns").stdout
    with pytest.raises(LabError, match="exists already"):
        lab.add_pod(pod)
    assert lab.run("node-1a", "ls", store).returncode == 0
    lab.delete_pod("web")
    assert "shop_web" not in lab.run("node-2a", "ip", "netns").stdout
    assert "veth" not in lab.run("node-2a", "ip", "link").stdout
    with pytest.raises(LabError, match="no pod web"):
        lab.delete_pod("web")
    lab.add_pod(pod)
    lab.delete_pod("shop/web")


def test_a_name_in_two_namespaces_must_be_said_in_full(lab: Lab) -> None:
    for namespace in ("one", "two"):
        lab.add_pod(Pod(name="twin", node="node-2a", namespace=namespace))
    with pytest.raises(LabError, match="one/twin, two/twin"):
        lab.run("twin", "true")
    for namespace in ("one", "two"):
        lab.delete_pod(f"{namespace}/twin")


def test_a_plugin_that_refuses_leaves_nothing(lab: Lab) -> None:
    # the pool of node-2a is full once its addresses are said to be taken
    plugin = "/opt/cni/bin/host-local"
    broken = 'echo \'{"code": 11, "msg": "try again", "details": "later"}\'; exit 1'
    script = f"#!/bin/sh\ncat >/dev/null\n[ $CNI_COMMAND = DEL ] && exit 0\n{broken}\n"
    lab.run(
        "node-2a",
        "sh",
        "-c",
        f"mv {plugin} {plugin}.real && cat >{plugin} && chmod +x {plugin}",
        input=script,
    )
    try:
        with pytest.raises(
            LabError, match="pod default/no on node-2a: ptp ADD: error 11: try again: later"
        ):
            lab.add_pod(Pod(name="no", node="node-2a"))
        assert "default_no" not in lab.run("node-2a", "ip", "netns").stdout
        assert "no" not in [pod.name for pod in lab.pods()]
    finally:
        lab.run("node-2a", "mv", f"{plugin}.real", plugin)
    lab.add_pod(Pod(name="no", node="node-2a"))
    lab.delete_pod("no")


def test_plugins_are_chained(lab: Lab) -> None:
    """Each plugin gets the result of the one before; DEL goes backwards with the last result."""
    conf = "/etc/cni/net.d/10-lab.conflist"
    script = """#!/bin/sh
input=$(cat)
echo "$CNI_COMMAND $(basename $0) $CNI_IFNAME $CNI_ARGS $input" >>/run/calls
[ $CNI_COMMAND = ADD ] && echo '{"cniVersion": "1.1.0", "ips": [{"address": "192.0.2.'$(basename $0)'/32"}]}'
exit 0
"""  # noqa: E501
    plugins = [{"type": "1", "x": 5}, {"type": "2"}]
    conflist = json.dumps({"cniVersion": "1.1.0", "name": "chain", "plugins": plugins})
    lab.run(
        "node-1b", "sh", "-c", "cd /opt/cni/bin && cat >1 && chmod +x 1 && cp 1 2", input=script
    )
    lab.run("node-1b", "sh", "-c", f"cat >{conf}", input=conflist)
    info = lab.add_pod(Pod(name="chained", node="node-1b", namespace="ns"))
    assert info.addresses == ("192.0.2.2",)
    # what DEL gets is what ADD was done with, whatever the file says by now
    lab.run("node-1b", "rm", conf)
    lab.delete_pod("chained")
    calls = lab.run("node-1b", "cat", "/run/calls").stdout.splitlines()
    assert [call.split()[:3] for call in calls] == [
        ["ADD", "1", "eth0"], ["ADD", "2", "eth0"], ["DEL", "2", "eth0"], ["DEL", "1", "eth0"],
    ]  # fmt: skip
    assert "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=chained;K8S_POD_INFRA_CONTAINER_ID=" in calls[0]
    inputs = [json.loads(call[call.index("{") :]) for call in calls]
    assert inputs[0] == {"cniVersion": "1.1.0", "name": "chain", "type": "1", "x": 5}
    assert inputs[1]["prevResult"]["ips"] == [{"address": "192.0.2.1/32"}]
    assert inputs[2]["prevResult"]["ips"] == [{"address": "192.0.2.2/32"}]
    with pytest.raises(LabError, match="no CNI configuration"):
        lab.add_pod(Pod(name="chained", node="node-1b"))


# -- exec and the command line -----------------------------------------------------------


def test_exec_passes_status_streams_and_folder_on(lab: Lab) -> None:
    assert lab_command("exec", f"{lab.name}:node-1a", "sh", "-c", "exit 7").returncode == 7
    assert lab_command("exec", f"{lab.name}:a", "sh", "-c", "kill -9 $$").returncode == 137
    result = lab.run("outside", "sh", "-c", "cat; pwd; echo oops >&2", input="fed")
    assert result.stdout == f"fed{Path.cwd()}\n"
    assert result.stderr == "oops\n"
    with pytest.raises(LabError, match="no end within"):
        lab.run("a", "sleep", "60", timeout=0.2)
    with pytest.raises(LabError, match="No such file"):
        lab.run("a", "/nowhere/command")
    unknown = lab_command("exec", f"{lab.name}:a", "no-such-command")
    assert unknown.returncode == 127
    assert "a: no-such-command: No such file" in unknown.stderr
    assert lab_command("exec", f"{lab.name}:a", "/etc").returncode == 126
    missing = lab_command("exec", f"{lab.name}:nowhere", "true")
    assert missing.returncode == 1
    assert "expected one of tor-1, tor-2, node-1a" in missing.stderr


def test_the_command_line_shows_and_changes(lab: Lab) -> None:
    table = lab_command("status", lab.name).stdout
    assert "outside" in table
    assert "default/a" in table
    assert json.loads(lab_command("status", lab.name, "--json").stdout)["name"] == lab.name
    assert "Started" in lab_command("logs", f"{lab.name}:tor-1", "bird").stdout
    routes = lab_command("routes", f"{lab.name}:tor-1", f"{lab.name}:a").stdout
    assert ["tor-1", "198.51.100.0/24", "172.31.255.1", "(tor-2)", "bird"] in map(
        str.split, routes.splitlines()
    )
    assert ["a", "default", "10.65.0.1", "(eth0)", "boot"] in map(str.split, routes.splitlines())
    wrong = lab_command("logs", f"{lab.name}:tor-1", "felix")
    assert "expected one of bird" in wrong.stderr
    where = f"{lab.name}:node-2a"
    added = lab_command("pod", "add", where, "x", "ns/y", "--label", "a=b", "--port", "http=80/tcp")
    assert "ns/y on node-2a: 10.65.0." in added.stdout
    assert lab_command("pod", "del", f"{lab.name}:x", f"{lab.name}:ns/y").returncode == 0
    for bad, message in (
        (("X",), "DNS subdomain"),
        (("x", "--port", "http=eighty"), "NAME=PORT"),
        (("x", "--label", "novalue"), "KEY=VALUE"),
    ):
        refused = lab_command("pod", "add", where, *bad)
        assert refused.returncode == 1
        assert message in refused.stderr
    assert "there is no lab" in lab_command("status", lab_name()).stderr


def test_a_bad_file_is_refused_by_the_command_line(tmp_path: Path) -> None:
    document = small()
    document["spec"]["racks"][0]["tor"]["router"] = "cisco"
    path = tmp_path / "fabric.yaml"
    path.write_text(json.dumps(document))
    for verb in ("up", "validate"):
        result = lab_command(verb, str(path))
        assert result.returncode == 1
        assert "spec.racks[0].tor.router: 'cisco': 'bird' or 'frr'" in result.stderr
    path.write_text(json.dumps(small()))
    assert "can be built" in lab_command("validate", str(path)).stdout


# -- beginnings and ends -----------------------------------------------------------------


def machine() -> dict[str, str]:
    """What a lab must never change outside: links, routes, rules, mounts, host name."""

    def ip(*arguments: str) -> str:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout

    # namespaces that other tests mount come and go
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = [line for line in lines if " - nsfs " not in line]
    return {
        "links": ip("-o", "link"),
        "routes": ip("route", "show", "table", "all"),
        "rules": ip("rule"),
        "mounts": "\n".join(sorted(mounts)),
        "hostname": socket.gethostname(),
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
        "folders": str([Path(path).exists() for path in ("/etc/cni", "/var/lib/cni")]),
    }


def processes_of(lab: Lab) -> dict[tuple[int, str], bytes]:
    """All processes of a lab as the machine sees them: pid and start time → command line."""
    with lab.open("tor-1") as place:
        wanted = os.fstat(place.namespaces.pid).st_ino
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "ns/pid").stat().st_ino == wanted:
                found[identity(folder)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue
    return found


def identity(folder: Path) -> tuple[int, str]:
    """A process by more than its number, which is used again; proc(5), field 22 of stat."""
    start = (folder / "stat").read_text().rpartition(")")[2].split()[19]
    return int(folder.name), start


def lives(process: tuple[int, str]) -> bool:
    try:
        return identity(Path(f"/proc/{process[0]}")) == process
    except OSError:
        return False


def test_nothing_of_a_lab_is_outside() -> None:
    before = machine()
    with build(tiny()) as lab:
        lab.run("node-1a", "hostname", "changed")
        lab.run("node-1a", "mount", "-t", "tmpfs", "none", "/mnt")
        lab.run("node-1a", "sysctl", "-w", "net.ipv4.ip_forward=0")
        assert machine() == before
        assert lab.name in control.running_labs()
    assert machine() == before
    assert lab.name not in control.running_labs()


@pytest.mark.parametrize("victim", [0, 1], ids=["init", "keeper"])
def test_a_killed_keeper_takes_everything_with_it(victim: int) -> None:
    lab = build(tiny())
    sleeper = lab.popen("node-1a", ["sleep", "600"])
    # one end of a veth pair stays with the test: it lives as long as the lab's namespace
    with lab.open("node-1a") as place:
        name = f"t{os.getpid()}v{victim}"
        anchor = subprocess.Popen(["unshare", "--net", "sleep", "600"])
        own, other = Path("/proc/self/ns/net"), Path(f"/proc/{anchor.pid}/ns/net")
        until(lambda: other.readlink() != own.readlink())
        with inside(place.namespaces.net):
            make = f"ip link add {name} type veth peer name {name} netns {anchor.pid}"
            subprocess.run(make.split(), check=True)
    try:

        def mine() -> str:
            command = ["nsenter", f"--net=/proc/{anchor.pid}/ns/net", "ip", "-o", "link"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        assert name in mine()
        processes = processes_of(lab)
        keepers = sorted(each for each, argv in processes.items() if b"lab.keeper" in argv)
        assert len(keepers) == 2
        assert len(processes) >= 4  # and bird, and sleep
        os.kill(keepers[victim][0], signal.SIGKILL)
        assert sleeper.wait(60) == -signal.SIGKILL
        until(lambda: not any(lives(process) for process in processes))
        until(lambda: name not in mine())
        assert lab.name not in control.running_labs()
        for late in (lab.status, lab.down):
            with pytest.raises(LabError, match="is gone"):
                late()
    finally:
        anchor.kill()
        anchor.wait()


def test_a_lab_ends_with_who_made_it() -> None:
    name = lab_name()
    program = (
        "import json, sys; from pathlib import Path; from lab.client import Lab;"
        "from lab.fabricfile import parse;"
        "lab = Lab.up(parse(json.loads(sys.argv[2]), Path()), name=sys.argv[1]);"
        "print('up', flush=True); sys.stdin.read()"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", program, name, json.dumps(tiny())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None
    assert maker.stdin is not None
    assert maker.stdout.readline() == "up\n"
    assert name in control.running_labs()
    maker.kill()
    maker.wait()
    maker.stdin.close()
    maker.stdout.close()
    until(lambda: name not in control.running_labs())


def test_up_and_down_by_command(tmp_path: Path) -> None:
    path = tmp_path / "fabric.yaml"
    path.write_text(json.dumps(tiny()))
    name = lab_name()
    up = lab_command("up", str(path), "--name", name)
    assert up.returncode == 0, up.stderr
    try:
        again = lab_command("up", str(path), "--name", name)
        assert again.returncode == 1
        assert f"./dev lab down {name}" in again.stderr
        assert lab_command("exec", f"{name}:node-1a", "true").returncode == 0
    finally:
        assert lab_command("down", name).returncode == 0
    assert name not in control.running_labs()
    assert lab_command("down", name).returncode == 1


def test_two_labs_side_by_side_do_not_see_each_other() -> None:
    with build(tiny()) as one, build(tiny()) as other:
        one.run("node-1a", "touch", "/run/one", "/var/lib/manx/one", "/etc/only-one")
        for path in ("/run/one", "/var/lib/manx/one", "/etc/only-one"):
            assert other.run("node-1a", "test", "-e", path).returncode == 1
        other.delete_pod("a")
        with Probe.of(one, ["a", "node-1a"]) as probe:
            assert probe.matrix(timeout=30)["node-1a", "a"].tcp
        other.down()
        assert one.run("a", "true").returncode == 0
        second = build(tiny(), other.name)  # the name is free again
        second.down()
        one.down()
        for lab in (one, other):
            lab.down = lambda: None  # type: ignore[method-assign]


def test_what_fails_while_it_starts_leaves_nothing_and_says_why() -> None:
    document = tiny()
    document["spec"]["cni"]["binDir"] = "/nowhere"
    name = lab_name()
    before = machine()
    with pytest.raises(LabError, match="node node-1a: can't install /nowhere"):
        build(document, name)
    assert name not in control.running_labs()
    assert machine() == before

    document = tiny()
    document["spec"]["pods"].append({"name": "z", "node": "node-1a", "namespace": "x"})
    document["spec"]["cni"]["conflist"]["plugins"].append({"type": "absent"})
    with pytest.raises(LabError, match=r"pod default/a on node-1a: /opt/cni/bin/absent: No such"):
        build(document, name)
    assert name not in control.running_labs()

    document = tiny()
    document["spec"]["cni"]["conflist"] = {"name": "empty"}
    with pytest.raises(LabError, match="expected a CNI configuration list"):
        Lab.up(parse(document, Path()), name=name, timeout=1)
    assert name not in control.running_labs()


def test_a_lab_has_a_proper_name() -> None:
    for name in ("x" * 64, "A", "a/b", "a:b"):
        with pytest.raises(LabError, match="expected a DNS label"):
            build(tiny(), name)


def test_a_router_that_does_not_start_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bird = tmp_path / "bird"
    bird.write_text("#!/bin/sh\necho no licence to fly\nexit 3\n")
    bird.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    name = lab_name()
    with pytest.raises(LabError, match="tor-1: bird exited with status 3, 3 times") as caught:
        build(tiny(), name)
    assert "no licence to fly" in caught.value.log
    assert name not in control.running_labs()


def test_strangers_and_nonsense_do_not_disturb_a_lab(lab: Lab) -> None:
    for sent in (b"", b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\5hello"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(control.address(lab.name))
            connection.sendall(sent)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(control.address(lab.name))
        control.send(connection, {"op": "dance"})
        reply, _ = control.receive(connection)
        assert reply == {"ok": False, "error": 'unknown request "dance"', "log": ""}
    assert lab.run("a", "true").returncode == 0
