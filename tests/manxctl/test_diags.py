"""What a report holds, and what it must not."""

from __future__ import annotations

import stat
import tarfile
from pathlib import Path

import pytest
import yaml

from datastore.interface import Key
from datastore.sqlite import SqliteDatastore
from manxctl.diags import redacted
from tests.manxctl.conftest import Run
from tests.manxctl.test_get import put

SECRET = "correct-horse"


def contents(path: Path) -> dict[str, str]:
    """The files of an archive, without the folder they are all in."""
    with tarfile.open(path) as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file
            found[member.name.partition("/")[2]] = file.read().decode()
    return found


def test_cluster(run: Run, store: SqliteDatastore, tmp_path: Path) -> None:
    put(store, "IPPool", "pods", {"cidr": "10.0.0.0/16"})
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "web",
            "namespace": "shop",
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": SECRET,
                "cni.projectcalico.org/podIP": "10.0.0.1/32",
            },
        },
        "spec": {
            "nodeName": "n1",
            "containers": [{"name": "c", "env": [{"name": "PASSWORD", "value": SECRET}]}],
        },
    }
    store.create(Key("Pod", "web", "shop"), pod)
    store.create(Key("Pod", "broken", "shop"), {"spec": {"nodeName": [SECRET]}, "kind": "Pod"})
    file = tmp_path / "report.tar.gz"
    result = run("cluster", "diags", "-o", file)
    assert (result.exit_code, result.output) == (0, f"wrote {file}\n")
    found = contents(file)
    assert "IP pool pods" in found["ipam.txt"]
    assert yaml.safe_load(found["resources/ippools.yaml"])["items"][0]["spec"]["cidr"]
    pods = yaml.safe_load(found["resources/pods.yaml"])["items"]
    by_name = {item["metadata"]["name"]: item for item in pods}
    assert by_name["web"]["spec"]["nodeName"] == "n1"
    assert list(by_name["web"]["metadata"]["annotations"]) == ["cni.projectcalico.org/podIP"]
    assert "unreadable" in by_name["broken"]
    assert "manx " in found["versions"]
    assert SECRET not in "".join(found.values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = run("cluster", "diags", "-o", file)
    assert again.exit_code == 1
    assert "File exists" in again.output


def test_node_without_programs(run: Run, tmp_path: Path) -> None:
    """Where nothing answers the report says so, and holds the rest."""
    logs = tmp_path / "log"
    logs.mkdir()
    (logs / "felix.log").write_text(f"started\npassword: {SECRET}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exabgp.conf").write_text(f'md5-password "{SECRET}";\nhold-time 90;\n')
    file = tmp_path / "node.tar.gz"
    assert run("node", "diags", "-o", file, "--log-dir", logs).exit_code == 0
    found = contents(file)
    assert found["status/felix.json"].startswith("not to be had: ")
    assert "does manx-bird-glue run?" in found["status/bgp.json"]
    assert "LOOPBACK" in found["kernel/links.txt"]
    assert found["kernel/routes-v4.txt"].startswith("$ ip -4 -N route show table all\n")
    assert found["log/felix.log"].startswith("started\n")
    assert "hold-time 90" in found["run/exabgp.conf"]
    assert SECRET not in "".join(found.values())


@pytest.mark.parametrize(
    "text",
    [
        'md5-password "@ @";',
        "password=@",
        "MANX_ETCD_PASSWORD=@",
        "token: @",
        "'token': '@'",
        '{"secret": "@"}',
        "private key: @",
        "PrivateKey = @",
        "--password @ --other",
        "Passphrase @",
    ],
)
def test_redacted(text: str) -> None:
    shown = redacted(text.replace("@", SECRET).encode()).decode()
    assert SECRET not in shown
    assert "(left out)" in shown


def test_version_of_the_cluster(run: Run, store: SqliteDatastore, tmp_path: Path) -> None:
    spec = {"clusterGUID": "abc", "calicoVersion": "v3.33.0", "datastoreReady": False}
    put(store, "ClusterInformation", "default", spec)
    lines = run("version").output.splitlines()
    assert lines[0].startswith("manxctl ")
    assert lines[2:] == [
        "cluster GUID abc",
        "Calico version v3.33.0",
        "locked: manxctl datastore migrate unlock",
    ]
    assert len(run("version", "--client").output.splitlines()) == 1
