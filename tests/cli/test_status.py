"""How `moe status` shows what the API server says."""

import io
import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moe_cli.kube import reading
from moe_cli.rendering import count, show
from moe_client.errors import CommandError
from moe_operator.resources import cache_sums, names
from moe_operator.statuspage import report as reports

NOW = datetime(2026, 1, 31, 12, 1, tzinfo=UTC)


def deployment(name="demo", **status):
    return {
        "metadata": {"name": name, "namespace": "prod", "generation": 3},
        "spec": {"model": {"uri": "file:///mnt/models/docs-moe", "servedName": "docs"}, "replicas": 2},
        "status": status,
    }


READY = {
    "type": "Ready",
    "status": "True",
    "reason": "AllReplicasReady",
    "message": "2/2 replicas ready",
    "lastTransitionTime": "2026-01-31T12:00:00Z",
}
MODEL = {
    "architecture": "deepseek_v3",
    "parametersTotal": 11_612_345,
    "parametersActive": 3_400_000,
    "format": "bf16",
    "contextLength": 1024,
}


def report(body, pods=(), events=(), routes=(), now=NOW):
    """What the command reads of a deployment."""
    return reports.report(body, pods, events, routes, now)


def shown(body, width=120, pods=(), events=(), routes=()):
    output = io.StringIO()
    found = body if "items" in body else report(body, pods, events, routes)
    show(found, Console(file=output, width=width))
    return output.getvalue()


def test_one_deployment_in_full():
    text = shown(
        deployment(
            observedGeneration=3,
            replicas=2,
            readyReplicas=1,
            updatedReplicas=1,
            conditions=[READY],
            model=MODEL,
        )
    )
    for part in (
        "prod/demo",
        "docs from file:///mnt/models/docs-moe",
        "deepseek_v3 11.6M (3.4M active) bf16, context 1024 tokens",
        "1/2 replicas ready, 1 at the current revision\n",
        "AllReplicasReady",
        "2/2 replicas ready",
        "2026-01-31T12:00:00Z",
    ):
        assert part in text
    assert "latest change" not in text


def test_a_mesh_is_a_table():
    gang = {"name": "docs-0", "ranks": 4, "readyRanks": 3, "epoch": 2, "restarts": 1}
    worst = {"imbalancePercentage": 135, "layer": 7, "busiestRank": 1}
    mesh = {
        "shape": "2x2",
        "ranks": 4,
        "readyRanks": 3,
        "stages": [{"firstLayer": 0, "layers": 4}, {"firstLayer": 4, "layers": 4}],
        "gangs": [gang | worst],
    }
    assert report(deployment(mesh=mesh), [], [])["mesh"] == mesh
    text = shown(deployment(mesh=mesh))
    assert "2x2, 3/4 workers ready" in text
    assert "stage 1: layers 4 to 7" in text
    assert re.search(r"docs-0 +3/4 +2 +1 +135 +7 +1", text)


def test_replicas_beyond_the_wanted_ones_are_told():
    text = shown(deployment(replicas=3, readyReplicas=3, updatedReplicas=1, conditions=[READY]))
    assert "2/2 replicas ready, 1 at the current revision; 3 exist, 3 of them ready" in text


SCALING = {
    "desiredReplicas": 4,
    "requestsPerSecond": 5.25,
    "forecast": {
        "method": "harmonic regression",
        "requestsPerSecond": 6.5,
        "lower": 5,
        "upper": 8,
        "errorPercent": 11.5,
        "lastValueErrorPercent": 15,
    },
    "horizon": {"seconds": 95, "coldStarts": 7},
    "lastColdStart": {"pod": "demo-1-0", "scheduling": 1, "image": 4, "loading": 85, "total": 90},
    "capacity": {"requestsPerSecond": 2.1, "source": "Measured"},
    "lastDecision": {
        "time": "2026-01-31T12:00:00Z",
        "before": 3,
        "after": 4,
        "reason": "ForecastHigher",
        "message": "up to 480 work/min in 95 s",
    },
}


