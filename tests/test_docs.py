"""What the documentation names exists: functions in docs/design.md, files that pages link to."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
DESIGN = (ROOT / "docs/design.md").read_text()
REFERENCES = sorted(set(re.findall(r"`([a-z_]+/[a-z_/]+\.py):([A-Za-z_.]+)`", DESIGN)))


def _is_defined(tree: ast.AST, name: str) -> bool:
    first, _, rest = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == first:
            return not rest or _is_defined(node, rest)
    return False


def test_design_names_functions_at_all() -> None:
    assert len(REFERENCES) > 25


@pytest.mark.parametrize(("file", "name"), REFERENCES)
def test_function_in_design_exists(file: str, name: str) -> None:
    assert _is_defined(ast.parse((ROOT / file).read_text()), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target
