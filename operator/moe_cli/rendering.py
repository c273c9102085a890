"""MoEDeployments as tables for a terminal. Pure, up to printing."""

from collections.abc import Mapping
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_api.visible import visible_values
from moe_cli import cache_rows, expert_rows, scaling_rows
from moe_client import console
from moe_client.console import Prose
from moe_operator.resources.deployment import parse_status
from moe_operator.resources.status import ACTIVE, READY, RECONCILING, STALLED, ModelInfo
from moe_operator.statuspage.report import desired

_MARKS: Final = {"True": ("yes", "green"), "False": ("no", "red"), "Unknown": ("?", "yellow")}
_MARK_STYLES: Final = {(STALLED, "True"): "red", (RECONCILING, "True"): "yellow", (ACTIVE, "False"): ""}
"""Conditions whose True is not good, or whose False is not bad: idle is healthy."""
_PROSE: Final = ("Message", "What it says", "Model")
_DECISIONS_SHOWN: Final = 12
_CROWDED: Final = 90
"""Use of a KV cache, in percent, above which new requests soon have to wait."""


def show(found: Mapping[str, Any], on: Console | None = None) -> None:
    """Prints the report of one MoEDeployment, or a list of them as the API server returned it.

    Cells are `Text` throughout: in plain strings rich would take brackets of a message for markup.
    """
    on, found = on or console.console(), visible_values(found)
    if "items" not in found:
        console.show(one(found), on)
    elif found["items"]:
        console.show(table(found["items"]), on)
    else:
        console.show("no MoEDeployments here; try `moe status -A`, or apply examples/docs-moe.yaml", on)


def table(bodies: list[Mapping[str, Any]]) -> Table:
    """A row for each deployment."""
    result = _table("Namespace", "Name", "Ready", "Replicas", "Model", "Reason")
    for body in bodies:
        status, metadata = parse_status(body), body["metadata"]
        ready = status.condition(READY)
        result.add_row(
            Text(metadata["namespace"]),
            Text(metadata["name"]),
            _mark(ready.status if ready else "Unknown"),
            Text(f"{status.ready_replicas}/{desired(body)}"),
            Prose(_model_brief(status.model)),
            Text(ready.reason if ready else "NotSeenYet"),
        )
    return result


def one(report: Mapping[str, Any]) -> RenderableType:
    """The report of one deployment."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("MoEDeployment", Text(f"{report['namespace']}/{report['name']}"))
    facts.add_row("Model", Text(_model(report["model"])))
    facts.add_row("Replicas", Text(_replicas(report["replicas"])))
    if report["revision"]:
        facts.add_row("Revision", Text(report["revision"]))
    if report["mesh"]:
        facts.add_row("Mesh", Text(_stages(report["mesh"])))
    scaling, caches = scaling_rows.rows(report["scaling"]), cache_rows.rows(report["caches"])
    for heading, said in (*scaling, *caches, *expert_rows.rows(report.get("experts"))):
        facts.add_row(heading, Text(said))
    if report["observedGeneration"] != report["generation"]:
        facts.add_row("", Text("the operator has not acted on the latest change yet", style="yellow"))
    parts: list[RenderableType] = [facts, "", _conditions(report["conditions"])]
    parts += [_mesh(report["mesh"])] if report["mesh"] else []
    parts += [_pods(report["pods"])] if report["pods"] else []
    parts += [_decisions(report["decisions"])] if report["decisions"] else []
    return Group(*parts)


def _conditions(conditions: list[Mapping[str, Any]]) -> RenderableType:
    if not conditions:
        return Text(
            "no conditions yet: is the operator running? (kubectl get pods -n moe-system)", style="yellow"
        )
    result = _table("Condition", "", "Reason", "Message", "Since", pad_edge=False)
    for condition in conditions:
        kind, reason, since = (Text(condition[key]) for key in ("type", "reason", "lastTransitionTime"))
        mark = _mark(condition["status"], _MARK_STYLES.get((condition["type"], condition["status"])))
        result.add_row(kind, mark, reason, Prose(condition["message"]), since)
    return result


def _stages(mesh: Mapping[str, Any]) -> str:
    """Shape, workers, and the layers of each stage."""
    counts = f"{mesh['shape']}, {mesh['readyRanks']}/{mesh['ranks']} workers ready"
    ranges = (
        f"stage {number}: layers {stage['firstLayer']} to {stage['firstLayer'] + stage['layers'] - 1}"
        for number, stage in enumerate(mesh["stages"])
    )
    return "\n".join([counts, *ranges])


def _mesh(mesh: Mapping[str, Any]) -> RenderableType:
    """A row for each replica of several workers."""
    headings = ("Replica", "Workers ready", "Epoch", "Restarts", "Imbalance %", "Layer", "Busiest rank")
    result = _table(*headings, pad_edge=False)
    for gang in mesh["gangs"]:
        whole = gang["readyRanks"] == gang["ranks"]
        load = (gang.get("imbalancePercentage"), gang.get("layer"), gang.get("busiestRank"))
        result.add_row(
            Text(gang["name"]),
            Text(f"{gang['readyRanks']}/{gang['ranks']}", style="" if whole else "yellow"),
            Text(str(gang["epoch"])),
            Text(str(gang["restarts"]), style="yellow" if gang["restarts"] else ""),
            *(Text("-" if value is None else str(value)) for value in load),
        )
    return result


def _pods(pods: list[Mapping[str, Any]]) -> RenderableType:
    loaded = any(pod["load"] for pod in pods)
    headings = ("Queued", "Running", "KV used") if loaded else ()
    result = _table("Pod", "Ready", "Revision", "Restarts", *headings, "What it says", pad_edge=False)
    for pod in pods:
        load = _load(pod) if loaded else ()
        revision = Text(pod["revision"] or "-", style="yellow" if pod["current"] is False else "")
        restarts = Text(str(pod["restarts"]), style="yellow" if pod["restarts"] else "")
        mark = _mark("True" if pod["ready"] else "False")
        result.add_row(Text(pod["name"]), mark, revision, restarts, *load, _says(pod))
    return result


def _load(pod: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Queued and running requests, and the used part of the KV cache; a full cache is highlighted."""
    load = pod["load"]
    if load is None:
        return Text("-"), Text("-"), Text("-")
    used = load["kvUsedPercent"]
    return (
        Text(str(load["queued"]), style="yellow" if load["queued"] else ""),
        Text(str(load["running"])),
        Text("-" if used is None else f"{used} %", style="yellow" if used and used >= _CROWDED else ""),
    )