def test_scaling_is_told_with_its_reasons():
    text = shown(deployment(desiredReplicas=4, readyReplicas=3, scaling=SCALING), width=160)
    for part in (
        "3/4 replicas ready",
        "5.25 requests/s",
        "6.5 requests/s in 95 s (5 to 8), by harmonic regression; error 11.5 %, last value 15 %",
        "2.1 requests/s per replica, as measured",
        "95 s horizon (7 cold starts seen); last one 90 s: 1 s scheduling, 4 s image, 85 s loading",
        "3 to 4 at 2026-01-31T12:00:00Z, ForecastHigher: up to 480 work/min in 95 s",
    ):
        assert part in text


def routes(**sums):
    """The FrontendRoutes of a frontend."""
    return {"metadata": {"annotations": {names.ANNOTATION_CACHES: cache_sums.write(sums)}}, "routes": []}


def test_caches_of_all_frontends_are_added_up():
    first = routes(promptTokens=900, cachedPromptTokens=300, outputHits=2, outputShared=1, outputMisses=7)
    second = routes(promptTokens=300, cachedPromptTokens=0, outputMisses=2, savedTokens=1500)
    saved = routes(savedMilliseconds=2500, outputBytes=2**19, outputEvictions=4)
    body, silent = deployment(readyReplicas=2), {"metadata": {"name": "of an earlier version"}}
    told = report(body, [], [], [first, second, saved, silent])["caches"]
    assert (told["promptTokens"], told["outputMisses"]) == (1200, 9)
    text = " ".join(shown(body, width=200, routes=[first, second, saved, silent]).split())
    assert "Prefix cache 25 % of 1,200 prompt tokens were cached" in text
    assert (
        "Output cache 25 % of 12 cacheable requests needed no worker, which saved 1,500 tokens and 2.5 s; "
        "0.5 MiB, 4 evictions" in text
    )


def test_of_caches_that_nobody_used_nothing_is_said():
    text = shown(deployment(readyReplicas=2), routes=[routes(promptTokens=0, outputHits=0)])
    assert "cache" not in text


ANNOTATIONS = st.one_of(st.none(), st.text(), st.dictionaries(st.text(), st.integers()).map(json.dumps))


@given(st.lists(ANNOTATIONS))
def test_whatever_an_annotation_says_the_sums_are_numbers(found):
    wrong = ["[" * 10**5, '{"outputHits": -1}', '{"outputHits": true}', '{"outputHits": 1e3}', "[]"]
    assert all(value >= 0 for value in cache_sums.total([*found, *wrong]).values())
    assert cache_sums.total(wrong) == {}


def test_without_scaling_nothing_is_said_of_it():
    assert "Demand" not in shown(deployment(readyReplicas=2))


def pod(rank, *, ready=True, revision="new", **container):
    """A worker's pod with one container status."""
    prefix = "serving.moe-operator.dev"
    labels = {f"{prefix}/role": "worker", f"{prefix}/data-rank": str(rank), f"{prefix}/revision": revision}
    return {
        "metadata": {"name": f"demo-{rank}-0", "labels": labels},
        "status": {
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            "containerStatuses": [{"name": "worker", "ready": ready, "restartCount": 0, **container}],
        },
    }


def test_each_replica_says_how_busy_it_is():
    load = [
        {"pod": "demo-0-0", "queued": 3, "running": 16, "kvUsedPercent": 92},
        {"pod": "demo-gone-0", "queued": 0, "running": 1},
    ]
    body = deployment(revision="new", scaling={**SCALING, "load": load})
    text = shown(body, pods=[pod(0), pod(1)])
    heading = next(line.split() for line in text.splitlines() if line.lstrip().startswith("Pod"))
    assert heading[4:8] == ["Queued", "Running", "KV", "used"]
    first, second = (line.split() for line in text.splitlines() if line.lstrip().startswith("demo-"))
    assert first[4:] == ["3", "16", "92", "%"]
    assert second[4:7] == ["-", "-", "-"]
    told = report(body, [pod(0), pod(1)], [])["pods"]
    assert [one["load"] for one in told] == [{"queued": 3, "running": 16, "kvUsedPercent": 92}, None]


def test_where_nobody_asked_for_the_load_nothing_is_said_of_it():
    assert "Queued" not in shown(deployment(revision="new"), pods=[pod(0)])
    assert report(deployment(), [pod(0)], [])["pods"][0]["load"] is None


