"""A replica of several workers: what its pods are told, and that they start, wait and stop as one."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import get_args

import grpc
import pytest
from pydantic import ValidationError

from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_operator.observed.nodes import needs, read_node, read_pod
from moe_operator.observed.pods import Pod
from moe_operator.planner.gangs import FIRST_PAUSE, HEALTHY_TIME, LONGEST_PAUSE, pause
from moe_operator.planner.mesh import Balance, MeshReading, balance
from moe_operator.planner.pinning import with_pins
from moe_operator.planner.placement import Question, gang_room, seats
from moe_operator.planner.plan import plan
from moe_operator.render import worker
from moe_operator.render.gang_record import GangRecord, recorded
from moe_operator.render.objects import Key
from moe_operator.resources import names
from moe_operator.resources.deployment import sentence
from moe_operator.resources.parallelism_spec import Rebalance
from moe_operator.resources.spec import Spec
from moe_operator.resources.status import EXPERTS_BALANCED, PROGRESSING, READY, STALLED
from moe_operator.rpc.mesh import MeshReader
from moe_worker.config.engine import EngineOptions
from tests.operator.worlds import World, deployment

MESH = {"pipeline": 2, "expert": 2}
SET = Key("StatefulSet", "docs-0")
NO_GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def world(**spec):
    found = World(deployment(parallelism={**MESH, **spec.pop("parallelism", {})}, **spec))
    found.step()
    found.step()
    return found


def pods(world):
    return sorted(name for name in world.pods if name.startswith("docs-0-"))


def size(world):
    return world.children[SET]["spec"]["replicas"]


def seat(world, *ranks):
    """The scheduler: only these ranks of replica 0 have nodes."""
    for name in pods(world):
        rank = int(name.rpartition("-")[2])
        world.pods[name]["spec"] = {"nodeName": "node"} if rank in ranks else {}
        waiting = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": NO_GPU,
            "lastTransitionTime": world.now.isoformat(),
        }
        world.pods[name]["status"]["conditions"] = [] if rank in ranks else [waiting]


def crash(world, rank, code=1, log="", restarts=1, ended="2026-01-01T00:00:05Z"):
    end = {"exitCode": code, "reason": "Error", "message": log, "finishedAt": ended}
    world.pods[f"docs-0-{rank}"]["status"]["containerStatuses"] = [
        {
            "name": "worker",
            "ready": False,
            "restartCount": restarts,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": end},
        }
    ]


def variables(template):
    return {variable["name"]: variable for variable in template["spec"]["containers"][0]["env"]}


def test_a_replica_of_two_by_two_is_one_stateful_set_of_four_pods():
    found = world(replicas=2)
    assert pods(found) == ["docs-0-0", "docs-0-1", "docs-0-2", "docs-0-3"]
    spec = found.children[SET]["spec"]
    assert (spec["replicas"], spec["podManagementPolicy"]) == (4, "Parallel")
    assert found.status.replicas == 2, "replicas are gangs"
    env = variables(spec["template"])
    assert env["MOE_WORKER_MESH"]["value"] == "2x2"
    assert env["MOE_WORKER_MESH_LEADER"]["value"] == (
        "docs-$(MOE_DATA_RANK)-0.docs-workers.$(POD_NAMESPACE).svc:29500"
    )
    rank = env["MOE_WORKER_MESH_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.labels['apps.kubernetes.io/pod-index']"
    order = list(env)
    for name, variable in env.items():  # the kubelet replaces only what stands before
        for used in re.findall(r"\$\((\w+)\)", variable.get("value", "")):
            assert order.index(used) < order.index(name)


@pytest.mark.parametrize("mode", get_args(Rebalance.model_fields["mode"].annotation))
def test_workers_know_every_mode_of_moving_experts(mode):
    rebalance = {"mode": mode, "interval": "10m", "threshold": "1.5"}
    found = world(parallelism={"expert": 2, "rebalance": rebalance})
    env = variables(found.children[SET]["spec"]["template"])
    options = EngineOptions(
        rebalance=env["MOE_WORKER_REBALANCE"]["value"],
        rebalance_interval=float(env["MOE_WORKER_REBALANCE_INTERVAL"]["value"]),
        rebalance_threshold=float(env["MOE_WORKER_REBALANCE_THRESHOLD"]["value"]),
    )
    assert options.rebalance == mode.lower()


def test_a_replica_of_one_worker_is_rendered_as_before():
    template = worker.rendered(deployment())
    assert names.single_labels("docs").items() <= template["metadata"]["labels"].items()
    assert not any("MESH" in name or "GANG" in name for name in variables(template))
    assert "affinity" not in template["spec"]
    assert worker.stateful_set(deployment(), 0)["spec"]["replicas"] == 1


def test_services_and_the_scale_selector_match_one_pod_a_gang():
    found = world(replicas=2)
    selector = found.children[Key("Service", "docs-workers")]["spec"]["selector"]
    labels = {name: pod["metadata"]["labels"] for name, pod in found.pods.items()}
    assert [name for name, own in sorted(labels.items()) if selector.items() <= own.items()] == [
        "docs-0-0", "docs-1-0",
    ]  # fmt: skip
    assert found.status.selector == names.selector_text(selector)
    single = World(deployment())
    single.step()
    assert selector.items() <= single.pods["docs-0-0"]["metadata"]["labels"].items()


def test_the_disruption_budget_protects_every_worker():
    found = world()
    selector = found.children[Key("PodDisruptionBudget", "docs-workers")]["spec"]["selector"]["matchLabels"]
    assert all(selector.items() <= found.pods[name]["metadata"]["labels"].items() for name in pods(found))


def test_the_secret_is_made_while_a_gang_starts_and_never_read():
    found = World(deployment(parallelism=MESH))
    plan = found.step()
    assert plan.secret is not None
    secret = plan.secret("random")
    assert (secret["kind"], secret["metadata"]["name"]) == ("Secret", "docs-gang")
    assert secret["stringData"] == {"secret": "random"}
    used = variables(found.children[SET]["spec"]["template"])["MOE_GANG_SECRET"]["valueFrom"]["secretKeyRef"]
    assert used == {"name": "docs-gang", "key": "secret"}
    for name in pods(found):
        found.pods[name]["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    assert found.planned().secret is None
    assert World(deployment()).step().secret is None


def test_a_gang_is_ready_when_its_leader_is_and_says_meanwhile_how_many_workers_are():
    found = world()
    found.pods["docs-0-1"]["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    found.step()
    assert "waiting for docs-0-0 (1/4 workers ready) to load the model" in found.condition(READY).message
    found.ready(0)
    found.frontend_ready()
    found.step()
    assert (found.status.ready_replicas, found.condition(READY).status) == (1, "True")


def test_gates_of_ranks_that_follow_open_with_their_containers():
    found = world()
    pod = found.pods["docs-0-2"]
    pod["spec"] = {"readinessGates": [{"conditionType": names.ROUTED}]}
    pod["status"]["conditions"] = [{"type": "ContainersReady", "status": "True"}]
    (gate,) = found.planned().gates
    assert (gate.pod, gate.open) == ("docs-0-2", True)
    pod["status"]["conditions"] = [
        {"type": "ContainersReady", "status": "False"},
        {"type": names.ROUTED, "status": "True"},
    ]
    (gate,) = found.planned().gates
    assert (gate.pod, gate.open) == ("docs-0-2", False)


def test_a_half_placed_gang_gives_its_nodes_back_and_tries_again_later():
    found = world(parallelism={"schedulingDeadlineSeconds": 60})
    seat(found, 0, 1, 2)
    due = found.planned().due
    assert due == found.now + timedelta(seconds=60)
    found.now += timedelta(seconds=59)
    found.step()
    assert size(found) == 4
    found.now += timedelta(seconds=1)
    plan = found.step()
    assert (size(found), pods(found)) == (0, [])
    assert "GangUnschedulable" in [decision.reason for decision in plan.decisions]
    said = found.condition(READY)
    assert said.reason == "GangUnschedulable"
    assert "docs-0-3 (rank 3, stage 1) found no node within 60 s, and 3 of 4 workers had one" in said.message
    assert "3 Insufficient nvidia.com/gpu" in said.message
    assert found.status.condition(STALLED) is None, "it heals by itself"

    assert found.planned().due is not None
    found.now = found.planned().due
    found.step()
    assert (size(found), len(pods(found))) == (4, 4)
    seat(found, 0, 1, 2)
    found.now += timedelta(seconds=61)
    found.step()
    assert recorded(found.children[SET]).attempts == 2
    found.now = found.planned().due
    found.step()
    seat(found, 0, 1, 2, 3)
    found.step()
    assert recorded(found.children[SET]) == GangRecord()
    found.step()
    assert found.planned().apply == ()


def test_a_gang_of_which_no_worker_has_a_node_holds_nothing_and_waits():
    found = world(parallelism={"schedulingDeadlineSeconds": 1})
    seat(found)
    found.now += timedelta(hours=1)
    found.step()
    assert size(found) == 4
    assert found.condition(READY).reason == "Unschedulable"


def test_pauses_grow_and_differ_between_gangs():
    assert pause(1, 0) == FIRST_PAUSE
    assert pause(3, 0) == 4 * FIRST_PAUSE
    assert pause(1000, 0) == LONGEST_PAUSE
    assert len({pause(2, rank) for rank in range(8)}) == 8


def test_the_first_cause_is_named_not_the_workers_that_ended_with_it():
    found = world()
    left = "error: rank 2 left the mesh: its connection is closed"
    for rank in (0, 1, 3):
        crash(found, rank, code=3, log=left, ended="2026-01-01T00:00:04Z")
    crash(found, 2, code=137, ended="2026-01-01T00:00:05Z")
    found.step()
    said = found.condition(READY)
    assert said.reason == "ContainerCrashed"
    assert "docs-0-2 (rank 2, stage 1): worker ended with exit code 137 (SIGKILL)" in said.message


def test_a_gang_that_does_not_form_is_stopped_when_its_budget_is_spent():
    found = world(parallelism={"restartBudget": 3})
    for restarts in (1, 2, 3):
        crash(found, 1, log="error: out of memory on this rank; use --kv-memory 1Gi", restarts=restarts)
        found.step()
        assert size(found) == 4
    crash(found, 1, log="error: out of memory on this rank; use --kv-memory 1Gi", restarts=4)
    found.step()
    assert (size(found), pods(found)) == (0, [])
    said = found.condition(STALLED)
    assert said.reason == "RestartBudgetExhausted"
    assert "4 restarts; docs-0-1 (rank 1, stage 0): out of memory on this rank" in said.message
    assert found.condition(PROGRESSING).status == "False"
    found.now += timedelta(days=1)
    found.step()
    assert size(found) == 0
    found.change(engine={"kvMemory": "1Gi"})
    found.step()
    found.step()
    assert SET not in found.children or size(found) == 4
    assert any(name.name != "docs-0" and name.kind == "StatefulSet" for name in found.children)


def test_a_gang_that_was_healthy_has_a_new_budget():
    found = world(parallelism={"restartBudget": 3})
    crash(found, 1, restarts=3)
    found.step()
    for name in pods(found):
        status = found.pods[name]["status"]
        since = found.now.isoformat()
        status["conditions"] = [{"type": "Ready", "status": "True", "lastTransitionTime": since}]
        status["containerStatuses"] = [{"name": "worker", "ready": True, "restartCount": 3}]
    found.now += HEALTHY_TIME
    found.step()
    assert recorded(found.children[SET]) == GangRecord(restarts=3)
    for name in pods(found):
        found.pods[name]["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    crash(found, 1, restarts=6)
    found.step()
    assert size(found) == 4


def test_a_record_that_somebody_broke_is_passed_over():
    found = world()
    for text in ("{", "[]", '{"attempts": 1, "until": "soon"}', '{"more": 1}'):
        found.children[SET]["metadata"]["annotations"][names.ANNOTATION_GANG] = text
        assert recorded(found.children[SET]) == GangRecord()


def test_a_rollout_replaces_gangs_as_wholes():
    found = world(replicas=1)
    found.ready(0)
    found.frontend_ready()
    found.step()
    found.change(parallelism={"pipeline": 1, "expert": 2})
    found.step()
    assert sorted(name for name in found.pods if name.startswith("docs-1-")) == ["docs-1-0", "docs-1-1"]
    found.ready(1)
    found.step()
    assert pods(found) == []
    found.step()
    assert list(found.observed().leaders) == [1]


def test_topology_keeps_the_workers_of_one_gang_together_and_gangs_apart():
    topology = {"key": "rack", "exclusive": True}
    affinity = worker.rendered(deployment(parallelism={**MESH, "topology": topology}))["spec"]["affinity"]
    (own,) = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (others,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert own["topologyKey"] == others["topologyKey"] == "rack"
    assert own["matchLabelKeys"] == others["mismatchLabelKeys"] == [names.LABEL_DATA_RANK]
    spread = {"key": "kubernetes.io/hostname", "policy": "Spread"}
    spec = worker.rendered(deployment(parallelism={**MESH, "topology": spread}))["spec"]
    assert spec["topologySpreadConstraints"][0]["matchLabelKeys"] == [names.LABEL_DATA_RANK]


def test_labels_and_the_scheduler_of_the_pod_template_reach_gangs():
    queue = {"kueue.x-k8s.io/queue-name": "gpus"}
    template = {"metadata": {"labels": queue}, "spec": {"schedulerName": "gangs"}}
    manifest = worker.stateful_set(deployment(parallelism=MESH, worker={"podTemplate": template}), 0)
    rendered = manifest["spec"]["template"]
    assert queue.items() <= manifest["metadata"]["labels"].items()
    assert queue.items() <= rendered["metadata"]["labels"].items()
    assert rendered["spec"]["schedulerName"] == "gangs"
    assert needs(rendered["spec"]).requests["pods"] == 1
    single = worker.stateful_set(deployment(worker={"podTemplate": template}), 0)
    assert not queue.items() & single["metadata"]["labels"].items(), "as before"


@pytest.mark.parametrize("expert", [0, 1025, "two", {"size": 0}])
def test_a_number_of_workers_that_an_older_crd_took_is_refused(expert):
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate({"model": {"uri": "file:///m"}, "parallelism": {"expert": expert}})
    assert sentence(caught.value).startswith("spec.parallelism.expert: ")


def test_the_form_of_earlier_versions_is_read():
    spec = {"model": {"uri": "file:///m"}, "parallelism": {"pipeline": 1, "expert": {"size": 1}}}
    assert Spec.model_validate(spec).parallelism.expert == 1
    assert worker.rendered(deployment(parallelism=spec["parallelism"])) == worker.rendered(deployment())


def test_a_new_gang_takes_the_places_of_all_workers_of_an_old_one():
    old = tuple(
        Pod(f"docs-0-{rank}", "", ready=True, terminating=False, revision="a", data_rank=0, problem=None,
            node=f"node-{rank // 2}", uid=f"u{rank}", rank=rank)
        for rank in range(4)
    )  # fmt: skip
    limits = {"containers": [{"resources": {"limits": {"nvidia.com/gpu": 2}}}]}
    bodies = [{"metadata": {"uid": pod.uid}, "spec": limits} for pod in old]
    nodes = {
        f"node-{number}": (
            read_node(
                {
                    "metadata": {"name": f"node-{number}"},
                    "status": {"allocatable": {"nvidia.com/gpu": 4, "pods": 9}},
                }
            ),
            tuple(map(read_pod, bodies[2 * number : 2 * number + 2])),
        )
        for number in range(2)
    }
    places = seats(old, nodes)

    def obstacle(content, size):
        new = needs(content)
        question = Question("", new, old[:1], size, {old[0].name: old[1:]})
        return gang_room(question, new, "", places).obstacles["docs-0-0"]

    assert obstacle(limits, 4) == ""
    assert obstacle(limits, 2) == ""
    assert obstacle(limits, 5) == "the new replica has 5 workers, and this one has 4"
    larger = {"containers": [{"resources": {"limits": {"nvidia.com/gpu": 3}}}]}
    assert obstacle(larger, 4) == "node node-0 would lack 2 nvidia.com/gpu for 2 of the new workers"
    places.pop("docs-0-3")
    assert obstacle(limits, 4) == "the node of docs-0-3 is not known"


def test_the_worst_layer_of_all_gangs_is_the_imbalance():
    assert balance([(1, [10, 10]), (2, [30, 10]), (3, [0, 0]), (4, [])]) == Balance(2, 0, 150)
    assert balance([(1, [0, 0])]) is None


@pytest.mark.parametrize(("threshold", "reason"), [("1.2", "Imbalanced"), ("1.6", "Balanced")])
def test_the_status_shows_ranks_stages_and_imbalance(threshold, reason):
    found = world(replicas=2, parallelism={"rebalance": {"threshold": threshold}})
    assert found.condition(EXPERTS_BALANCED).reason == "NotMeasured"
    for rank in range(3):
        found.pods[f"docs-1-{rank}"]["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    readings = {"docs-1-0": MeshReading(3, ((0, 4), (4, 3)), Balance(5, 1, 150))}
    observed = found.observed(meshes=readings)
    status = plan(with_pins(found.deployment, observed), observed, found.now).status
    assert status.mesh is not None
    assert (status.mesh.shape, status.mesh.ready_ranks, status.mesh.ranks) == ("2x2", 3, 8)
    assert [(one.first_layer, one.layers) for one in status.mesh.stages] == [(0, 4), (4, 3)]
    gang = status.mesh.gangs[1]
    assert (gang.name, gang.epoch, gang.imbalance_percentage, gang.layer) == ("docs-1", 3, 150, 5)
    balanced = status.condition(EXPERTS_BALANCED)
    assert balanced is not None
    assert balanced.reason == reason
    assert (
        "docs-1: rank 1 of the stage has 150 % of the mean load of its stage in layer 5" in balanced.message
    )


def test_deployments_of_single_workers_have_no_mesh():
    single = World(deployment())
    single.step()
    assert single.status.mesh is None
    assert single.status.condition(EXPERTS_BALANCED) is None


class Reports(worker_pb2_grpc.WorkerServiceServicer):
    """A leader that counts how often it is asked, and says odd things of one layer."""

    asked = 0

    def GetLoad(self, request, context):
        self.asked += 1
        stages = [worker_pb2.Stage(first_layer=0, layers=7)]
        return worker_pb2.Load(mesh=worker_pb2.Mesh(expert=2, epoch=4, stages=stages))

    def GetExpertLoad(self, request, context):
        rows = {1: [1, 3], 2: [float("nan"), 1], 3: [-5, 1], 4: [float("inf"), 1]}
        layers = [worker_pb2.ExpertLayer(layer=layer, rank_tokens=loads) for layer, loads in rows.items()]
        return worker_pb2.ExpertLoad(layers=layers)


def test_leaders_are_asked_now_and_then_and_nonsense_is_no_load(monkeypatch):
    server, reports = grpc.server(ThreadPoolExecutor(2)), Reports()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(reports, server)
    port = server.add_insecure_port("127.0.0.1:0")
    monkeypatch.setattr("moe_operator.rpc.dialing.target", lambda address: f"{address}:{port}")
    server.start()
    try:
        leader = Pod("docs-0-0", "127.0.0.1", ready=True, terminating=False, revision="", data_rank=0,
                     problem=None, uid="u")  # fmt: skip
        reader = MeshReader()
        for _ in range(3):
            found = reader.read([leader], 5)
        assert found == {"docs-0-0": MeshReading(4, ((0, 7),), Balance(1, 1, 150))}
        assert reports.asked == 1
        silent = replace(leader, uid="v", address="127.0.0.2")
        assert reader.read([silent], 0.2) == {}
    finally:
        server.stop(None)
