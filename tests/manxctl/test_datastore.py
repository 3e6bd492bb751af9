"""``manxctl datastore migrate``, from one file to another store."""

from __future__ import annotations

from pathlib import Path

from datastore.interface import JSON, Key
from datastore.sqlite import SqliteDatastore
from tests.manxctl.conftest import Run


def pool(name: str, cidr: str) -> tuple[Key, JSON]:
    value = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "IPPool",
        "metadata": {"name": name},
        "spec": {"cidr": cidr},
    }
    return Key("IPPool", name), value


def test_lock_export_import_unlock(run: Run, store: SqliteDatastore, tmp_path: Path) -> None:
    store.create(*pool("a", "10.0.0.0/16"))
    store.create(*pool("b", "10.1.0.0/16"))
    file, there = tmp_path / "export", f"sqlite://{tmp_path}/there.db"
    refused = run("datastore", "migrate", "export", "-f", file)
    assert refused.exit_code == 1
    assert "manxctl datastore migrate lock" in refused.output
    assert run("datastore", "migrate", "lock").output == "datastore locked\n"
    assert run("datastore", "migrate", "export", "-f", file).exit_code == 0

    target = SqliteDatastore(tmp_path / "there.db")
    target.create(*pool("b", "10.2.0.0/16"))
    import_ = ("datastore", "migrate", "import", "--datastore", there, "-f", file)
    planned = run(*import_, "--dry-run")
    assert planned.exit_code == 1
    assert "IPPool b: conflict: differs in spec" in planned.output
    assert "would be: 1 created, 1 present, 1 conflict" in planned.output
    assert [e.key.name for e in target.list("IPPool").entries] == ["b"]

    target.delete(Key("IPPool", "b"))
    done = run(*import_)
    assert done.exit_code == 0
    assert "2 created" in done.output
    assert "manxctl datastore migrate unlock" in done.output
    assert "3 present" in run(*import_).output
    unlocked = run("datastore", "migrate", "unlock", "--datastore", there)
    assert unlocked.output == "datastore unlocked\n"
    information = target.get(Key("ClusterInformation", "default")).value
    assert information["spec"]["datastoreReady"] is True
    target.close()


def test_an_export_is_for_its_owners_eyes(run: Run, store: SqliteDatastore, tmp_path: Path) -> None:
    """There are passwords in it. Also where a file was that all could read, and a longer one."""
    store.create(*pool("a", "10.0.0.0/16"))
    run("datastore", "migrate", "lock")
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("x" * 10_000)
    old.chmod(0o644)
    for file in (new, old):
        assert run("datastore", "migrate", "export", "-f", file).exit_code == 0
        assert file.stat().st_mode & 0o777 == 0o600
    shown = run("datastore", "migrate", "export").stdout
    assert new.read_text() == old.read_text() == shown
    assert shown.endswith('{"end":2}\n')
    nowhere = run("datastore", "migrate", "export", "-f", tmp_path / "no" / "where")
    assert nowhere.exit_code == 1
    assert "No such file or directory" in nowhere.output


def test_a_file_that_is_no_export(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text("kind: IPPool\n")
    result = run("datastore", "migrate", "import", "-f", file)
    assert result.exit_code == 1
    assert f"{file}: line 1" in result.output


def test_a_datastore_that_is_none(run: Run) -> None:
    result = run("datastore", "migrate", "lock", "--datastore", "file:///a")
    assert result.exit_code == 1
    assert "scheme 'file' is not known" in result.output
