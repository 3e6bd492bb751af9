"""The plugin on a node: executable and configuration, put there and taken away."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cni import install
from datastore.interface import Key
from tests.cni.rig import ROOT, Rig, configuration

SOCKET = Path("/run/elsewhere/cni.sock")


def manx_cni(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cni", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def status(path: Path, **variables: str) -> dict[str, object]:
    done = subprocess.run(
        [path],
        env={"CNI_COMMAND": "STATUS", **variables},
        input=json.dumps(configuration()).encode(),
        capture_output=True,
        timeout=100,
        check=False,
    )
    report: dict[str, object] = json.loads(done.stdout or "{}")
    return report


def test_install_and_uninstall(tmp_path: Path, rig: Rig) -> None:
    bin_dir, conf_dir = tmp_path / "bin", tmp_path / "net.d"
    directories = ("--bin-dir", str(bin_dir), "--conf-dir", str(conf_dir))
    done = manx_cni("install", *directories, MANX_RUN_DIR=str(rig.socket.parent))
    assert done.returncode == 0, done.stderr
    plugin, conflist = bin_dir / "manx", conf_dir / "10-manx.conflist"
    assert stat.S_IMODE(plugin.stat().st_mode) == 0o755
    # it knows where the daemon is without being told
    assert status(plugin) == {}
    network = json.loads(conflist.read_text())
    assert network["name"] == "k8s-pod-network"
    assert "1.1.0" in network["cniVersions"]
    pod = rig.container()
    conf = network["plugins"][0] | {"cniVersion": "1.0.0", "name": "x"}
    assert conf["policy_setup_timeout_seconds"] > 0
    conf["policy_setup_timeout_seconds"] = 0  # no felix is there
    rig.call("ADD", pod, conf).ok()
    rig.call("DEL", pod, conf).ok()
    assert manx_cni("uninstall", *directories).returncode == 0
    assert list(bin_dir.iterdir()) == list(conf_dir.iterdir()) == []
    assert manx_cni("uninstall", *directories).stdout == ""


def test_what_is_right_is_not_touched(tmp_path: Path) -> None:
    first = install.install(tmp_path, tmp_path, SOCKET)
    before = [path.stat().st_ino for path in first]
    assert [path.stat().st_ino for path in install.install(tmp_path, tmp_path, SOCKET)] == before
    plugin, _, conflist = install.install(tmp_path, tmp_path, SOCKET, mtu=1400)
    assert plugin.stat().st_ino == before[0]
    assert json.loads(conflist.read_text())["plugins"][0]["mtu"] == 1400
    plugin.chmod(0o700)
    install.install(tmp_path, tmp_path, SOCKET)
    assert stat.S_IMODE(plugin.stat().st_mode) == 0o755


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    plugin, *_ = install.install(tmp_path, tmp_path, SOCKET)
    assert plugin.read_bytes().startswith(b"#!/")
    assert str(SOCKET) in str(status(plugin)["msg"])


def test_with_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plugin, *_ = install.install(tmp_path / "bin", tmp_path / "conf", SOCKET)
    assert plugin.read_bytes().startswith(b"#!/")


def test_chained_plugins(tmp_path: Path) -> None:
    """A runtime takes one version for the whole chain: the newest that all of it speak."""
    directories = ("--bin-dir", str(tmp_path), "--conf-dir", str(tmp_path))
    (tmp_path / "tuning").symlink_to("/usr/lib/cni/tuning")
    (tmp_path / "new").write_text('#!/bin/sh\necho \'{"supportedVersions": ["1.1.0"]}\'\n')
    (tmp_path / "new").chmod(0o755)
    expected = {"tuning": "1.0.0", "new": "1.1.0", "missing": "1.0.0"}
    for name, version in expected.items():
        plugin = json.dumps({"type": name, "capabilities": {"x": True}})
        assert manx_cni("install", *directories, "--chain", plugin).returncode == 0
        network = json.loads((tmp_path / "10-manx.conflist").read_text())
        assert [plugin["type"] for plugin in network["plugins"]] == ["manx", name]
        assert network["cniVersions"][-1] == network["cniVersion"] == version


@pytest.mark.parametrize("wrong", ["{", "[]", '{"name": "x"}', '{"type": "../x"}'])
def test_chained_plugins_that_are_wrong(tmp_path: Path, wrong: str) -> None:
    directories = ("--bin-dir", str(tmp_path), "--conf-dir", str(tmp_path))
    done = manx_cni("install", *directories, "--chain", wrong)
    assert done.returncode == 1
    assert wrong in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dual_stack_network(tmp_path: Path, rig: Rig) -> None:
    """What is installed is what an ADD gets: addresses of both families, from the pool named."""
    directories = ("--bin-dir", str(tmp_path), "--conf-dir", str(tmp_path))
    settings = {
        "mtu": 1400,
        "ipam": {"assign_ipv6": "true", "ipv6_pools": ["six"]},
        "container_settings": {"allow_ip_forwarding": True},
        "dns": {"nameservers": ["10.96.0.10"]},
        "policy_setup_timeout_seconds": 0,
    }
    done = manx_cni("install", *directories, "--mtu", "9000", "--config", json.dumps(settings))
    assert done.returncode == 0, done.stderr
    network = json.loads((tmp_path / "10-manx.conflist").read_text())
    conf = network["plugins"][0] | {"cniVersion": "1.1.0", "name": network["name"]}
    rig.create("IPPool", "six", spec={"cidr": "fd00:66::/64"})
    pod = rig.container()
    result = rig.call("ADD", pod, conf).ok()
    assert [ip["address"].split("/")[1] for ip in result["ips"]] == ["32", "128"]
    assert result["dns"] == {"nameservers": ["10.96.0.10"]}
    assert result["interfaces"][1]["mtu"] == 1400
    assert rig.call("CHECK", pod, conf | {"prevResult": result}).ok() is None
    rig.call("DEL", pod, conf).ok()
    rig.store.delete(Key("IPPool", "six"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"type": "other"}', "config: type: 'other'"),
        ('{"mtu": "large"}', "config: network configuration: mtu"),
        ('{"ipam": {"assign_ipv4": false}}', "ipam"),
        ("@/no/such/file", "/no/such/file"),
    ],
)
def test_settings_that_are_wrong(tmp_path: Path, wrong: str, said: str) -> None:
    directories = ("--bin-dir", str(tmp_path), "--conf-dir", str(tmp_path))
    done = manx_cni("install", *directories, "--config", wrong)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_usual_chain(tmp_path: Path) -> None:
    """Host ports, where the runtime has the plugin for them, once."""
    bin_dir, conf_dir = tmp_path / "bin", tmp_path / "net.d"
    directories = ("--bin-dir", str(bin_dir), "--conf-dir", str(conf_dir))

    def chained(*options: str) -> list[dict[str, object]]:
        assert manx_cni("install", *directories, *options).returncode == 0
        plugins: list[dict[str, object]] = json.loads((conf_dir / "10-manx.conflist").read_text())[
            "plugins"
        ]
        return plugins[1:]

    assert chained() == []
    for plugin in ("portmap", "bandwidth", "tuning"):
        (bin_dir / plugin).symlink_to(f"/usr/lib/cni/{plugin}")
    assert [plugin["capabilities"] for plugin in chained()] == [{"portMappings": True}]
    assert chained("--no-usual-chain") == []
    own = ("--chain", '{"type": "tuning"}', "--chain", '{"type": "portmap", "snat": false}')
    assert [(plugin["type"], plugin.get("snat")) for plugin in chained(*own)] == [
        ("tuning", None),
        ("portmap", False),
    ]


def test_a_rival_in_the_chain(tmp_path: Path) -> None:
    directories = ("--bin-dir", str(tmp_path), "--conf-dir", str(tmp_path))
    done = manx_cni("install", *directories, "--chain", '{"type": "bandwidth"}')
    assert done.returncode == 0
    assert "warning: chained plugin bandwidth: felix limits" in done.stderr


def test_a_configuration_that_comes_first(tmp_path: Path) -> None:
    (tmp_path / "05-other.conflist").touch()
    done = manx_cni("install", "--bin-dir", str(tmp_path), "--conf-dir", str(tmp_path))
    assert done.returncode == 0
    assert "05-other.conflist" in done.stderr


def test_a_socket_that_cannot_be_compiled_in(tmp_path: Path) -> None:
    for wrong in ('/run/"/cni.sock', "/" + "x" * 107, "relative"):
        with pytest.raises(ValueError, match=r"socket .*: expected"):
            install.install(tmp_path, tmp_path, Path(wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be(tmp_path: Path) -> None:
    done = manx_cni("install", "--bin-dir", "/proc/x", "--conf-dir", str(tmp_path))
    assert done.returncode == 1
    assert "/proc/x" in done.stderr
    assert list(tmp_path.iterdir()) == []
