"""docs/conditions.md names every reason of conditions and events that the code can give, and no other."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from moe_operator.autoscaling.model import sizing
from moe_operator.observed import problems
from moe_operator.planner.changes import Why

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/conditions.md"
GIVES_REASONS = (
    "moe_operator.planner.conditions",
    "moe_operator.planner.conditions.model",
    "moe_operator.planner.conditions.progress",
    "moe_operator.planner.conditions.readiness",
    "moe_operator.planner.conditions.sentences",
    "moe_operator.planner.gangs",
    "moe_operator.planner.status_report",
    "moe_operator.observed.problems",
    "moe_operator.autoscaling.reporting",
)
POSITION = {"Verdict": 1, "Problem": 0, "refused": 4}
"""Which argument of a call is the reason."""

BY_PROGRAM = {*problems._FAILED.values(), "SidecarFailed"}
BY_SCHEDULER = {"Unschedulable", "SchedulingGated", "SchedulerError"}
"""PodReason... in k8s.io/api/core/v1: a pod that the scheduler does not place has one of them."""


def constants(expression: ast.expr, module: str) -> Iterator[str]:
    """The texts that an argument can be, as far as it is written out or a constant of the module."""
    if isinstance(expression, ast.Constant):
        yield str(expression.value)
    elif isinstance(expression, ast.Name):
        yield str(getattr(importlib.import_module(module), expression.id, ""))
    elif isinstance(expression, ast.IfExp):
        yield from constants(expression.body, module)
        yield from constants(expression.orelse, module)


def written_out(module: str) -> set[str]:
    """Reasons that calls in a module give."""
    source = importlib.import_module(module).__file__
    assert source is not None
    found = set()
    for node in ast.walk(ast.parse(Path(source).read_text())):
        if isinstance(node, ast.Assign | ast.FunctionDef):
            found.update(_named(node, module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            at = POSITION.get(node.func.id)
            if at is not None and len(node.args) > at:
                found.update(constants(node.args[at], module))
    return {text for text in found if re.fullmatch(r"[A-Z][A-Za-z]+", text)}


def _named(node: ast.Assign | ast.FunctionDef, module: str) -> Iterator[str]:
    """Reasons that a variable, a parameter's default or a module's constant holds for such a call."""
    if isinstance(node, ast.FunctionDef):
        for parameter, default in zip(reversed(node.args.args), reversed(node.args.defaults), strict=False):
            if parameter.arg == "reason":
                yield from constants(default, module)
    elif any(isinstance(target, ast.Name) and target.id in ("reason", "refused") for target in node.targets):
        yield from constants(node.value, module)


def documented(heading: str) -> set[str]:
    """Reasons in the first columns of the tables under a heading."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {reason for cell in cells for reason in re.findall(r"`(\w+)`", cell)}


def test_every_reason_is_documented_and_every_documented_one_exists():
    read_forbidden = "ReadForbidden"
    assert f'"{read_forbidden}")' in (ROOT / "operator/moe_operator/controller/reconcile.py").read_text()
    given = set().union(*map(written_out, GIVES_REASONS))
    unusable = re.findall(r'"(ReportsUnusable)"', Path(sizing.__file__).read_text())
    kinds = set(problems._WAITING.values())
    assert documented("Reasons") == given | kinds | BY_PROGRAM | BY_SCHEDULER | {read_forbidden, *unusable}


def test_every_event_that_is_no_change_of_a_condition_is_documented():
    told = {reason for path in (ROOT / "operator/moe_operator").rglob("*.py") for reason in decided(path)}
    assert documented("Events") == told | {why.value for why in Why}


def decided(path: Path) -> Iterator[str]:
    """Reasons that a module gives to decisions, as far as they are written out."""
    module = ".".join(path.relative_to(ROOT / "operator").with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Decision":
            yield from constants(node.args[0], module)
