"""spec.model: where checkpoints come from, which directories may be mounted, and how far a download is."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_operator.observed import pod_status, problems
from moe_operator.observed.downloads import Download
from moe_operator.planner import host_paths
from moe_operator.planner.plan import plan
from moe_operator.render import worker
from moe_operator.resources import names
from moe_operator.rpc import leader
from moe_worker.models.chat_template import LARGEST_TEMPLATE
from tests.operator.worlds import World, deployment


def spec(uri, **model):
    return worker.pod_spec(deployment(model={"uri": uri, **model}))


def volumes(pod):
    return {one.pop("name"): one for one in map(dict, pod["volumes"])}


def served_from(pod):
    words = pod["containers"][0]["command"]
    return words[words.index("--model") + 1]


@pytest.mark.parametrize(
    ("uri", "volume", "folder"),
    [
        ("file:///mnt/models/a/", {"hostPath": {"path": "/mnt/models/a"}}, "/mnt/models/a"),
        ("pvc://models/a/b", {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
         "/mnt/moe-model/a/b"),
        ("oci://ghcr.io/a/b:1", {"image": {"reference": "ghcr.io/a/b:1", "pullPolicy": "IfNotPresent"}},
         "/mnt/moe-model"),
    ],
)  # fmt: skip
def test_a_model_that_is_there_is_mounted_read_only(uri, volume, folder):
    pod = spec(uri)
    assert volumes(pod)["model"] == volume
    assert served_from(pod) == folder
    mount = next(one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "model")
    assert mount["readOnly"]
    assert folder.startswith(mount["mountPath"])
    assert "initContainers" not in pod


def test_a_model_of_a_hub_is_downloaded_by_an_init_container_with_its_credentials():
    cache = {"claimName": "models", "maxSize": "500Gi"}
    pod = spec("hf://a/b@v1", credentialsSecret="hub", endpoint="http://hub:80", cache=cache)
    (fetch,), (serve,) = pod["initContainers"], pod["containers"]
    assert fetch["command"][:3] == ["moe-worker", "fetch", "hf://a/b@v1"]
    assert fetch["command"][-4:] == ["--max-size", str(500 * 2**30), "--endpoint", "http://hub:80"]
    assert fetch["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert "envFrom" not in serve
    assert volumes(pod)["model-cache"] == {"persistentVolumeClaim": {"claimName": "models"}}
    assert served_from(pod) == fetch["command"][fetch["command"].index("--link") + 1]
    assert all(one.get("readOnly") for one in serve["volumeMounts"] if one["name"].startswith("model"))
    assert not any(one.get("readOnly") for one in fetch["volumeMounts"])


def test_the_download_asks_for_no_device_and_no_more_than_the_worker():
    asked = {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}, "requests": {"cpu": 2}}
    of = deployment(model={"uri": "s3://abc/d"}, worker={"resources": asked})
    (fetch,) = worker.pod_spec(of)["initContainers"]
    assert fetch["resources"] == {"limits": {"memory": "8Gi"}, "requests": {"cpu": 2}}


HOST_VOLUME = {"podTemplate": {"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/etc/../mnt"}}]}}}


@pytest.mark.parametrize(
    ("settings", "roots", "sentence"),
    [
        ({}, ["/mnt/models"], ""),
        ({}, ["/mnt/models/", "/data"], ""),
        ({}, ["/"], ""),
        ({}, [], "not allowed: /mnt/models/docs-moe: the operator allows none; use hf://"),
        ({}, ["/mnt/model"], "/mnt/models/docs-moe: it is below none of /mnt/model; use hf://"),
        ({"model": {"uri": "hf://a/b"}}, [], ""),
        (
            {"model": {"uri": "hf://a/b", "cache": {"hostPath": "/var"}}},
            ["/mnt"],
            "not allowed: /var: it is below",
        ),
        ({"worker": HOST_VOLUME}, ["/mnt/models"], "not allowed: /etc/../mnt: it is below none"),
        ({"frontend": HOST_VOLUME}, ["/"], "not allowed: /etc/../mnt"),
    ],
)
def test_only_directories_below_allowed_roots_are_mounted(settings, roots, sentence):
    found = host_paths.refusal(deployment(**settings), roots)
    assert sentence in found
    assert bool(found) == bool(sentence)


def fetching(world, *ranks):
    for rank in ranks:
        world.pods[f"docs-{rank}-0"]["status"]["initContainerStatuses"] = [
            {"name": "fetch", "ready": False, "state": {"running": {}}}
        ]


def test_the_conditions_say_how_far_the_download_is():
    world = World(deployment(model={"uri": "hf://a/b"}))
    world.step()
    fetching(world, 0)
    todo = world.planned()
    assert [pod.name for pod in todo.fetching] == ["docs-0-0"]
    assert todo.recheck
    told = {"docs-0-0": Download(int(7.7 * 2**30), int(18.2 * 2**30), 175)}
    todo = plan(world.deployment, world.observed(downloads=told), world.now)
    assert todo.fetching == ()
    conditions = {one.type: one for one in todo.status.conditions}
    loaded = conditions["ModelLoaded"]
    assert (loaded.status, loaded.reason) == ("False", "Downloading")
    assert loaded.message == "42 % of 18.2 GiB, 2 min left"
    assert "docs-0-0 downloads the model: 42 % of 18.2 GiB" in conditions["Ready"].message


@pytest.mark.parametrize(
    ("download", "text"),
    [(Download(0, 2**20, 0), "0 % of 1.0 MiB"), (Download(1, 2, 59), "50 % of 0.0 MiB, 59 s left"),
     (Download(2**29, 2**30, 7300), "50 % of 1.0 GiB, 2 h 1 min left")],
)  # fmt: skip
def test_progress_in_words(download, text):
    assert download.text == text


@pytest.mark.parametrize(("code", "stuck"), [(1, False), (2, True)])
def test_a_failed_download_gives_its_sentence(code, stuck):
    end = {"terminated": {"exitCode": code, "message": "warning: a\nerror: model hf://a/b does not exist"}}
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    status = {"initContainerStatuses": [{"name": "fetch", "ready": False, "state": state, "lastState": end}]}
    wanted = problems.Problem("ModelFetchFailed", "model hf://a/b does not exist", stuck=stuck)
    assert problems.of_pod(pod_status.read({"status": status})) == wanted


@contextlib.contextmanager
def saying(monkeypatch, template="", **progress):
    class Service(worker_pb2_grpc.FetchServiceServicer, inference_pb2_grpc.InferenceServiceServicer):
        def GetProgress(self, request, context):
            return worker_pb2.FetchProgress(**progress)

        def GetModel(self, request, context):
            chat_template = inference_pb2.ChatTemplate(template=template)
            return inference_pb2.Model(architecture="deepseek_v3", chat_template=chat_template)

    server = grpc.server(ThreadPoolExecutor(1))
    worker_pb2_grpc.add_FetchServiceServicer_to_server(Service(), server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    monkeypatch.setattr(names, "GRPC_PORT", port)
    server.start()
    try:
        yield
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("progress", "found"),
    [
        ({"bytes": 1, "total_bytes": 2, "seconds_left": 3}, Download(1, 2, 3)),
        ({"bytes": 5, "total_bytes": 2, "seconds_left": 2**63}, Download(2, 2, 30 * 24 * 3600)),
        ({"bytes": 5}, None),
        ({"bytes": 5, "total_bytes": 2**64 - 1}, None),
    ],
)
def test_what_a_pod_says_of_its_download_is_bounded(monkeypatch, progress, found):
    with saying(monkeypatch, **progress):
        assert leader.download("127.0.0.1", 5) == found


def test_a_model_with_the_largest_chat_template_is_known(monkeypatch):
    with saying(monkeypatch, template="x" * LARGEST_TEMPLATE):
        assert leader.get_model("127.0.0.1", "r", 5).architecture == "deepseek_v3"
