"""Fixtures for the tests of all rooms."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

from tests.support.etcd import etcd, etcd_cluster
from tests.support.kube import kube_apiserver
from tests.support.netns import namespace, netlink
from tests.support.tls import mend

__all__ = ["etcd", "etcd_cluster", "kube_apiserver", "namespace", "netlink"]

# a shell starts what runs in the background with interrupts ignored, and children inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

mend()

# how long an example takes says how busy the machine is: Hypothesis would fail what is right
settings.register_profile("manx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("manx")
