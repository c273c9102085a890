"""The frontend as the operator runs it: a pod that knows its workers from the API server alone."""

import asyncio
import base64
import hashlib
import json
import time
from pathlib import Path

import grpc
import pytest

from localcluster import Forward
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_operator.render import frontend
from moe_operator.resources import names
from moe_operator.resources.deployment import parse
from tests.localcluster.objects import apply, wait_ready
from tests.pki import Authority

ROOT = Path(__file__).parents[2]
FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
DEPLOYMENT = "demo"
pytestmark = pytest.mark.timeout(400)


def frontend_objects(namespace, **settings):
    """What the operator renders, without the owner, which is not there to own it."""
    body = {
        "metadata": {"name": DEPLOYMENT, "namespace": namespace, "uid": "0", "generation": 1},
        "spec": {
            "model": {"uri": "file:///mnt/models/none"},
            "frontend": settings,
            "transport": {"mode": "Plaintext"},  # there is no operator that issues certificates
        },
    }
    parts = (frontend.account, frontend.role, frontend.role_binding, frontend.service, frontend.deployment)
    for part in parts:
        manifest = part(parse(body))
        manifest["metadata"].pop("ownerReferences")
        yield manifest


def worker_service():
    """Finds the leaders of replicas."""
    selector = names.leader_labels(DEPLOYMENT)
    spec = {"clusterIP": "None", "selector": selector, "ports": [{"name": "grpc", "port": 8000}]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": names.workers(DEPLOYMENT)},
        "spec": spec,
    }


def replica(number):
    """A StatefulSet of one worker, the pod `w-NUMBER-0`."""
    labels = {**names.worker_labels(DEPLOYMENT), names.LABEL_DATA_RANK: str(number)}
    container = {
        "name": "worker",
        "image": names.DEFAULT_WORKER_IMAGE,
        "command": ["sh", "-c", f"exec python {FAKE_WORKER} $HOSTNAME 0.0.0.0:8000"],
        "readinessProbe": {"grpc": {"port": 8000}, "periodSeconds": 1},
    }
    spec = {
        "serviceName": names.workers(DEPLOYMENT),
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]},
        },
    }
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": f"w-{number}"}, "spec": spec}


async def one_answer(stub):
    """Name of the worker that answered, or the status of the failure."""
    try:
        call = stub.Generate(inference_pb2.GenerateRequest(prompt="count 1"), timeout=60)
        texts = [r.text async for r in call]
        return texts[0].partition(":")[0]
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"


async def answers(stub, number=10):
    return set(await asyncio.gather(*(one_answer(stub) for _ in range(number))))


@pytest.fixture
async def stub(cluster, namespace):
    cluster.kubectl("apply", "-f", str(ROOT / "crds"))
    apply(cluster, namespace, *frontend_objects(namespace))
    selector = names.selector_text(names.frontend_labels(DEPLOYMENT))
    cluster.kubectl(
        *("wait", "-n", namespace, "pod", "-l", selector, "--timeout=90s"),
        "--for=jsonpath={.status.containerStatuses[0].started}=true",
    )
    apply(cluster, namespace, worker_service(), replica(0), replica(1))
    wait_ready(cluster, namespace, "w-0-0", "w-1-0")
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod", "-l", selector, "--timeout=90s")
    with Forward(cluster.directory, namespace, names.frontend(DEPLOYMENT), 8000) as forward:
        async with grpc.aio.insecure_channel(forward.address) as channel:
            yield inference_pb2_grpc.InferenceServiceStub(channel)


def secret(name, files):
    data = {key: base64.b64encode(content).decode() for key, content in files.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


async def test_a_guarded_frontend_is_ready_and_serves_callers_with_a_key(cluster, namespace):
    """The kubelet probes a port of its own, and mounts the Secrets as the frontend reads them."""
    authority = Authority()
    digest = hashlib.sha256(b"alpha").hexdigest()
    cluster.kubectl("apply", "-f", str(ROOT / "crds"))
    settings = {"tls": {"secretName": "front-tls"}, "auth": {"apiKeysSecret": "front-keys"}}
    apply(
        cluster,
        namespace,
        secret("front-tls", authority.pair()),
        secret("front-keys", {"team-a": f"sha256:{digest}".encode()}),
        *frontend_objects(namespace, **settings),
        worker_service(),
        replica(0),
    )
    selector = names.selector_text(names.frontend_labels(DEPLOYMENT))
    wait_ready(cluster, namespace, "w-0-0")
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod", "-l", selector, "--timeout=90s")
    credentials = grpc.ssl_channel_credentials(authority.certificate)
    with Forward(cluster.directory, namespace, names.frontend(DEPLOYMENT), 8000) as forward:
        async with grpc.aio.secure_channel(forward.address, credentials) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)  # the Service follows the pod a little later
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            assert (await one_answer(stub)).startswith("UNAUTHENTICATED: credentials are missing")
            call = stub.Generate(
                inference_pb2.GenerateRequest(prompt="count 1"),
                metadata=(("authorization", "Bearer alpha"),),
                timeout=60,
            )
            assert (await call.read()).text.startswith("w-0-0:")


async def test_pods_come_and_go_and_requests_follow(cluster, namespace, stub):
    await eventually(stub, {"w-0-0", "w-1-0"})

    apply(cluster, namespace, replica(2))
    await eventually(stub, {"w-0-0", "w-1-0", "w-2-0"})
    await published(cluster, namespace, {"w-0-0", "w-1-0", "w-2-0"})

    call = stub.Generate(inference_pb2.GenerateRequest(prompt="count 100000 0.01"))
    victim = (await call.read()).text.partition(":")[0]
    cluster.kubectl("delete", "pod", "-n", namespace, victim, "--grace-period=0", "--force")
    number, name = 0, victim
    while name == victim:
        name, _, text = (await asyncio.wait_for(call.read(), 60)).text.partition(":")
        number += 1
        assert int(text) == number, "the stream goes on elsewhere, without a gap"
    call.cancel()

    # No request fails while the pod is gone and made again: others take what it cannot.
    seen = set()
    deadline = time.monotonic() + 120
    while victim not in seen and time.monotonic() < deadline:
        seen |= await answers(stub)
    assert seen == {"w-0-0", "w-1-0", "w-2-0"}


async def published(cluster, namespace, wanted):
    """Waits until the one FrontendRoutes has the wanted workers."""
    deadline = time.monotonic() + 90
    while True:
        (found,) = json.loads(cluster.kubectl("get", "frontendroutes", "-n", namespace, "-o", "json"))[
            "items"
        ]
        seen = {to["name"] for to in found["routes"]}
        if seen == wanted:
            return
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.1)


async def eventually(stub, wanted):
    deadline = time.monotonic() + 90
    while (seen := await answers(stub, 30)) != wanted:
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.1)