def _says(pod: Mapping[str, Any]) -> Text:
    """The problem of a pod, or else how it last ended."""
    if pod["leaving"]:
        return Prose("on its way out", style="yellow")
    if pod["problem"]:
        return Prose(f"{pod['problem']['reason']}: {pod['problem']['message']}", style="red")
    end = pod["lastEnd"]
    if end is None:
        return Prose("" if pod["ready"] else "starting")
    last_line = (end["log"] or end["reason"] or "").splitlines()[-1:]
    return Prose(f"ended {end['at']} with exit code {end['exitCode']}: {''.join(last_line)}", style="yellow")


def _decisions(decisions: list[Mapping[str, Any]]) -> RenderableType:
    result = _table("Decided at", "Reason", "Message", pad_edge=False)
    for decision in decisions[-_DECISIONS_SHOWN:]:
        style = "red" if decision["type"] == "Warning" else ""
        at = str(decision["time"]).partition(".")[0].removesuffix("Z") + "Z"
        result.add_row(Text(at), Text(decision["reason"], style=style), Prose(decision["message"]))
    return result


def _table(*headings: str, pad_edge: bool = True) -> Table:
    """An empty table that folds prose to fit; names, reasons and times are not folded."""
    result = Table(box=box.SIMPLE, pad_edge=pad_edge)
    for heading in headings:
        result.add_column(heading, overflow="fold", no_wrap=heading not in _PROSE)
    return result


def _replicas(replicas: Mapping[str, int]) -> str:
    """The number of ready replicas and, during a rollout or scaling, of existing ones."""
    ready, wanted, there = replicas["ready"], replicas["desired"], replicas["there"]
    counts = f"{min(ready, wanted)}/{wanted} replicas ready, {replicas['updated']} at the current revision"
    return counts if there == wanted else f"{counts}; {there} exist, {ready} of them ready"


def _model(model: Mapping[str, Any]) -> str:
    where = f"{model['servedName']} from {model['uri'] or '?'}"
    if "architecture" not in model:
        return where
    known = ModelInfo.model_validate(model)
    return f"{where}\n{_model_brief(known)}, context {known.context_length} tokens"


def _model_brief(model: ModelInfo | None) -> str:
    if model is None:
        return "-"
    total, active = count(model.parameters_total), count(model.parameters_active)
    return f"{model.architecture} {total} ({active} active) {model.format}"


def count(number: int) -> str:
    """A number of parameters with three digits: 11.6M, 671B."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _mark(status: str, style: str | None = None) -> Text:
    text, usual = _MARKS[status]
    return Text(text, style=usual if style is None else style)
