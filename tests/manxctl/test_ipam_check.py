"""ipam check, release, split and configure, as an administrator uses them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.net import Net, format_address, parse_net
from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from ipam.allocator import Allocator
from manxctl.ipam_report import ReportError, load
from tests.controllers.world import (
    add_nodes,
    assign,
    attachment,
    forget,
    plug,
    put,
    record,
    release,
)
from tests.ipam.world import add_pool, allocated
from tests.manxctl.conftest import Run


@pytest.fixture
def cluster(store: SqliteDatastore) -> SqliteDatastore:
    """A node with a pod that runs, and one that is gone without its addresses."""
    add_pool(store, "four", "10.0.0.0/24", 28)
    add_pool(store, "six", "fd00::/120", 124)
    add_nodes(store, "n1", "n2")
    plug(store, "n1", "web", "c1", (4, 6))
    assign(store, "n1", "gone", "c2", (4, 6))
    return store


@pytest.fixture
def report(cluster: SqliteDatastore, run: Run, tmp_path: Path) -> Path:
    """What check says of it, made an hour ago."""
    path = tmp_path / "report.json"
    assert run("ipam", "check", "-o", path).exit_code == 1
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"made": "2024-01-31T12:00:00+00:00"}))
    return path


def leaked(store: SqliteDatastore) -> list[Net]:
    return Allocator(store, "n1").addresses(attachment("gone", "c2").handle)


def text(net: Net) -> str:
    return format_address(net.version, net.address)


def test_check(cluster: SqliteDatastore, run: Run) -> None:
    result = run("ipam", "check")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "4 addresses are held in 2 blocks by 2 handles; 2 are used; 2 nodes",
        "leaked address: 2",
        "2 problems",
        "each of them: manxctl ipam check --show-problem-ips",
    ]
    lines = run("ipam", "check", "--show-problem-ips").stdout.splitlines()
    assert (
        f"  {text(leaked(cluster)[0])}: was given to k8s-pod-network.c2 (pod shop/gone) on n1,"
        " which is not there"
    ) in lines
    all_ = run("ipam", "check", "--show-all-ips").stdout
    assert "used by WorkloadEndpoint(shop/n1-k8s-web-eth0)" in all_
    assert "(pod shop/gone) on n1; not used" in all_
    release(cluster, "n1", "gone", "c2")
    result = run("ipam", "check")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "no problems")


def test_check_beside_a_kubernetes(
    cluster: SqliteDatastore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MANX_KUBERNETES: its pods count, one that has no address yet among them."""
    with closing(SqliteDatastore(tmp_path / "kubernetes.db")) as kubernetes:
        put(kubernetes, "KubernetesNode", "n1", {})
        put(kubernetes, "Pod", "gone", {"nodeName": "n1"}, namespace="shop")
        monkeypatch.setenv("MANX_KUBERNETES", f"sqlite://{tmp_path}/kubernetes.db")
        result = run("ipam", "check", "--show-problem-ips")
        assert result.exit_code == 1
        assert "leaked address" not in result.stdout
        assert "has 10.0.0." in result.stdout
        assert "and there is no Pod shop/web" in result.stdout
        address = text(leaked(cluster)[0])
        refused = run("ipam", "release", "--ip", address)
        assert "its holder may be there" in refused.stderr
        put(kubernetes, "Pod", "web", {"nodeName": "n1"}, namespace="shop")
        assert run("ipam", "check").exit_code == 0
        monkeypatch.setenv("MANX_KUBERNETES", "mysql://x")
        assert "MANX_KUBERNETES" in run("ipam", "check").stderr


def test_check_says_which_ranges_others_have(cluster: SqliteDatastore, run: Run) -> None:
    release(cluster, "n1", "gone", "c2")
    assert run("ipam", "check").exit_code == 0
    put(cluster, "IPPool", "wide", {"cidr": "10.0.0.0/8"})  # as kubectl does, which asks nobody
    result = run("ipam", "check", "--show-problem-ips")
    assert result.exit_code == 1
    assert "IPPool(four): 10.0.0.0/24 shares addresses with 10.0.0.0/8 of IPPool wide" in (
        result.stdout
    )


def test_release_what_a_report_shows(cluster: SqliteDatastore, run: Run, report: Path) -> None:
    addresses = leaked(cluster)
    result = run("ipam", "release", "--from-report", report)
    assert result.exit_code == 0, result.stderr
    assert ", ".join(map(text, sorted(addresses))) in result.stdout
    assert not set(addresses) & set(allocated(cluster))
    assert len(allocated(cluster)) == 2
    result = run("ipam", "release", "--from-report", report)  # once more
    assert (result.exit_code, "is free by now" in result.stderr) == (1, True)


