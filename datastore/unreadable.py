"""What stands for an object whose bytes a store holds and nobody can read. Pure.

It says so in its spec, and ``api.registry`` refuses it: it alone is then reported, where all
objects are checked, and can be deleted or put right.
"""

from __future__ import annotations

import orjson

from api.errors import UNREADABLE
from api.kinds import KINDS
from datastore.interface import JSON, Key


def stand_in(key: Key, place: str, error: Exception) -> JSON:
    """The object to hand out for the one at ``place``."""
    space = {"namespace": key.namespace} if key.namespace else {}
    return {
        "apiVersion": KINDS[key.kind].api_version,
        "kind": KINDS[key.kind].kind,
        "metadata": {"name": key.name} | space,
        "spec": {UNREADABLE: f"{place}: {error}"},
    }


def read(key: Key, place: str, data: bytes) -> JSON:
    """The JSON object in ``data``, or what stands for it."""
    try:
        found = orjson.loads(data)
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object is expected, not {type(found).__name__}")
        return found
    except ValueError as error:
        return stand_in(key, place, error)
