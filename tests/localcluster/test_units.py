"""The pure parts: DNS messages, the service catalog, log records, paths in a container, settings, images."""

import fcntl
import os
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localcluster import images, linux, netlink, processes, settings
from localcluster.cri import convert, logs, rootfs
from localcluster.cri.sandbox import AddressPool
from localcluster.errors import ForwardError, ImageError, LocalClusterError
from localcluster.network import catalog, dns
from localcluster.network.catalog import Address
from localcluster.processes import identify, is_running, kill
from tests.localcluster.objects import until

ADDRESSES = (IPv4Address("10.244.0.7"), IPv4Address("10.244.0.8"))
LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!HHHHHH", 77, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def parts(reply: bytes) -> tuple[int, int, list[str]]:
    """(id, response code, addresses) of an answer."""
    identity, flags, _, answers, _, _ = struct.unpack_from("!HHHHHH", reply)
    found = [socket.inet_ntoa(reply[len(reply) - 16 * n - 4 :][:4]) for n in range(answers)]
    return identity, flags & 15, found[::-1]


@given(st.lists(LABELS, min_size=1, max_size=4))
def test_dns_answers_what_it_was_asked(labels: list[str]) -> None:
    name = ".".join(labels) + ".svc.cluster.local"
    reply = dns.answer(query(name.upper()), {name: ADDRESSES}.get)
    assert parts(reply) == (77, 0, [str(a) for a in ADDRESSES])


def test_dns_tells_no_such_name_from_no_such_record() -> None:
    known = {"web.a.svc.cluster.local": ADDRESSES}
    assert parts(dns.answer(query("web.b.svc.cluster.local"), known.get)) == (77, 3, [])
    assert parts(dns.answer(query("example.com"), known.get)) == (77, 3, [])
    assert parts(dns.answer(query("web.a.svc.cluster.local", kind=28), known.get)) == (77, 0, [])  # AAAA


@given(st.binary(max_size=80))
def test_dns_survives_any_message(message: bytes) -> None:
    reply = dns.answer(message, lambda _: ADDRESSES)
    assert reply[:2] == message[:2] if len(message) >= 2 else reply == b""


def endpoint_slice(service: str, *endpoints: dict, port: int = 8000) -> dict:
    metadata = {"namespace": "a", "name": f"{service}-x", "labels": {"kubernetes.io/service-name": service}}
    ports = [{"name": "", "port": port}]
    return {"metadata": metadata, "addressType": "IPv4", "endpoints": list(endpoints), "ports": ports}


def service_object(name: str, address: str) -> dict:
    return {
        "metadata": {"namespace": "a", "name": name},
        "spec": {"clusterIP": address, "ports": [{"port": 80}]},
    }


def test_the_catalog_knows_ready_endpoints_and_their_names() -> None:
    ready = {"addresses": ["10.244.0.7"], "hostname": "web-0", "conditions": {"ready": True}}
    unready = {"addresses": ["10.244.0.8"], "hostname": "web-1", "conditions": {"ready": False}}
    unsaid = {"addresses": ["10.244.0.9"], "hostname": "web-2", "conditions": {}}
    services = {"a/web": service_object("web", "None"), "a/front": service_object("front", "10.96.0.20")}
    slices = {"1": endpoint_slice("web", ready, unready, unsaid), "2": endpoint_slice("front", ready)}
    built = catalog.build(services, slices)
    assert {name: [str(a) for a in found] for name, found in built.records.items()} == {
        "web.a.svc.cluster.local": ["10.244.0.7", "10.244.0.9"],
        "web-0.web.a.svc.cluster.local": ["10.244.0.7"],
        "web-2.web.a.svc.cluster.local": ["10.244.0.9"],
        "front.a.svc.cluster.local": ["10.96.0.20"],
    }
    (front,) = built.listeners()
    assert built.listeners()[front] == Address("10.96.0.20", 80)
    assert built.behind(front) == (Address("10.244.0.7", 8000),)
    assert built.find("a", "web", "80").listen is None
    with pytest.raises(ForwardError, match="services in namespace b: none"):
        built.find("b", "web", "80")


@given(st.binary(max_size=400), st.lists(st.integers(1, 50), max_size=30))
def test_log_records_hold_every_byte_once_however_they_arrive(content: bytes, sizes: list[int]) -> None:
    splitter, records, rest = logs.LineSplitter(), [], content
    for size in [*sizes, len(content) + 1]:
        records += splitter.feed(rest[:size])
        rest = rest[size:]
    records += splitter.end()
    assert b"".join(text + (b"\n" if full else b"") for full, text in records).rstrip(
        b"\n"
    ) == content.rstrip(b"\n")
    assert all(b"\n" not in text for _, text in records)


def test_long_lines_become_partial_records() -> None:
    records = list(logs.LineSplitter().feed(b"x" * (2 * logs.MAX_LINE + 5) + b"\n"))
    assert [(full, len(text)) for full, text in records] == [
        (False, logs.MAX_LINE),
        (False, logs.MAX_LINE),
        (True, 5),
    ]


def test_log_times_are_rfc_3339_with_nanoseconds() -> None:
    assert logs.timestamp(1_000_000_001) == "1970-01-01T00:00:01.000000001Z"


LINKS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["a", "../b", "a/c", "./d", ".."])), max_size=4
)


