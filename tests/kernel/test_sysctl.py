"""Settings of the namespace a thread is in."""

import pytest

from kernel import sysctl
from kernel.links import veth
from kernel.netlink import NetlinkSocket
from kernel.netns import Namespace, inside

FORWARDING = ("net", "ipv4", "ip_forward")


def test_a_write_is_for_the_threads_namespace_alone(namespace: Namespace) -> None:
    before = sysctl.read(FORWARDING)
    wanted = 1 - int(before)
    with inside(namespace.fd):
        initial = sysctl.read(FORWARDING)
        sysctl.write(FORWARDING, wanted)
        assert sysctl.read(FORWARDING) == str(wanted)
        assert sysctl.write(FORWARDING, initial) == (initial != str(wanted))
    assert sysctl.read(FORWARDING) == before


def test_an_equal_value_is_not_written(namespace: Namespace) -> None:
    path = ("net", "ipv6", "conf", "default", "disable_ipv6")
    with inside(namespace.fd):
        assert sysctl.write(path, 1)
        assert not sysctl.write(path, 1)
        assert not sysctl.write(path, "1")


def test_an_interface_with_a_dot_has_settings(namespace: Namespace, netlink: NetlinkSocket) -> None:
    assert netlink.batch([veth("cali1.2", "peer")]) == []
    with inside(namespace.fd):
        path = ("net", "ipv4", "conf", "cali1.2", "rp_filter")
        sysctl.write(path, 1)
        assert sysctl.read(path) == "1"


def test_what_does_not_exist_or_is_refused_says_so(namespace: Namespace) -> None:
    with inside(namespace.fd):
        with pytest.raises(FileNotFoundError, match="nothere"):
            sysctl.write(("net", "ipv4", "conf", "nothere", "rp_filter"), 1)
        with pytest.raises(OSError, match=r"ip_forward = many: Invalid argument"):
            sysctl.write(FORWARDING, "many")


@pytest.mark.parametrize("part", ["", ".", "..", "a/b"])
def test_a_path_cannot_leave_its_folder(part: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        sysctl.read(("net", part, "ip_forward"))
