"""MoEDeployments as tables for a terminal. Pure, up to printing."""

from collections.abc import Mapping
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_operator.resources.deployment import parse_status
from moe_operator.resources.status import READY, Condition, ModelInfo, Status

_MARKS: Final = {"True": ("yes", "green"), "False": ("no", "red"), "Unknown": ("?", "yellow")}


def show(body: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints one MoEDeployment, or a list of them, as the API server gave it.

    Cells are `Text` throughout: in plain strings rich would take brackets of a message for markup.
    """
    console = console or Console()
    if "items" not in body:
        console.print(one(body))
    elif body["items"]:
        console.print(table(body["items"]))
    else:
        console.print("no MoEDeployments here; try `moe status -A`, or apply examples/docs-moe.yaml")


def table(bodies: list[Mapping[str, Any]]) -> Table:
    """A row for each deployment."""
    result = _table("Namespace", "Name", "Ready", "Replicas", "Model", "Reason")
    for body in bodies:
        status, metadata = parse_status(body), body["metadata"]
        ready = status.condition(READY)
        result.add_row(
            Text(metadata["namespace"]),
            Text(metadata["name"]),
            _mark(ready),
            Text(f"{status.ready_replicas}/{_desired(body)}"),
            Text(_model_brief(status.model)),
            Text(ready.reason if ready else "NotSeenYet"),
        )
    return result


def one(body: Mapping[str, Any]) -> RenderableType:
    """Everything a user wants to know of one deployment."""
    status, metadata = parse_status(body), body["metadata"]
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("MoEDeployment", Text(f"{metadata['namespace']}/{metadata['name']}"))
    facts.add_row("Model", Text(_model(body, status.model)))
    facts.add_row("Replicas", Text(_replicas(body, status)))
    if status.observed_generation != metadata.get("generation"):
        facts.add_row("", Text("the operator has not acted on the latest change yet", style="yellow"))
    return Group(facts, "", _conditions(status))


def _conditions(status: Status) -> RenderableType:
    if not status.conditions:
        return Text(
            "no conditions yet: is the operator running? (kubectl get pods -n moe-system)", style="yellow"
        )
    result = _table("Condition", "", "Reason", "Message", "Since", pad_edge=False)
    for condition in status.conditions:
        told = (condition.reason, condition.message, condition.last_transition_time)
        result.add_row(Text(condition.type), _mark(condition), *map(Text, told))
    return result


def _table(*headings: str, pad_edge: bool = True) -> Table:
    """An empty table that folds cells which do not fit: a reason cut short cannot be searched for."""
    result = Table(box=box.SIMPLE, pad_edge=pad_edge)
    for heading in headings:
        result.add_column(heading, overflow="fold")
    return result


def _replicas(body: Mapping[str, Any], status: Status) -> str:
    return (
        f"{status.ready_replicas} ready of {_desired(body)} wanted "
        f"({status.replicas} there, {status.updated_replicas} up to date)"
    )


def _model(body: Mapping[str, Any], model: ModelInfo | None) -> str:
    spec = body.get("spec", {}).get("model", {})
    name = spec.get("servedName") or body["metadata"]["name"]
    where = f"{name} from {spec.get('uri', '?')}"
    return f"{where}\n{_model_brief(model)}, context {model.context_length} tokens" if model else where


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


def _desired(body: Mapping[str, Any]) -> int:
    return int(body.get("spec", {}).get("replicas", 1))


def _mark(condition: Condition | None) -> Text:
    text, style = _MARKS[condition.status if condition else "Unknown"]
    return Text(text, style=style)
