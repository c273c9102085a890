"""`moe status NAME` tells how replicas use their experts; real gRPC servers on the loopback interface."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import kubernetes
import pytest
from click.testing import CliRunner
from rich.console import Console

from moe_api import mutual, tls
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_cli import asking_experts
from moe_cli import status as command
from moe_cli.expert_rows import figures, rows
from moe_cli.experts import experts
from moe_cli.generate import generate
from moe_cli.rendering import show
from moe_client.endpoint import Endpoint
from tests.cli.test_experts import domain
from tests.cli.test_status import deployment, pod, report
from tests.pki import Authority, mount

HERE = Endpoint("")
LAYERS = [
    worker_pb2.ExpertLayer(layer=1, tokens=[30, 30, 20, 20], active=30),
    worker_pb2.ExpertLayer(layer=2, tokens=[60, 20, 20, 0], active=23),
]
LOAD = worker_pb2.ExpertLoad(steps=10, layers=LAYERS, tokens=40, experts_per_token=3)
LINE = "2.5 of 3 activated a token, utilisation 62% (lowest 42% in layer 2)"


class Service(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, load):
        self.load = load

    def GetExpertLoad(self, request, context):
        return self.load


@contextlib.contextmanager
def serving(service, address="127.0.0.1:0", credentials=None):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    add = server.add_insecure_port if credentials is None else server.add_secure_port
    port = add(address, *([] if credentials is None else [credentials]))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def said(experts):
    return [text for _, text in rows(experts)]


def at(ip, **changed):
    """A pod of a report."""
    (found,) = report(deployment(), [pod(0)], [])["pods"]
    return {**found, "address": ip, **changed}


def test_figures_of_a_replica():
    assert figures(LOAD) == {
        "steps": 10,
        "activated": 2.5,
        "most": 3,
        "utilisation": 0.625,
        "lowest": {"layer": 2, "utilisation": 0.417},
        "domains": [],
        "fit": None,
    }


def test_domains_have_their_top_experts_of_all_layers():
    shares = [worker_pb2.ExpertShares(experts=row) for row in ([0.25, 0.5, 0.25, 0], [0.1, 0, 0, 0.9])]
    known = [worker_pb2.ExpertDomain(name="git\n", tokens=70, shares=shares), domain("man", 90, [1.0])]
    few = [worker_pb2.ExpertDomain(name=str(number), tokens=number) for number in range(5)]
    load = worker_pb2.ExpertLoad(steps=1, layers=LAYERS, domains=known + few, fit=0.75)
    (line,) = said({"ready": 1, "replicas": [{"worker": "w", **figures(load)}]})
    told = "domains (layer/expert): man: 1/0, git : 2/3 1/1 1/0, 4: none, 3: none, and 3 more; fit 75%"
    assert line == f"w: utilisation 62% (lowest 42% in layer 2); {told}"


def test_shares_that_are_no_shares_are_left_out():
    wrong = domain("a", 1, [float("nan"), float("inf"), -1, 0.5, 1, 1])
    told = figures(worker_pb2.ExpertLoad(layers=LAYERS, domains=[wrong]))
    assert [one["expert"] for one in told["domains"][0]["experts"]] == [4, 5, 3]
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("layers", [[], [worker_pb2.ExpertLayer(tokens=[0, 0])], [worker_pb2.ExpertLayer()]])
def test_of_a_model_without_experts_or_without_requests_nothing_is_said(layers):
    with serving(Service(worker_pb2.ExpertLoad(layers=layers))) as address:
        assert asking_experts.used([], Endpoint(address)) is None
    assert said(None) == []


def test_of_a_worker_without_that_call_nothing_is_said():
    with serving(worker_pb2_grpc.WorkerServiceServicer()) as address:
        assert asking_experts.used([], Endpoint(address)) is None


def test_without_a_ready_replica_nobody_is_asked():
    assert asking_experts.used([], HERE) is None


def test_pods_are_asked_at_their_addresses():
    with serving(Service(LOAD), "127.61.7.1:8000"):
        pods = [
            at("127.61.7.1", name="demo-0-0"),
            at("127.61.7.1", name="follows", rank=1),
            at("127.61.7.1", name="starts", ready=False),
            at("127.61.7.1", name="ends", leaving=True),
            at("127.61.7.1", name="frontend", role="frontend"),
            at(None, name="nowhere"),
        ]
        assert said(asking_experts.used(pods, HERE)) == [f"demo-0-0: {LINE}"]


def test_ipv6_addresses_have_brackets():
    assert asking_experts.leaders([at("fd00::7")], HERE) == {"demo-0-0": Endpoint("[fd00::7]:8000")}


@pytest.fixture
def secured():
    """The authority of a worker with mutual TLS that serves meanwhile."""
    authority = Authority()
    theirs = authority.pair(mutual.WORKER)
    pairs = [(theirs["tls.key"], theirs["tls.crt"])]
    credentials = grpc.ssl_server_credentials(pairs, theirs["ca.crt"], require_client_auth=True)
    with serving(Service(LOAD), "127.61.7.2:8000", credentials):
        yield authority


def test_workers_with_mutual_tls_are_asked_with_the_folder(tmp_path, secured):
    folder, pods = tmp_path / "mine", [at("127.61.7.2", mutualTls=True)]
    mount(folder, secured.pair(mutual.FRONTEND))
    proved = asking_experts.used(pods, Endpoint("", None, True, folder / "ca.crt", None, folder))
    (refused,) = asking_experts.used(pods, HERE)["replicas"]
    assert said(proved) == [f"demo-0-0: {LINE}"]
    assert "worker did not report its experts: UNAVAILABLE" in refused["problem"]
    assert "with mutual TLS, add --tls-folder" in refused["problem"]


def test_workers_with_mutual_tls_are_asked_with_the_certificate_of_the_namespace(secured):
    pods, own = [at("127.61.7.2", mutualTls=True)], tls.parse(secured.pair(mutual.FRONTEND))
    assert said(asking_experts.used(pods, HERE, own)) == [f"demo-0-0: {LINE}"]
    through = Endpoint("127.61.7.2:8000")
    assert said(asking_experts.used([], through, own)) == [f"127.61.7.2:8000: {LINE}"]


def test_moe_experts_expects_a_worker_where_tls_is_mutual(tmp_path, secured):
    mount(tmp_path / "mine", secured.pair(mutual.FRONTEND))
    options = ["--endpoint", "127.61.7.2:8000", "--tls-folder", str(tmp_path / "mine")]
    shown = CliRunner().invoke(experts, options)
    assert "10 steps" in shown.output
    other = CliRunner().invoke(experts, [*options, "--tls-server-name", mutual.FRONTEND, "--timeout", "2"])
    assert other.exit_code != 0


def test_a_command_says_what_a_worker_with_mutual_tls_needs(tmp_path, secured):
    mount(tmp_path / "mine", secured.pair(mutual.FRONTEND))
    there = ["--endpoint", "127.61.7.2:8000", "--timeout", "2"]
    plain = CliRunner().invoke(experts, there)
    assert "A worker with mutual TLS needs --tls-folder." in plain.output
    unnamed = CliRunner().invoke(generate, [*there, "--tls-folder", str(tmp_path / "mine"), "a"])
    assert f"A worker with mutual TLS needs --tls-server-name {mutual.WORKER}." in unnamed.output


def core_api(monkeypatch, answer):
    """The API server answers so to who reads a Secret."""

    class Core:
        def read_namespaced_secret(self, name, namespace, **_):
            assert (name, namespace) == ("moe-internal-frontend", "default")
            return answer()

    monkeypatch.setattr("kubernetes.config.load_kube_config", lambda **_: None)
    monkeypatch.setattr("kubernetes.client.CoreV1Api", Core)


def refused():
    raise kubernetes.client.ApiException(403, "Forbidden")


def test_the_certificate_is_read_where_workers_ask_for_one_and_the_user_may(monkeypatch, secured, capsys):
    files = secured.pair(mutual.FRONTEND)
    data = {name: base64.b64encode(content).decode() for name, content in files.items()}
    found = {"namespace": "default", "name": "demo", "pods": [at("127.61.7.2", mutualTls=True)]}
    core_api(monkeypatch, lambda: kubernetes.client.V1Secret(data=data))
    assert command._identity(None, found).certificate == files["tls.crt"]
    core_api(monkeypatch, lambda: kubernetes.client.V1Secret(data={"tls.crt": "!"}))
    assert command._identity(None, found) is None
    assert "note: Secret moe-internal-frontend cannot be used" in capsys.readouterr().err
    core_api(monkeypatch, refused)
    assert command._identity(None, found) is None
    assert "(Forbidden); give --tls-folder" in capsys.readouterr().err
    assert command._identity(None, {**found, "pods": [at("127.61.7.2")]}) is None
    assert not capsys.readouterr().err


class Silent(Service):
    """Does not respond before the test has ended."""

    def __init__(self):
        self.ended = threading.Event()

    def GetExpertLoad(self, request, context):
        self.ended.wait(60)
        return LOAD


def test_workers_that_do_not_respond_cost_one_timeout_together_and_are_named():
    silent = Silent()
    with (
        serving(silent, "127.61.7.3:8000"),
        serving(Service(LOAD), "127.61.7.4:8000"),
        socket.socket() as deaf,
    ):
        deaf.bind(("127.61.7.5", 8000))
        deaf.listen()
        pods = [at(f"127.61.7.{last}", name=f"demo-{last}-0") for last in (3, 4, 5)]
        start = time.monotonic()
        (text,) = said(asking_experts.used(pods, HERE, timeout_s=0.4))
        assert time.monotonic() - start < 30
        silent.ended.set()
    first, second, third = text.splitlines()
    for worker, line in (("demo-3-0", first), ("demo-5-0", third)):
        assert line.startswith(f"{worker}: worker did not report its experts: DEADLINE_EXCEEDED")
        assert "port-forward" not in line
    assert second == f"demo-4-0: {LINE}"


def test_an_address_that_is_no_worker_gets_the_remedy_of_an_address():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        (text,) = said(asking_experts.used([], Endpoint(address), timeout_s=0.4))
        (secured,) = said(asking_experts.used([], Endpoint(address, proof=Path("pki")), timeout_s=0.4))
        own = tls.parse(Authority().pair(mutual.FRONTEND))
        (proved,) = said(asking_experts.used([], Endpoint(address), own, timeout_s=0.4))
    assert proved.endswith("or one that forwards there")  # the namespace's certificate was used already
    assert text.endswith("; with mutual TLS, add --tls-folder (docs/security.md)")
    assert secured.endswith("; without mutual TLS, leave out --tls-folder (MOE_TLS_FOLDER)")
    assert text.startswith(f"{address}: worker did not report its experts: ")
    assert "--endpoint has to be a worker's gRPC port" in text
    assert f"pod/{address}" not in text


def test_of_many_replicas_some_are_asked():
    pods = [at("127.61.7.6", name=f"demo-{number}-0") for number in range(20)]
    with serving(Service(LOAD), "127.61.7.6:8000"):
        found = asking_experts.used(pods, HERE)
    assert (found["ready"], len(found["replicas"])) == (20, 16)
    assert said(found)[0].splitlines()[-1] == "16 of 20 replicas were asked"


@pytest.fixture
def run(monkeypatch):
    """`moe status ARGS` for a deployment without reachable pods."""
    monkeypatch.setattr(command, "_read", lambda *_, **__: report(deployment(), [], []))
    return lambda *args: CliRunner().invoke(command.status, args, catch_exceptions=False)


def test_the_command_asks_the_given_worker_and_prints_text_or_json(run):
    with serving(Service(LOAD)) as address:
        text = " ".join(run("demo", "--endpoint", address).output.split())  # lines wrap
        told = json.loads(run("demo", "--endpoint", address, "--json").output)
    assert f"{address}: {LINE}" in text
    assert told["experts"] == {"ready": 1, "replicas": [{"worker": address, **figures(LOAD)}]}


def test_pods_that_cannot_be_reached_get_a_command_for_their_namespace(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.61.7.9", 8000))
        found = report(deployment(), [], [])
        found |= {"namespace": "serving", "pods": [at("127.61.7.9", name="demo-0-0")]}
        monkeypatch.setattr(command, "_read", lambda *_, **__: found)
        shown = CliRunner().invoke(command.status, ["demo", "--json"], catch_exceptions=False)
    (replica,) = json.loads(shown.output)["experts"]["replicas"]
    assert replica["problem"].startswith("worker did not report its experts: UNAVAILABLE")
    assert "run `kubectl port-forward -n serving pod/demo-0-0 8000` and add --endpoint" in replica["problem"]


def test_without_replicas_json_has_null_and_text_has_no_line(run):
    assert json.loads(run("demo", "--json").output)["experts"] is None
    assert "Experts" not in run("demo").output


def test_an_endpoint_without_a_name_is_refused(run):
    result = run("--endpoint", "127.0.0.1:9")
    assert result.exit_code == 2
    assert "--endpoint needs NAME" in result.stderr


def test_a_worker_cannot_act_on_the_terminal():
    output = io.StringIO()
    found = report(deployment(), [], [])
    evil = worker_pb2.ExpertLoad(layers=LAYERS, domains=[domain("\x1b[2Jevil" + "x" * 90, 1, [1.0])])
    replica = {"worker": "w", **figures(evil)}
    show({**found, "experts": {"ready": 1, "replicas": [replica]}}, Console(file=output, width=300))
    assert "\x1b" not in output.getvalue()
    assert "evil" in output.getvalue()
    assert "x" * 41 not in output.getvalue()
