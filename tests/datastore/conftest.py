"""Fixtures of several modules here."""

from tests.datastore.kubernetes_world import server, store

__all__ = ["server", "store"]
