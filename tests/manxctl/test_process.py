"""The command as people run it: a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from manxctl.main import VERBS, main
from tests.manxctl.conftest import Run
from tests.manxctl.test_files import POOL
from tests.support.etcd import Etcd

ROOT = Path(__file__).resolve().parents[2]


def manxctl(path: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manxctl", *arguments],
        env=os.environ | {"MANX_DATASTORE": f"sqlite://{path}"},
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_two_processes_one_datastore(path: Path) -> None:
    assert manxctl(path, "apply", "-f", "-", stdin=POOL).stdout == "IPPool pods created\n"
    result = manxctl(path, "get", "pools")
    assert (result.returncode, result.stderr) == (0, "")
    assert "10.0.0.0/16" in result.stdout
    result = manxctl(path, "apply", "-f", "-", stdin=POOL.replace("/16", "/33"))
    assert result.returncode == 1
    assert result.stderr.startswith("Error: standard input, document 1: IPPool pods: spec.cidr")


def test_a_datastore_that_is_not_there(tmp_path: Path) -> None:
    result = manxctl(tmp_path / "absent" / "datastore.db", "get", "pools")
    assert result.returncode == 1
    assert "absent" in result.stderr
    assert "Traceback" not in result.stderr


def test_start_up_imports_no_verb_and_no_models() -> None:
    code = "import sys, manxctl.main; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"pydantic", "yaml", "rich", "pyroute2", "manxctl.apply"}


def test_get_imports_no_models(path: Path) -> None:
    code = (
        "import sys\nfrom manxctl.main import main\n"
        "main(['get', 'pools'], standalone_mode=False)\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"MANX_DATASTORE": f"sqlite://{path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pydantic" not in done.stdout.split()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_version(run: Run) -> None:
    assert run("version").output.startswith("manxctl ")


def test_unknown_verb(run: Run) -> None:
    assert run("aply").exit_code == 2


def test_what_a_store_refuses_is_named(etcd: Etcd) -> None:
    nets = [f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}/32" for n in range(100_000)]
    value = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "GlobalNetworkSet",
        "metadata": {"name": "vast"},
        "spec": {"nets": nets},
    }
    environment = {"MANX_DATASTORE": f"etcd://{','.join(etcd.endpoints)}"}
    result = CliRunner().invoke(
        main, ["create", "-f", "-"], input=json.dumps(value), env=environment
    )
    assert result.exit_code == 1
    assert "Error: GlobalNetworkSet(vast): etcd " in result.stderr
    assert "request is too large" in result.stderr
