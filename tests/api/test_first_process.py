"""Entry points handle SIGTERM before slow imports: the first process of a container has no default action."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPTS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
ENTRIES = {**SCRIPTS, "python -m moe_operator": "moe_operator.__main__:main"}

# A signal that is ignored stays without effect until the process sets a handler, as for PID 1 of a container.
TRAPPED = """
import importlib.machinery, os, signal, sys

class Trap(importlib.machinery.PathFinder):
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and not top.startswith("moe_"):
            os.kill(os.getpid(), signal.SIGTERM)
            sys.exit(f"{name} is imported without a handler of SIGTERM")

signal.signal(signal.SIGTERM, signal.SIG_IGN)
# Before the path finder, behind those of editable installations.
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder), Trap)
from {module} import {function}
sys.argv = ["entry", "--help"]
{function}()
"""


@pytest.mark.parametrize("name", ENTRIES)
def test_sigterm_ends_an_entry_point_that_still_imports(name):
    module, _, function = ENTRIES[name].partition(":")
    code = TRAPPED.replace("{module}", module).replace("{function}", function)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 128 + 15, done.stderr


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_point_says_how_it_is_used(name):
    module, _, function = ENTRIES[name].partition(":")
    code = f"import sys; from {module} import {function}; sys.argv = ['x', '--help']; {function}()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, "Usage:" in done.stdout) == (0, True), done.stderr
