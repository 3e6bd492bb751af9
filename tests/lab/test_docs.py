"""What docs/lab.md shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lab.fabric import Fabric, FabricSpec, Host, Link, Node, OtherPlugin, Pod, Rack, TopOfRack
from lab.fabricfile import load
from tests.lab.fabrics import lab_name

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/lab.md").read_text()

POLICY = {
    "apiVersion": "projectcalico.org/v3",
    "kind": "NetworkPolicy",
    "metadata": {"name": "open"},
    "spec": {"selector": "all()", "types": ["Ingress"], "ingress": [{"action": "Allow"}]},
}


def example(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert isinstance(text, str)
    return text


def write_example(folder: Path) -> Path:
    (folder / "policies.yaml").write_text(yaml.safe_dump(POLICY))
    path = folder / "fabric.yaml"
    path.write_text(example("yaml"))
    return path


def test_the_example_is_a_fabric(tmp_path: Path) -> None:
    fabric = load(write_example(tmp_path))
    assert [each["kind"] for each in fabric.spec.resources] == [
        "NetworkPolicy", "IPPool", "BGPConfiguration", "BGPPeer", "BGPPeer",
    ]  # fmt: skip


def test_the_demos_fabric_can_be_built() -> None:
    assert load(ROOT / "demo/fabric.yaml").name == "demo"


@pytest.mark.parametrize(
    "model", [Fabric, FabricSpec, Rack, TopOfRack, Node, Link, Host, Pod, OtherPlugin]
)
def test_every_field_is_described(model: type[Fabric]) -> None:
    for name, field in model.model_fields.items():
        assert re.search(rf"\b{field.alias or name}\b", PAGE), f"{model.__name__}.{name}"


@pytest.mark.slow
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = example("python").replace("Lab.up(", f"Lab.up(name={lab_name()!r}, fabric=")
    exec(compile(code, "docs/lab.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 2 + 1
    assert lines[-1].isdecimal()