@given(LINKS, st.lists(st.sampled_from(["a", "b", "c", "d", "..", "."]), max_size=5))
def test_paths_resolve_below_the_containers_root_as_the_kernel_would(
    tmp_path_factory: pytest.TempPathFactory, links: list[tuple[str, str]], path: list[str]
) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / "a" / "c").mkdir(parents=True)
    for name, target in links:
        if not (root / name).is_symlink() and not (root / name).exists():
            (root / name).symlink_to(target)
    try:
        found = rootfs.resolve(root, "/".join(path))
    except OSError:
        return  # a loop of links
    assert found.is_relative_to(root)
    expected = Path(os.path.realpath(root / "/".join(path)))
    if expected.is_relative_to(root) and ".." not in path and all(".." not in target for _, target in links):
        assert found == expected


def test_absolute_links_stay_in_the_container(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    assert rootfs.resolve(tmp_path, "/var/run/secrets/token") == tmp_path / "run/secrets/token"
    assert rootfs.resolve(tmp_path, "/../../etc") == tmp_path / "etc"


@given(st.binary(max_size=40))
def test_netlink_attributes_are_aligned_and_sized(payload: bytes) -> None:
    packed = netlink.attribute(3, payload)
    length, kind = struct.unpack_from("=HH", packed)
    assert (length, kind, packed[4:length]) == (4 + len(payload), 3, payload)
    assert len(packed) % 4 == 0
    assert len(packed) - length < 4


def ethernet(name: str) -> bytes:
    """The Ethernet address of an interface in this thread's network namespace (SIOCGIFHWADDR)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, 0x8927, struct.pack("=16s24x", name.encode()))
    return answer[18:24]


def test_the_node_keeps_its_ethernet_address_as_pods_come_and_go() -> None:
    def bridge_with_ports() -> tuple[set[bytes], list[bytes]]:
        linux.unshare(linux.CLONE_NEWNET)
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        seen, pods = set(), []
        with netlink.Netlink() as requests:
            requests.add_bridge("node", IPv4Address("10.244.0.1"))
            for number in range(20):
                seen.add(ethernet("node"))
                address = ADDRESSES[number % 2]
                requests.add_veth(f"veth{number}", "node", f"pod{number}", here, address)
                pods.append(ethernet(f"pod{number}"))
            for number in range(20):
                requests.delete_link(f"veth{number}")
                seen.add(ethernet("node"))
        os.close(here)
        return seen, pods

    with ThreadPoolExecutor(1) as threads:  # the namespace ends with its thread
        node, pods = threads.submit(bridge_with_ports).result()
    assert len(node) == 1
    assert pods == pods[:2] * 10  # whoever has the address next
    assert len({*node, *pods}) == 3


def test_released_addresses_are_not_used_again_at_once() -> None:
    pool = AddressPool()
    first, second = pool.take([]), pool.take([])
    assert [str(first), str(second)] == ["10.244.0.2", "10.244.0.3"]
    every = {pool.take([]) for _ in range(251)}
    assert first not in every
    assert pool.take([second]) == first
    with pytest.raises(OSError, match="all 253 pod addresses"):
        pool.take([*every, first, second])


def test_a_process_name_cannot_fake_its_start_time() -> None:
    fields = ["S", *["0"] * 18, "4242", "9"]
    assert processes.parse_start_time(f"17 (evil) S 1 2) {' '.join(fields)}") == 4242


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("busybox", "busybox:latest"),
        ("docker.io/library/busybox:1", "busybox:1"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("ghcr.io/a/b@sha256:00", "ghcr.io/a/b@sha256:00"),
    ],
)
def test_image_names_are_completed(name: str, full: str) -> None:
    assert images.normalize(name) == full


def test_an_unknown_image_names_those_that_exist() -> None:
    known = {image.name: image for image in images.defaults({})}
    with pytest.raises(
        ImageError, match=r"no image nginx: .* Known: busybox:latest, ghcr.io/moe-operator/operator:dev"
    ):
        images.find(known, "nginx")


@pytest.mark.parametrize(
    "text", ["nowhere", ".:/data", ":/mnt/x", "/no/such:/mnt/x", ".:/mnt", ".:/mnt/../x"]
)
def test_a_mount_that_cannot_be_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(
        LocalClusterError, match=r"expected HOST:NODE with NODE below /mnt|is not a directory"
    ):
        settings.parse_mount(text)


def test_settings_survive_their_file(tmp_path: Path) -> None:
    mounts = (settings.Mount(Path("/a"), Path("/mnt/a")),)
    written = settings.Settings(Path("/s"), mounts, {"etcd": Path("/bin/etcd")}, (Path("/n"),), 6443)
    written.write(tmp_path / "settings.json")
    assert settings.read_settings(tmp_path / "settings.json") == written


def test_stop_signals_go_by_their_names() -> None:
    names = ("RUNTIME_DEFAULT", "SIGINT", "SIGUSR1")
    assert [convert.stop_signal(name).name for name in names] == ["SIGTERM", "SIGINT", "SIGUSR1"]


def test_a_process_runs_until_its_last_thread_has_ended() -> None:
    """Its state in /proc reads zombie as soon as the first thread has ended."""
    first_thread_ends = (
        "import ctypes, platform, threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "print('ready', flush=True)\n"
        "ctypes.CDLL(None).syscall({'x86_64': 60}.get(platform.machine(), 93), 0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", first_thread_ends], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        stat = Path(f"/proc/{process.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", 60, "the first thread's end")
        identity = identify(process.pid)
        assert identity is not None
        assert is_running(identity)
        assert kill(identity, timeout=10)
        assert not is_running(identity)
