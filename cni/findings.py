"""In what kernel and datastore disagree on this node, for people: the log, and a file.

``<run_dir>/cni-findings.json`` is ``{"at": RFC 3339, "findings": [{"fault", "subject",
"message"}, …]}``; ``manxctl node status`` shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from ipam.audit import Finding

FILE = "cni-findings.json"

_log = logging.getLogger(__name__)


class Teller:
    """Logs what is new and what is over, and keeps the file in ``run_dir``."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._told: frozenset[Finding] = frozenset()

    def tell(self, found: Sequence[Finding]) -> None:
        """These are all there are now. Raises OSError."""
        for finding in found:
            if finding not in self._told:
                _log.warning("%s: %s", finding.fault.value, finding)
        for finding in sorted(self._told.difference(found)):
            _log.info("%s: no longer so: %s", finding.fault.value, finding)
        self._told = frozenset(found)
        value = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "findings": [
                {"fault": each.fault.value, "subject": each.subject, "message": each.message}
                for each in found
            ],
        }
        temporary = self._path.with_name(FILE + ".new")
        temporary.write_bytes(orjson.dumps(value) + b"\n")
        temporary.replace(self._path)


def read(run_dir: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none. Raises OSError, ValueError."""
    try:
        value = orjson.loads((run_dir / FILE).read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{run_dir / FILE}: {value!r}: expected an object")
    return value
