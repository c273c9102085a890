"""The part of the Dockerfile language that we use, so that its steps can run without a container engine."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One build stage: what it is built from, and its instructions in order."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def arguments(self, instruction: str) -> list[str]:
        return [argument for name, argument in self.steps if name == instruction]


def read(path: Path, arguments: dict[str, str] | None = None) -> dict[str, Stage]:
    """The stages by name. `arguments` are build arguments that take the place of the defaults."""
    values: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in _lines(path.read_text()):
        instruction, _, argument = line.partition(" ")
        argument = argument.strip()
        if instruction == "ARG":
            name, _, default = argument.partition("=")
            values[name] = (arguments or {}).get(name, default)
        if instruction == "FROM":
            base, _, name = argument.partition(" AS ")
            current = stages[name] = Stage(re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], base))
        elif stages:
            current.steps.append((instruction, argument))
    return stages


def environment(stage: Stage, arguments: dict[str, str] | None = None) -> dict[str, str]:
    """The variables that the stage's RUN steps see: its ARGs and ENVs."""
    found: dict[str, str] = {}
    for instruction, argument in stage.steps:
        if instruction in ("ARG", "ENV"):
            pairs = (pair.split("=", 1) for pair in argument.split())
            found |= dict(pairs)
    return found | (arguments or {})


def commands(stage: Stage) -> list[str]:
    """The shell commands of the RUN steps, without their options."""
    return [re.sub(r"^(--\S+\s+)+", "", argument) for argument in stage.arguments("RUN")]


def copy(stage: Stage, source: Path, target: Path) -> None:
    """Does the COPY steps: from `source` into `target`, which stands for the stage's working directory."""
    for argument in stage.arguments("COPY"):
        *names, destination = argument.split()
        folder = target / destination.lstrip("/")
        for name in names:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder, ignore=shutil.ignore_patterns("__pycache__", "lib"))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, folder)


def _lines(text: str) -> list[str]:
    joined = re.sub(r"\\\n", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
