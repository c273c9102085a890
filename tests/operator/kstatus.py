"""What the real kstatus library (sigs.k8s.io/cli-utils) makes of objects; built from tests/operator/go."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from localcluster import build
from localcluster.compilation import Program, Source

_SOURCE = Source(Path(__file__).parent / "go", (Program("moe-operator/kstatus", ("kstatus",)),))


@functools.cache
def _executable() -> Path:
    """Cached for all checkouts of a user; the first build takes half a minute."""
    return build.ensure(["kstatus"], source=_SOURCE)["kstatus"]


def kstatus(objects: Iterable[Mapping[str, Any]]) -> list[str]:
    """Current, InProgress, Failed or Terminating for each object as the API server gives it."""
    lines = "".join(f"{json.dumps(one)}\n" for one in objects)
    done = subprocess.run([_executable()], input=lines, capture_output=True, text=True, check=True)
    return [line.partition(" ")[0] for line in done.stdout.splitlines()]
