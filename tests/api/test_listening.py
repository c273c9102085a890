"""Listening sockets on machines with IPv6, without it, and without IPv4 (network namespaces of this test)."""

import contextlib
import errno
import socket
import subprocess
import sys
from contextlib import closing

import pytest

from moe_api.listening import listen

EVERY = ("", "0.0.0.0", "::", "::0")  # noqa: S104 - what this is about
WITHOUT_IPV6 = "sysctl -qw net.ipv6.conf.all.disable_ipv6=1"
WITHOUT_IPV4 = "ip address delete 127.0.0.1/8 dev lo"
# A few moments of a namespace of its own; the addresses at which each of sys.argv[1:] is reached.
PROGRAM = """
import sys
from tests.api.test_listening import reached
for host in sys.argv[1:]:
    print(*reached(host))
"""


def reached(host):
    """At which loopback addresses a socket that listens at `host` accepts."""
    found = []
    with closing(listen(host, 0)) as listener:
        for each in ("127.0.0.1", "::1"):
            with contextlib.suppress(OSError):
                socket.create_connection((each, listener.getsockname()[1]), timeout=5).close()
                found.append(each)
    return found


def in_namespace(first, *hosts):
    """`reached` of each host, with a loopback interface that `first` has changed."""
    script = f'ip link set lo up && {first} && exec "$0" "$@"'
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", script]
    command += [sys.executable, "-c", PROGRAM, *hosts]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [line.split() for line in result.stdout.splitlines()]


def test_all_addresses_are_of_both_families():
    assert in_namespace("true", *EVERY, "localhost") == [*[["127.0.0.1", "::1"]] * 4, ["127.0.0.1"]]


def test_a_machine_without_ipv6_listens_on_ipv4():
    assert in_namespace(WITHOUT_IPV6, *EVERY, "127.0.0.1") == [["127.0.0.1"]] * 5


def test_a_machine_without_ipv4_listens_on_ipv6():
    assert in_namespace(WITHOUT_IPV4, *EVERY, "::1") == [["::1"]] * 5


@pytest.mark.parametrize("host", EVERY)
def test_a_kernel_without_ipv6_sockets_listens_on_ipv4(monkeypatch, host):
    """As with the kernel parameter ipv6.disable=1."""
    made = socket.socket

    class OfIpv4(made):
        def __init__(self, family=-1, *arguments, **options):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *arguments, **options)

    monkeypatch.setattr(socket, "socket", OfIpv4)
    with closing(listen(host, 0)) as listener:
        assert listener.family == socket.AF_INET


def test_a_port_that_one_family_uses_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as used, pytest.raises(OSError, match="in use"):
        listen("::", used.getsockname()[1])


@pytest.mark.parametrize("host", ["::", "127.0.0.1", "localhost"])
@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none_is_refused(host, port):
    with pytest.raises(OverflowError, match="port must be 0-65535"):
        listen(host, port)


@pytest.fixture
def twice(monkeypatch):
    """Gives "both" two addresses, in this order."""

    def give(first, second):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (first, second)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    return give


def test_a_name_whose_first_address_has_the_port_in_use_is_refused(twice):
    """Clients would reach the other process."""
    with closing(socket.create_server(("127.0.0.1", 0))) as used:
        port = used.getsockname()[1]
        twice(("127.0.0.1", port), ("127.0.0.2", port))
        with pytest.raises(OSError, match="in use"):
            listen("both", port)


def test_a_name_whose_first_address_is_another_machines_uses_the_next_one(twice):
    twice(("192.0.2.1", 0), ("127.0.0.2", 0))
    with closing(listen("both", 0)) as listener:
        assert listener.getsockname()[0] == "127.0.0.2"