def event(second, reason, message, kind="Normal"):
    return {
        "eventTime": f"2026-01-31T12:00:{second:09.6f}Z",
        "reason": reason,
        "message": message,
        "type": kind,
    }


CRASHED = {
    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
    "lastState": {
        "terminated": {
            "exitCode": 2,
            "reason": "Error",
            "finishedAt": "2026-01-31T12:00:05Z",
            "message": "loading\nerror: model.safetensors is truncated",
        }
    },
    "restartCount": 4,
}


def test_each_pod_says_what_keeps_it_from_being_ready():
    text = shown(
        deployment(revision="new", conditions=[READY]),
        pods=[pod(1, ready=False, **CRASHED), pod(0, revision="old")],
    )
    first, second = (line.split() for line in text.splitlines() if line.lstrip().startswith("demo-"))
    assert first == ["demo-0-0", "yes", "old", "0"]
    assert second[:4] == ["demo-1-0", "no", "new", "4"]
    assert "ModelLoadFailed: model.safetensors is truncated" in " ".join(second)


def test_a_pod_whose_volumes_are_not_mounted_in_time_says_so():
    waiting = pod(0, ready=False, state={"waiting": {"reason": "ContainerCreating"}})
    waiting["spec"] = {"nodeName": "n", "volumes": [{"secret": {"secretName": "token"}}]}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-31T12:01:00Z"}
    waiting["status"] |= {"phase": "Pending", "conditions": [scheduled]}
    at_first, later = (
        report(deployment(), [waiting], now=NOW + timedelta(seconds=seconds))["pods"][0]["problem"]
        for seconds in (29, 30)
    )
    assert at_first is None
    assert later["reason"] == "VolumesNotMounted"
    assert "check that these Secrets exist: token;" in later["message"]


def test_what_was_decided_is_told_in_order_also_within_a_second():
    events = [
        event(1.5, "RollingOut", "1 of 2 replicas at revision new"),
        event(1.25, "Updated", "updated StatefulSet demo-0"),
        event(59, "ModelLoadFailed", "demo-0-0 cannot start", "Warning"),
    ]
    told = report(deployment(), (), events)["decisions"]
    assert [decision["reason"] for decision in told] == ["Updated", "RollingOut", "ModelLoadFailed"]
    lines = [line for line in shown(deployment(), events=events).splitlines() if "12:00:" in line]
    assert lines[0].split()[:2] == ["2026-01-31T12:00:01Z", "Updated"]
    assert lines[-1].split()[:2] == ["2026-01-31T12:00:59Z", "ModelLoadFailed"]


def test_the_report_for_scripts():
    found = report(
        deployment(replicas=2, readyReplicas=1, updatedReplicas=1, revision="new", conditions=[READY]),
        [pod(1, ready=False, **CRASHED)],
        [],
    )
    assert found["replicas"] == {"desired": 2, "ready": 1, "updated": 1, "there": 2}
    (worker,) = found["pods"]
    assert (worker["dataRank"], worker["current"], worker["restarts"]) == (1, True, 4)
    assert worker["problem"] == {"reason": "ModelLoadFailed", "message": "model.safetensors is truncated"}
    assert worker["lastEnd"]["log"] == "loading\nerror: model.safetensors is truncated"
    assert found["conditions"][0]["reason"] == "AllReplicasReady"
    assert json.loads(json.dumps(found)) == found


def test_a_change_not_acted_on_is_said():
    assert "not acted on the latest change" in shown(deployment(observedGeneration=2, conditions=[READY]))


def test_a_deployment_nobody_looks_after():
    text = shown(deployment())
    assert "no conditions yet: is the operator running?" in text
    assert "0/2 replicas ready" in text


def test_a_list_has_a_row_for_each():
    text = shown(
        {"items": [deployment("a", conditions=[READY], readyReplicas=2, model=MODEL), deployment("b")]}
    )
    rows = [line.split() for line in text.splitlines() if "prod" in line]
    assert rows[0][:4] == ["prod", "a", "yes", "2/2"]
    assert rows[1][:4] == ["prod", "b", "?", "0/2"]
    assert rows[1][-1] == "NotSeenYet"


def test_an_empty_list_says_what_to_do():
    assert "no MoEDeployments here" in shown({"items": []})


