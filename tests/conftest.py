"""Fixtures for the tests of all rooms."""

from tests.support.etcd import etcd, etcd_cluster
from tests.support.kube import kube_apiserver
from tests.support.netns import namespace, netlink

__all__ = ["etcd", "etcd_cluster", "kube_apiserver", "namespace", "netlink"]
