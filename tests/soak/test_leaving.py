"""Scale-downs, rollouts and dead pods under load: no request fails, no token is lost or comes twice."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from kubernetes import client, config, watch

from moe_api.inference.v1 import inference_pb2 as pb
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from moe_operator.resources import names
from tests.operator.live import eventually
from tests.soak.load import counting

EVENTS = int(os.environ.get("MOE_SOAK_EVENTS", "200"))


def leave(workers, event, number):
    """One event in the life of a deployment."""
    match event:
        case "scale":
            workers.kubectl("scale", "moed/docs", f"--replicas={number % 3 + 1}")
        case "rollout":
            workers.patch("moed", "docs", {"spec": {"engine": {"maxBatchSize": number + 1}}})
        case "kill":
            pods = sorted(workers.leaders())
            if pods:  # Also the only one that is ready: its requests wait for the next.
                how = ("--grace-period=0", "--force", "--ignore-not-found")
                workers.kubectl("delete", "pod", pods[number % len(pods)], *how)


def run(workers, events, pause_s, seed=1):
    """The tally of eight clients through so many random events."""
    chance = random.Random(seed)
    workers.deploy(replicas=2)
    workers.settled()
    request, expected = counting(30, 0.05)
    with workers.forward() as forward, workers.clients(forward, request, expected, 8).running() as tally:
        for number in range(events):
            leave(workers, chance.choice(("scale", "scale", "rollout", "rollout", "kill")), number)
            time.sleep(chance.uniform(0, 2 * pause_s))
        workers.wait("Progressing", "Complete", seconds=300)
    print(f"\n{events} events, {tally.requests} requests: {tally.whole} whole, {dict(tally.failed)} failed, "
          f"{len(tally.wrong)} wrong, longest {tally.longest_s:.1f} s")  # fmt: skip
    if tally.failed:
        print(workers.kubectl("get", "pods,endpointslices,events", "-o", "wide"))
        print(workers.kubectl("logs", "deployment/docs-frontend", "--tail=300"))
    return tally


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_request_fails_through_scaling_rollouts_and_deaths(counting_workers):
    tally = run(counting_workers, events=10, pause_s=3)
    assert (tally.failed, tally.wrong) == ({}, [])
    assert tally.whole > 50


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_request_fails_through_200_events(counting_workers):
    tally = run(counting_workers, events=EVENTS, pause_s=4)
    assert (tally.failed, tally.wrong) == ({}, [])


# Ready means routable.


def fire_when_ready(workers, name, times):
    """Scales from nothing to one replica so often; what a request at the instant of Ready met."""
    failures = []
    workers.deploy(name, grace_s=1, replicas=0)
    workers.wait("Ready", "ScaledToZero", name)
    with workers.forward(name) as forward:
        for _ in range(times):
            workers.kubectl("scale", f"moed/{name}", "--replicas=1")
            wait_for_ready(workers, name)
            with grpc.insecure_channel(forward.address) as channel:
                try:
                    list(
                        InferenceServiceStub(channel).Generate(
                            pb.GenerateRequest(prompt="count 2"), timeout=60
                        )
                    )
                except grpc.RpcError as error:
                    failures.append(f"{error.code().name}: {error.details()}")
            workers.kubectl("scale", f"moed/{name}", "--replicas=0")
            eventually(lambda: workers.leaders(name), lambda pods: not pods, "no pods", 60)
            workers.wait("Ready", "ScaledToZero", name)
    return failures


def wait_for_ready(workers, name):
    """Follows the object by a watch, so that nothing lies between Ready and what comes next."""
    api = client.CustomObjectsApi(config.new_client_from_config(str(workers.cluster.kubeconfig)))
    kind = {"group": names.GROUP, "version": names.VERSION, "plural": names.PLURAL}
    events = watch.Watch().stream(
        api.list_namespaced_custom_object,
        namespace=workers.namespace,
        field_selector=f"metadata.name={name}",
        timeout_seconds=120,
        **kind,
    )
    assert any(is_ready(event["object"]) for event in events), f"{name} was not Ready within 120 s"


def is_ready(body):
    if body["spec"].get("replicas") != 1:
        return False
    conditions = {c["type"]: c for c in body.get("status", {}).get("conditions", [])}
    ready = conditions.get("Ready", {})
    return ready.get("status") == "True" and ready["observedGeneration"] == body["metadata"]["generation"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_request_at_the_instant_of_ready_succeeds(counting_workers):
    assert fire_when_ready(counting_workers, "docs", 3) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_requests_at_the_instant_of_ready_succeed(counting_workers):
    deployments = [f"docs-{letter}" for letter in "abcd"]
    with ThreadPoolExecutor(len(deployments)) as threads:
        found = list(threads.map(lambda name: fire_when_ready(counting_workers, name, 50), deployments))
    assert found == [[]] * len(deployments)
