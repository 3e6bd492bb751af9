"""Fixtures for the tests of all rooms."""

from tests.support.netns import namespace, netlink

__all__ = ["namespace", "netlink"]
