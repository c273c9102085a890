"""The command as a plugin of kubectl."""

import os
import subprocess
import sys
from pathlib import Path

from localcluster.build import ensure


def test_kubectl_finds_the_plugin_and_help_names_it():
    kubectl = ensure(["kubectl"])["kubectl"]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = [kubectl, "moe", "status", "--help"]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: kubectl moe status [OPTIONS] [NAME]\n")
