"""EndpointSlices as the API server writes them, and endpoints out of them."""

from moe_frontend.discovery.endpoints import Endpoint, endpoints, static_endpoints


def slice_of(*entries, ports=({"name": "grpc", "port": 8000, "protocol": "TCP"},), kind="IPv4"):
    return {
        "addressType": kind,
        "metadata": {"name": "demo-workers-abcde"},
        "ports": list(ports),
        "endpoints": list(entries),
    }


def pod(name, address, **conditions):
    return {
        "addresses": [address],
        "conditions": conditions,
        "targetRef": {"kind": "Pod", "name": name, "namespace": "default"},
    }


READY = {"ready": True, "serving": True, "terminating": False}


def test_pods_count_from_the_start_until_they_go_away():
    piece = slice_of(
        pod("a", "10.0.0.1", **READY),
        pod("b", "10.0.0.2", ready=False, serving=False, terminating=False),
        pod("c", "10.0.0.3", ready=False, serving=True, terminating=True),
        pod("d", "10.0.0.4"),
    )
    assert {endpoint.name for endpoint in endpoints([piece])} == {"a", "b", "d"}


def test_the_grpc_port_is_found_by_name_or_alone():
    metrics = {"name": "metrics", "port": 9000}
    named = slice_of(pod("a", "10.0.0.1", **READY), ports=[metrics, {"name": "grpc", "port": 8001}])
    assert endpoints([named]) == {Endpoint("a", "10.0.0.1:8001")}
    alone = slice_of(pod("a", "10.0.0.1", **READY), ports=[{"name": "", "port": 8002}])
    assert endpoints([alone]) == {Endpoint("a", "10.0.0.1:8002")}
    unclear = slice_of(pod("a", "10.0.0.1", **READY), ports=[metrics, {"name": "http", "port": 80}])
    assert endpoints([unclear]) == frozenset()


def test_ipv6_hosts_are_bracketed_and_names_skipped():
    six = slice_of(pod("a", "fd00::1", **READY), kind="IPv6")
    assert endpoints([six]) == {Endpoint("a", "[fd00::1]:8000")}
    assert endpoints([slice_of(pod("a", "example.com", **READY), kind="FQDN")]) == frozenset()


def test_slices_that_are_empty_as_the_api_server_writes_them():
    assert endpoints([{"addressType": "IPv4", "endpoints": None, "ports": None}]) == frozenset()
    assert endpoints([slice_of({"addresses": ["10.0.0.9"], "conditions": None})]) == {
        Endpoint("10.0.0.9:8000", "10.0.0.9:8000")
    }


def test_static_addresses_name_themselves():
    assert static_endpoints(["127.0.0.1:1"]) == {Endpoint("127.0.0.1:1", "127.0.0.1:1")}


def test_a_pod_in_slices_of_both_families_is_one_endpoint():
    four = slice_of(pod("a", "10.0.0.1", **READY), pod("b", "10.0.0.2", terminating=True))
    entries = [pod("a", "fd00::1", **READY), pod("b", "fd00::2", **READY), pod("c", "fd00::3", **READY)]
    six = slice_of(*entries, kind="IPv6")
    found = endpoints([six, four])
    assert found == {Endpoint("a", "10.0.0.1:8000"), Endpoint("c", "[fd00::3]:8000")}
