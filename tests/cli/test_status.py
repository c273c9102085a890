"""How `moe status` shows what the API server says."""

import io

import pytest
from rich.console import Console

from moe_operator.cli.rendering import count, show


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
    "message": "2 of 2 replicas answer",
    "lastTransitionTime": "2026-01-31T12:00:00Z",
}
MODEL = {
    "architecture": "deepseek_v3",
    "parametersTotal": 11_612_345,
    "parametersActive": 3_400_000,
    "format": "bf16",
    "contextLength": 1024,
}


def shown(body, width=120):
    output = io.StringIO()
    show(body, Console(file=output, width=width))
    return output.getvalue()


def test_one_deployment_in_full():
    text = shown(
        deployment(
            observedGeneration=3,
            replicas=2,
            readyReplicas=1,
            updatedReplicas=2,
            conditions=[READY],
            model=MODEL,
        )
    )
    for part in (
        "prod/demo",
        "docs from file:///mnt/models/docs-moe",
        "deepseek_v3 11.6M (3.4M active) bf16, context 1024 tokens",
        "1 ready of 2 wanted (2 there, 2 up to date)",
        "AllReplicasReady",
        "2 of 2 replicas answer",
        "2026-01-31T12:00:00Z",
    ):
        assert part in text
    assert "latest change" not in text


def test_a_change_not_acted_on_is_said():
    assert "not acted on the latest change" in shown(deployment(observedGeneration=2, conditions=[READY]))


def test_a_deployment_nobody_looks_after():
    text = shown(deployment())
    assert "no conditions yet: is the operator running?" in text
    assert "0 ready of 2 wanted" in text


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


@pytest.mark.parametrize("wrap", [lambda body: body, lambda body: {"items": [body]}], ids=["one", "list"])
def test_a_narrow_terminal_cuts_nothing_short(wrap):
    assert "…" not in shown(wrap(deployment(conditions=[READY], model=MODEL)), width=50)


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
