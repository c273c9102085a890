"""Addresses are written as they are checked."""

import pytest

from moe_api.address import check_address, join, split


@pytest.mark.parametrize(
    ("host", "written"),
    [("10.0.0.1", "10.0.0.1:8000"), ("fd00::1", "[fd00::1]:8000"), ("worker-0", "worker-0:8000")],
)
def test_a_host_and_a_port_make_an_address(host, written):
    assert join(host, 8000) == check_address(join(host, 8000)) == written
    assert split(written) == (host, 8000)
