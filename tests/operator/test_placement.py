"""Whether a new pod would fit in the place of an old one, by the scheduler's rules."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_operator.observed import nodes, scheduling
from moe_operator.planner import placement
from moe_operator.planner.placement import Seat

GPU = "nvidia.com/gpu"
CONTROL_PLANE = "{node-role.kubernetes.io/control-plane: }"
LACKS = (
    "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint "
    "{node-role.kubernetes.io/control-plane: }. preemption: 0/3 nodes are available: 1 No preemption victims "
    "found for incoming pod, 2 Preemption is not helpful for scheduling."
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (LACKS, ["Insufficient nvidia.com/gpu", f"node(s) had untolerated taint {CONTROL_PLANE}"]),
        ("0/1 nodes are available: 1 Too many pods.", ["Too many pods"]),
        ("0/1 nodes are available: 1 Too many pods", ["Too many pods"]),
        ("0/1 nodes are available: 1 Too many pods.  preemption: 0/1 nodes", ["Too many pods"]),
        ("0/1 nodes are available: 1 Too many pods preemption: 0/1 nodes", ["Too many pods"]),
        ("pod has unbound claims", []),
    ],
)
def test_the_schedulers_summary_is_read_up_to_its_end(said, expected):
    assert scheduling.reasons(said) == expected


def test_a_summary_of_spaces_is_read_in_linear_time():
    reason = "a" + " " * 300_000 + "b"
    assert scheduling.reasons(f"0/1 nodes are available: 1 {reason}") == [reason]


def obstacle(content, said, seat):
    return placement.obstacle(nodes.needs(content), said, seat)


def room(content, said, seats):
    return placement.room(nodes.needs(content), said, seats)


def requests(content):
    return nodes.needs(content).requests


def spec(gpus=1, cpu="500m", **more):
    resources = {"requests": {"cpu": cpu}, "limits": {GPU: gpus}} if gpus else {"requests": {"cpu": cpu}}
    return {"containers": [{"name": "worker", "resources": resources}], **more}


def pod(uid, content):
    return {"metadata": {"name": uid, "uid": uid}, "spec": content}


def node(labels=None, **content):
    allocatable = {"cpu": "4", "memory": "8Gi", "pods": "110", GPU: "2"}
    return {
        "metadata": {"name": "n1", "labels": labels or {}},
        "spec": content,
        "status": {"allocatable": allocatable},
    }


def seat(old=None, others=(), where=None):
    old = pod("old", old or spec())
    pods = (old, *(pod(f"other-{i}", one) for i, one in enumerate(others)))
    return seated(old, where or node(), pods)


def seated(old, where, pods):
    return Seat(nodes.read_pod(old), nodes.read_node(where), tuple(map(nodes.read_pod, pods)))


FULL = (spec(),)
"""The other GPU of the node is taken."""


def test_a_pod_like_the_old_one_fits_in_its_place():
    assert obstacle(spec(), LACKS, seat(others=FULL)) == ""
    assert obstacle(spec(), "", seat(others=FULL)) == "", "maxSurge 0: no scheduler was asked"


def test_a_larger_pod_fits_only_where_the_rest_of_the_node_is_free():
    assert obstacle(spec(gpus=2), LACKS, seat()) == ""
    said = obstacle(spec(gpus=2), LACKS, seat(others=FULL))
    assert said == "node n1 would have 1 nvidia.com/gpu left, and 2 is requested"
    assert "0.5 cpu left, and 1" in obstacle(spec(cpu="1"), LACKS, seat(others=[spec(gpus=0, cpu="3500m")]))


def node_of(*gpus, free=0, others=()):
    """Seats of old pods that take so many GPUs of one node, by name; `free` GPUs are taken by nobody."""
    where = node()
    where["status"]["allocatable"] = {"cpu": "64", "pods": "110", GPU: str(sum(gpus) + free)}
    old = {f"docs-{rank}-0": pod(f"u{rank}", spec(gpus=count)) for rank, count in enumerate(gpus)}
    pods = (*old.values(), *(pod(f"other-{i}", one) for i, one in enumerate(others)))
    return {name: seated(body, where, pods) for name, body in old.items()}


def test_several_old_pods_make_room_together_where_one_is_not_enough():
    found = room(spec(gpus=4), LACKS, node_of(2, 2, 2))
    assert found.together == {
        "docs-0-0": frozenset({"docs-1-0"}),
        "docs-1-0": frozenset({"docs-0-0"}),
    }, "the first ones leave, and no more than needed"
    assert found.obstacles["docs-0-0"] == (
        "node n1 would have 2 nvidia.com/gpu left, and 4 is requested; "
        "it would in the places of docs-0-0, docs-1-0 together"
    )
    assert found.obstacles["docs-2-0"].endswith("and 4 is requested")


def test_nobody_leaves_with_others_where_one_is_enough_or_all_are_too_few():
    assert room(spec(gpus=2), LACKS, node_of(1, 2)).together == {}
    assert room(spec(gpus=4), LACKS, node_of(1, 2)).together == {}
    typo = spec(gpus=2, nodeSelector={"pool": "gpuu"})
    assert room(typo, LACKS, node_of(1, 1)).together == {}
    about_others = "0/1 nodes are available: 1 node(s) didn't match pod anti-affinity rules."
    assert room(spec(gpus=2), about_others, node_of(1, 1)).together == {}


def test_old_pods_of_two_nodes_make_no_room_together():
    one, other = node_of(1), node_of(1)
    seat = other["docs-0-0"]
    elsewhere = replace(seat, node=replace(seat.node, name="n2"))
    assert room(spec(gpus=2), LACKS, {**one, "docs-1-0": elsewhere}).together == {}


@given(
    gpus=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    free=st.integers(0, 3),
    wanted=st.integers(1, 16),
)
def test_a_group_is_enough_and_none_of_it_could_stay(gpus, free, wanted):
    found = room(spec(gpus=wanted, cpu="0"), LACKS, node_of(*gpus, free=free))
    by_name = {f"docs-{rank}-0": count for rank, count in enumerate(gpus)}
    alone = any(free + count >= wanted for count in gpus)
    possible = free + sum(gpus) >= wanted > free
    assert bool(found.together) == (possible and not alone)
    for name, others in found.together.items():
        group = {name, *others}
        given_up = sum(by_name[one] for one in group)
        assert free + given_up >= wanted
        assert all(free + given_up - by_name[one] < wanted for one in group)
        assert all(found.together[one] == group - {one} for one in group)


WRONG = {
    "typo": (spec(nodeSelector={"pool": "gpuu"}), None, "lacks the label pool=gpuu"),
    "no such device": (
        {"containers": [{"resources": {"limits": {"amd.com/gpu": 1}}}]},
        None,
        "would have 0 amd.com/gpu left, and 1 is requested",
    ),
    "taint": (spec(), node(taints=[{"key": "a", "effect": "NoSchedule"}]), "has the taint a:NoSchedule"),
    "cordoned": (spec(), node(unschedulable=True), "the taint node.kubernetes.io/unschedulable:NoSchedule"),
    "affinity": (spec(affinity={"podAntiAffinity": {"a": 1}}), None, "has another affinity"),
    "claim": (
        spec(volumes=[{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]),
        None,
        "volume claims",
    ),
    "host port": (
        {"containers": [{"name": "worker", "ports": [{"hostPort": 80}]}]},
        None,
        "has other host ports",
    ),
    "scheduler": (spec(schedulerName="volcano"), None, "has another schedulerName"),
    "devices": (spec(resourceClaims=[{"name": "gpu"}]), None, "has another resourceClaims"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_the_old_pods_to_give_is_the_obstacle(case):
    content, where, sentence = WRONG[case]
    assert sentence in obstacle(content, LACKS, seat(where=where))


def test_tolerations_admit_a_pod_to_a_tainted_node():
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    where = node(taints=[taint, {"key": "soft", "effect": "PreferNoSchedule"}])
    for toleration in (
        {"operator": "Exists"},
        {"key": "gpu", "operator": "Exists"},
        {"key": "gpu", "value": "yes", "effect": "NoSchedule"},
        {"key": "gpu", "operator": "Equal", "value": "yes"},
    ):
        assert obstacle(spec(tolerations=[toleration]), LACKS, seat(where=where)) == ""
    for toleration in (
        {"key": "gpu", "value": "no"},
        {"key": "gpu", "operator": "Exists", "effect": "NoExecute"},
        {"key": "other", "operator": "Exists"},
    ):
        assert "taint gpu:NoSchedule" in obstacle(spec(tolerations=[toleration]), LACKS, seat(where=where))


# Messages of kube-scheduler 1.29 to 1.34.
ABOUT_RESOURCES = [
    "0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available.",
    "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are "
    "available.",
    "0/2 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 1 node(s) were unschedulable.",
    "0/2 nodes are available: 1 Too many pods, 1 node(s) didn't match Pod's node affinity/selector.",
]
ABOUT_OTHER_THINGS = [
    "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector. preemption: 0/1 nodes are "
    "available: 1 Preemption is not helpful for scheduling.",
    "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match pod anti-affinity rules.",
    "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had volume node affinity conflict.",
    "0/2 nodes are available: 2 node(s) had untolerated taint {gpu: yes}.",
    '0/1 nodes are available: persistentvolumeclaim "x" not found.',
    "pod group is not ready, 1 Insufficient cpu",
]


def test_only_where_the_scheduler_misses_resources_may_a_place_help():
    for said in ABOUT_RESOURCES:
        assert obstacle(spec(), said, seat()) == "", said
    for said in ABOUT_OTHER_THINGS:
        assert obstacle(spec(), said, seat()), said
    assert "pod anti-affinity" in obstacle(spec(), ABOUT_OTHER_THINGS[1], seat())


def test_requests_of_a_pod_are_counted_as_the_scheduler_does():
    def container(cpu, **more):
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    init = [container("3"), container("1", restartPolicy="Always"), container("2500m")]
    content = {
        "containers": [container("1"), container("500m")],
        "initContainers": init,
        "overhead": {"cpu": "1"},
    }
    assert requests(content)["cpu"] == 4 + 1 - 0.5, "the last init container with the sidecar, and overhead"
    without = copy.deepcopy(content) | {"initContainers": init[1:2]}
    assert requests(without)["cpu"] == 1.5 + 1 + 1
    assert requests({"containers": [{"resources": {"limits": {GPU: "1"}}}]}) == {"pods": 1, GPU: 1}