WAITING = {
    **READY,
    "status": "False",
    "reason": "ReplicasNotReady",
    "message": "0/2 replicas ready: waiting for demo-0-0, demo-1-0 to load the model of 671B parameters",
}


@pytest.mark.parametrize("width", [20, 50, 80, 120])
def test_however_narrow_a_terminal_is_names_and_times_stay_whole(width):
    body = deployment("some-longer-name", conditions=[WAITING], model=MODEL)
    text = shown(body, width, pods=[pod(0)], events=[event(1, "RollingOut", WAITING["message"])])
    for whole in (
        "ReplicasNotReady",
        "2026-01-31T12:00:00Z",
        "RollingOut",
        "demo-0-0",
        "some-longer-name",
    ):
        assert whole in text
    assert "…" not in text
    assert "some-longer-name" in shown({"items": [body]}, width)
    assert max(map(len, text.splitlines())) <= max(width, 80)


def test_a_pipe_gets_every_sentence_on_one_line(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    show(report(deployment(conditions=[WAITING]), [], [event(1, "RollingOut", 5 * WAITING["message"])]))
    lines = capsys.readouterr().out.splitlines()
    (condition,) = (line for line in lines if "ReplicasNotReady" in line)
    assert WAITING["message"] in condition
    assert any(5 * WAITING["message"] in line for line in lines)
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_pipe_is_as_wide_as_columns_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    show(report(deployment(conditions=[WAITING]), [], []))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 90


def test_messages_are_text_and_not_markup():
    condition = {
        **READY,
        "status": "False",
        "message": "missing [bold]model-00002[/bold].safetensors [/oops]",
    }
    assert "[bold]model-00002[/bold].safetensors [/oops]" in shown(deployment(conditions=[condition]))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (11_612_345, "11.6M"), (671_026_419_200, "671B"), (10**12, "1T")],
)
def test_counts(number, text):
    assert count(number) == text


async def test_without_a_kubeconfig_the_way_out_is_named(moe):
    result = await moe("status")
    assert result.returncode == 2
    assert result.stderr.decode().startswith("error: no usable kubeconfig")
    assert "Traceback" not in result.stderr.decode()


async def test_a_kubeconfig_that_is_no_yaml(moe, tmp_path):
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text("clusters: [{name: c\n")
    result = await moe("status", KUBECONFIG=str(kubeconfig))
    assert result.returncode == 2
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("error: no usable kubeconfig")


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"- a\n", b"\xff\xfe\x00", b"contexts: 7\n", None],
    ids=["a text", "a list", "no UTF-8", "a number for a list", "a directory"],
)
def test_a_file_that_is_no_kubeconfig(tmp_path, monkeypatch, content):
    path = tmp_path / "config"
    path.mkdir() if content is None else path.write_bytes(content)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    with (
        pytest.raises(CommandError, match=r"no usable kubeconfig \(.+\); set KUBECONFIG"),
        reading(None, None),
    ):
        pytest.fail("it was read")


async def test_a_cluster_that_does_not_answer(moe, tmp_path):
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
        "clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\n"
        "contexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {}}]\n"
    )
    result = await moe("status", KUBECONFIG=str(kubeconfig))
    assert result.returncode == 3
    assert "error: the cluster does not answer" in result.stderr.decode()


async def test_a_name_in_all_namespaces_makes_no_sense(moe):
    result = await moe("status", "demo", "-A")
    assert result.returncode == 2
    assert "exclude each other" in result.stderr.decode()


def test_what_is_wrong_stands_out_and_idle_does_not():
    kinds = {"Active": "False", "Stalled": "True", "Reconciling": "True", "Ready": "False"}
    conditions = [{**READY, "type": kind, "status": status} for kind, status in kinds.items()]
    output = io.StringIO()
    found = report(deployment(conditions=conditions), [], [])
    show(found, Console(file=output, width=120, force_terminal=True, color_system="standard"))
    lines = {
        kind: next(ln for ln in output.getvalue().splitlines() if ln.startswith(f" {kind}")) for kind in kinds
    }
    assert "\x1b[31myes" in lines["Stalled"]
    assert "\x1b[33myes" in lines["Reconciling"]
    assert "\x1b[31mno" in lines["Ready"]
    assert "\x1b[" not in lines["Active"]
