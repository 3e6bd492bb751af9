from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from datastore.environment import Environment, configure_logging


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Node-1.Example")
    assert Environment.load({}) == Environment(
        node="node-1.example",
        datastore="sqlite:////var/lib/manx/datastore.db",
        run_dir=Path("/run/manx"),
        log_level="INFO",
    )


def test_variables() -> None:
    environment = Environment.load(
        {
            "MANX_NODENAME": "n1",
            "MANX_DATASTORE": "sqlite:///tmp/x.db",
            "MANX_RUN_DIR": "/tmp/run",
            "MANX_LOG_LEVEL": "debug",
        }
    )
    assert environment == Environment("n1", "sqlite:///tmp/x.db", Path("/tmp/run"), "DEBUG")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MANX_NODENAME", "Node 1"),
        ("MANX_NODENAME", "-a"),
        ("MANX_NODENAME", "a\n"),
        ("MANX_NODENAME", "a" * 254),
        ("MANX_RUN_DIR", "run"),
        ("MANX_LOG_LEVEL", "LOUD"),
    ],
)
def test_what_can_not_be_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*expected"):
        Environment.load({name: value})


def test_logging_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logging(Environment("n1", "", Path("/run"), "WARNING"), "felix")
        logging.getLogger("felix.routes").warning("it %s", "works")
        logging.getLogger("felix.routes").info("not shown")
    finally:
        root.handlers, root.level = before, level
    assert capsys.readouterr().err.endswith(" WARNING felix felix.routes: it works\n")