def test_a_fresh_report_is_refused(cluster: SqliteDatastore, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    run("ipam", "check", "-o", path)
    result = run("ipam", "release", "--from-report", path)
    assert (result.exit_code, "not a minute old" in result.stderr) == (1, True)
    assert run("ipam", "release", "--from-report", path, "--force").exit_code == 0
    assert leaked(cluster) == []


def test_what_changed_since_the_report_is_refused(
    cluster: SqliteDatastore, run: Run, report: Path
) -> None:
    addresses = leaked(cluster)
    record(cluster, "n1", "gone", "c2", addresses[:1])  # one of the two is in use
    result = run("ipam", "release", "--from-report", report)
    assert result.exit_code == 1
    assert "is used by WorkloadEndpoint(shop/n1-k8s-gone-eth0)" in result.stderr
    forget(cluster, "n1", "gone", "c2")
    release(cluster, "n1", "gone", "c2")
    made = attachment("gone", "c2")
    for address in addresses:  # the same addresses of the same holder, given anew
        Allocator(cluster, "n1").assign_specific(
            address, made.handle, made.attributes("n1", "2030-01-31 12:00:00 +0000 UTC")
        )
    for force in ([], ["--force"]):
        result = run("ipam", "release", "--from-report", report, *force)
        assert (result.exit_code, "given anew since" in result.stderr) == (1, True)
    assert leaked(cluster) == addresses


def test_a_report_of_another_cluster(cluster: SqliteDatastore, run: Run, report: Path) -> None:
    put(cluster, "ClusterInformation", "default", {"clusterGUID": "0123"})
    result = run("ipam", "release", "--from-report", report)
    assert (result.exit_code, "this is 0123" in result.stderr) == (1, True)


def test_no_report_at_all(cluster: SqliteDatastore, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in ("", "[]", "{}", '{"kind": "manx-ipam-report", "version": 2}'):
        path.write_text(content)
        result = run("ipam", "release", "--from-report", path)
        assert (result.exit_code, "no report" in result.stderr) == (1, True)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_reports_that_were_meddled_with(report: Path, tmp_path: Path, data: st.DataObject) -> None:
    """They are read or refused; nothing else happens."""
    value: Any = json.loads(report.read_text())
    at = value
    while isinstance(at, dict | list) and at:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or data.draw(st.booleans()):
            at[key] = data.draw(
                st.none() | st.booleans() | st.integers() | st.text() | st.just([]) | st.just({})
            )
            break
        at = at[key]
    path = tmp_path / "meddled"
    path.write_text(json.dumps(value))
    try:
        load(path)
    except ReportError as error:
        assert str(path) in str(error)


def test_release_an_address(cluster: SqliteDatastore, run: Run) -> None:
    four, _ = leaked(cluster)
    (used,) = [n for n, h in allocated(cluster).items() if h.endswith("c1") and n.version == 4]
    result = run("ipam", "release", "--ip", text(used))
    assert (result.exit_code, "is used by WorkloadEndpoint" in result.stderr) == (1, True)
    assert used in allocated(cluster)
    result = run("ipam", "release", "--ip", text(four))
    assert (result.exit_code, f"{text(four)}: released" in result.stdout) == (0, True)
    assert four not in allocated(cluster)
    assert "is not in use" in run("ipam", "release", "--ip", text(four)).stdout
    assert run("ipam", "release", "--ip", text(used), "--force").exit_code == 0
    assert used not in allocated(cluster)
    assert run("ipam", "release").exit_code == 2
    assert run("ipam", "release", "--ip", "ten").exit_code == 2


def test_an_unknown_holder_is_left_alone(cluster: SqliteDatastore, run: Run) -> None:
    address = Allocator(cluster, "n1").assign("somebody", {}).address
    result = run("ipam", "release", "--ip", text(address))
    assert (result.exit_code, "--force" in result.stderr) == (1, True)
    assert address in allocated(cluster)


# show


def test_show_reservations(cluster: SqliteDatastore, run: Run) -> None:
    put(cluster, "IPReservation", "r", {"reservedCIDRs": ["10.0.0.0/25", "10.0.0.4/30"]})
    rows = [line.split() for line in run("ipam", "show").stdout.splitlines()]
    (in_low_half,) = {sum(n.version == 4 and n.address & 255 < 128 for n in allocated(cluster))}
    assert rows[1][:4] == ["IP", "pool", "four", "10.0.0.0/24"]
    assert rows[1][4:6] == ["256", "2"]
    assert int(rows[1][7]) == 128 - in_low_half
    assert int(rows[1][9]) == 256 - 2 - (128 - in_low_half)


def test_show_borrowed(cluster: SqliteDatastore, run: Run) -> None:
    assert len(run("ipam", "show", "--show-borrowed").stdout.splitlines()) == 1
    (block,) = {
        entry.value["spec"]["cidr"]
        for entry in cluster.list("IPAMBlock").entries
        if "." in entry.value["spec"]["cidr"]
    }
    net = parse_net(block)
    borrowed = Net(4, net.address + 9, 32)
    made = attachment("far", "c3")
    Allocator(cluster, "n2").assign_specific(borrowed, made.handle, made.attributes("n2", "t"))
    (line,) = run("ipam", "show", "--show-borrowed").stdout.splitlines()[1:]
    assert line.split() == [text(borrowed), "n2", block, "n1", "shop/far"]


def test_show_configuration(cluster: SqliteDatastore, run: Run) -> None:
    lines = run("ipam", "show", "--show-configuration").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["PROPERTY", "VALUE"],
        ["strictAffinity", "false"],
        ["autoAllocateBlocks", "true"],
        ["maxBlocksPerHost", "20"],
        ["ipCooldownSeconds", "0"],
    ]
    assert run("ipam", "show", "--show-configuration", "--ip=10.0.0.1").exit_code == 2


# configure and split


def test_configure(store: SqliteDatastore, run: Run) -> None:
    result = run("ipam", "configure", "--max-blocks-per-host=4")
    assert (result.exit_code, "--strictaffinity=true" in result.stderr) == (1, True)
    assert store.list("IPAMConfiguration").entries == []
    result = run("ipam", "configure", "--strictaffinity=true", "--max-blocks-per-host=4")
    assert result.stdout.splitlines() == ["strictAffinity is true", "maxBlocksPerHost is 4"]
    assert run("ipam", "configure", "--ip-cooldown-seconds=30").exit_code == 0
    spec = store.get(Key("IPAMConfiguration", "default")).value["spec"]
    assert spec == {
        "strictAffinity": True,
        "maxBlocksPerHost": 4,
        "ipCooldownSeconds": 30,
        "autoAllocateBlocks": True,
    }
    assert run("ipam", "configure", "--strictaffinity=false").exit_code == 1
    assert run("ipam", "configure", "--ip-cooldown-seconds=1201").exit_code == 2
    assert run("ipam", "configure").exit_code == 2


def test_split(cluster: SqliteDatastore, run: Run) -> None:
    result = run("ipam", "split", "4", "--name", "four")
    assert (result.exit_code, "manxctl datastore migrate lock" in result.stderr) == (1, True)
    assert run("datastore", "migrate", "lock").exit_code == 0
    assert run("ipam", "split", "3", "--name", "four").exit_code == 2
    assert "16 parts at most" in run("ipam", "split", "32", "--name", "four").stderr
    assert "there are: four" in run("ipam", "split", "2", "--name", "five").stderr
    # as if an earlier split had been cut off
    add_pool(cluster, "split-four-1", "10.0.0.64/26", 28)
    before = allocated(cluster)
    result = run("ipam", "split", "4", "--cidr", "10.0.0.0/24")
    assert result.exit_code == 0, result.stderr
    pools = {e.key.name: e.value["spec"]["cidr"] for e in cluster.list("IPPool").entries}
    assert pools == {
        "six": "fd00::/120",
        "split-four-0": "10.0.0.0/26",
        "split-four-1": "10.0.0.64/26",
        "split-four-2": "10.0.0.128/26",
        "split-four-3": "10.0.0.192/26",
    }
    assert allocated(cluster) == before
    assert run("datastore", "migrate", "unlock").exit_code == 0
    plug(cluster, "n1", "new", "c9")
    add_pool(cluster, "seven", "10.7.0.0/24", 28)
    run("datastore", "migrate", "lock")
    add_pool(cluster, "split-seven-0", "10.8.0.0/25", 28)
    assert "not of this split" in run("ipam", "split", "2", "--name", "seven").stderr
    assert "seven" in {entry.key.name for entry in cluster.list("IPPool").entries}
