"""What ``get`` prints on request, and what it prints as things change."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from manxctl.table import Table
from tests.manxctl.conftest import Run
from tests.manxctl.test_files import POLICY, POOL
from tests.manxctl.test_get import put
from tests.manxctl.test_process import ROOT, manxctl
from tests.support.netns import eventually


def labelled(store: SqliteDatastore, name: str, **labels: str) -> None:
    value = {"metadata": {"name": name, "labels": labels}, "spec": {"cidr": "10.0.0.0/16"}}
    store.create(Key("IPPool", name), value)


def test_ps_is_the_table(run: Run, store: SqliteDatastore) -> None:
    put(store, "IPPool", "pods", {"cidr": "10.0.0.0/16"})
    assert run("get", "pools", "-o", "ps").output == run("get", "pools").output


def test_custom_columns(run: Run, store: SqliteDatastore) -> None:
    put(store, "IPPool", "pods", {"cidr": "10.0.0.0/16", "natOutgoing": True})
    put(store, "NetworkPolicy", "web", {"ingress": [{"action": "Allow"}, {"action": "Deny"}]}, "a")
    columns = "custom-columns="
    assert run("get", "pools", "-o", f"{columns}NAT,name").output.splitlines() == [
        "NAT    NAME",
        "true   pods",
    ]
    by_path = f"{columns}NAME,WHERE:.metadata.namespace,FIRST:spec.ingress[0].action,ALL:.spec.ingress[*].action,NO:.spec.x[7]"  # noqa: E501
    assert run("get", "np", "-A", "-o", by_path).output.splitlines() == [
        "NAME   WHERE   FIRST   ALL          NO",
        "web    a       Allow   Allow,Deny   -",
    ]
    for wrong, complaint in (
        (f"{columns}FLAVOUR", "expected NAME, CIDR, NAT"),
        (f"{columns}A:.", "expected a path"),
        (f"{columns}A:.b[x]", "expected a path"),
        (f"{columns}", "expected custom-columns=NAME,CIDR"),
        ("go-template={{.items}}", "-o json with jq"),
        ("go-template-file=x", "-o custom-columns="),
        ("xml", "expected one of table, ps, wide"),
    ):
        result = run("get", "pools", "-o", wrong)
        assert result.exit_code == 2
        assert complaint in " ".join(result.output.split())


def test_by_label(run: Run, store: SqliteDatastore) -> None:
    labelled(store, "a", app="web", tier="front")
    labelled(store, "b", app="web")
    labelled(store, "c")
    store.create(Key("IPPool", "d"), {"metadata": {"name": "d", "labels": ["x"]}})

    def names(selector: str, *more: str) -> list[str]:
        result = run("get", "pools", *more, "-l", selector, "-o", "name")
        assert result.exit_code == 0, result.output
        return [line.removeprefix("ippool/") for line in result.output.splitlines()]

    assert names("app=web") == ["a", "b"]
    assert names("app=web,tier!=front") == ["b"]
    assert names("app == 'web' && has(tier)") == ["a"]
    assert names("!has(app)") == ["c", "d"]
    assert names("app=web", "b", "c") == ["b"]
    wrong = run("get", "pools", "-l", "app == ")
    assert wrong.exit_code == 2
    assert "-l" in wrong.output


def test_built_in_tiers_are_listed_stored_or_not(run: Run, store: SqliteDatastore) -> None:
    put(store, "Tier", "security", {"order": 5.0})
    put(store, "Tier", "default", {"order": 1e6, "defaultAction": "Deny"})
    assert run("get", "tiers").output.splitlines() == [
        "NAME            ORDER",
        "default         1e+06",
        "kube-admin      1000",
        "kube-baseline   1e+07",
        "security        5",
    ]
    text = run("get", "tier", "kube-baseline", "-o", "yaml").output
    assert yaml.safe_load(text)["spec"]["defaultAction"] == "Pass"
    assert run("apply", "-f", "-", stdin=text).output == "Tier kube-baseline created\n"
    assert run("get", "tier", "none").exit_code == 1


def test_export_leaves_out_what_the_cluster_added(run: Run, store: SqliteDatastore) -> None:
    run("apply", "-n", "shop", "-f", "-", stdin=POLICY)
    key = Key("NetworkPolicy", "web", "shop")
    value = store.get(key).value
    value["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/last-applied-configuration": "{}",
        "mine": "x",
    }
    store.update(key, value)
    one = yaml.safe_load(run("get", "np", "web", "-n", "shop", "-o", "yaml", "--export").output)
    assert one["metadata"] == {"name": "web", "annotations": {"mine": "x"}}
    many = json.loads(run("get", "np", "-A", "-o", "json", "--export").output)
    assert many["metadata"] == {}
    assert many["items"][0]["metadata"]["namespace"] == "shop"
    again = run("apply", "-f", "-", "-n", "other", stdin=json.dumps(one))
    assert again.output == "NetworkPolicy other/web created\n"


def test_what_stands_in_files(run: Run, store: SqliteDatastore, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "pool.yaml").write_text(POOL)
    (tmp_path / "deep" / "policy.yaml").write_text(POLICY)
    run("apply", "-R", "-f", tmp_path)
    assert run("get", "-f", tmp_path, "-o", "name").output == "ippool/pods\n"
    tables = run("get", "-R", "-f", tmp_path).output
    assert tables.splitlines() == [
        "NAME   TIER",
        "web    default",
        "",
        "NAME   CIDR          SELECTOR",
        "pods   10.0.0.0/16   all()",
    ]
    both = yaml.safe_load(run("get", "-R", "-f", tmp_path, "-o", "yaml").output)
    assert (both["kind"], len(both["items"])) == ("List", 2)
    run("delete", "-f", tmp_path)
    gone = run("get", "-f", tmp_path)
    assert gone.exit_code == 1
    assert "IPPool pods: does not exist" in gone.output
    for wrong in (["get"], ["get", "pools", "-f", tmp_path], ["get", "-f", tmp_path, "-w"]):
        assert run(*wrong).exit_code == 2


@pytest.mark.parametrize("verb", ["apply", "create", "replace", "delete", "validate", "get"])
def test_files_without_resources(run: Run, tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty.yaml").write_text("---\n# nothing\n")
    refused = run(verb, "-f", tmp_path)
    assert refused.exit_code == 1
    assert "no resource in" in refused.output
    assert run(verb, "-f", tmp_path, "--skip-empty").exit_code == 0


def test_a_growing_table() -> None:
    table = Table(["A", "B"])
    assert table.head() == "A   B"
    assert table.row(["long", ""]) == "long   -"
    assert table.row(["x", "y"]) == "x      y"


# -- a real process that watches -----------------------------------------------------------


@contextmanager
def watching(path: Path, *arguments: str) -> Iterator[Callable[[str], None]]:
    """``get … -w``; the value waits for a line that begins so."""
    log = path.parent / "watched"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "manxctl", "get", *arguments, "-w"],
            env=os.environ | {"MANX_DATASTORE": f"sqlite://{path}"},
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
        )

    def heard(text: str) -> None:
        try:
            eventually(lambda: any(x.startswith(text) for x in log.read_text().splitlines()))
        except AssertionError:
            raise AssertionError(f"{text!r} not in {log.read_text()}") from None

    try:
        yield heard
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_watch(path: Path, store: SqliteDatastore) -> None:
    labelled(store, "a", app="web")
    labelled(store, "b")
    with watching(path, "pools", "-l", "app=web") as heard:
        heard("ADDED   a")
        labelled(store, "c", app="web")
        heard("ADDED   c")
        a = store.get(Key("IPPool", "a"))
        a.value["spec"]["cidr"] = "10.9.0.0/16"
        store.update(a.key, a.value)
        heard("MODIFIED   a      10.9.0.0/16")
        a.value["metadata"]["labels"] = {}
        store.update(a.key, a.value)
        heard("DELETED    a")
        store.delete(Key("IPPool", "c"))
        heard("DELETED    c")
    assert "   b" not in (path.parent / "watched").read_text()


def test_watch_as_events(path: Path, store: SqliteDatastore) -> None:
    with watching(path, "tiers", "-o", "json") as heard:
        heard('{"type": "ADDED", "object": {"apiVersion": "projectcalico.org/v3", "kind": "Tier"')
        put(store, "Tier", "security", {"order": 5})
        eventually(lambda: "security" in (path.parent / "watched").read_text())
    lines = (path.parent / "watched").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [(e["type"], e["object"]["metadata"]["name"]) for e in events] == [
        ("ADDED", "default"),
        ("ADDED", "kube-admin"),
        ("ADDED", "kube-baseline"),
        ("ADDED", "security"),
    ]


def test_as_users_run_it(path: Path, tmp_path: Path) -> None:
    """Each verb and option in a process of its own."""
    for arguments, stdin, output in (
        (["create", "-f", "-"], POOL, "IPPool pods created"),
        (["create", "-f", "-", "--skip-exists"], POOL, "IPPool pods"),
        (["patch", "pool", "pods", "-p", '{"spec":{"disabled":true}}'], "", "IPPool pods patched"),
        (["label", "pool", "pods", "a=b"], "", "IPPool pods labelled"),
        (["label", "pool", "pods", "a", "--remove"], "", "IPPool pods labelled"),
        (["get", "pool", "pods", "--export", "-o", "yaml"], "", "apiVersion"),
        (["validate", "-f", "-"], POOL, "1 resource, all valid"),
        (["version"], "", "manxctl "),
        (["delete", "pool", "pods"], "", "IPPool pods deleted"),
        (["delete", "pool", "pods", "--skip-not-exists"], "", "IPPool pods does not exist"),
    ):
        result = manxctl(path, *arguments, stdin=stdin)
        assert (result.returncode, result.stderr) == (0, ""), arguments
        assert result.stdout.startswith(output)
