"""The images, without a container engine: the Dockerfile's steps on exactly the files that it copies.

Steps that install Debian's packages are left out; the compiler is this machine's. `pip` is uv here, which
links packages from its cache instead of copying 5 GB.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.packaging import dockerfile

ROOT = Path(__file__).parents[2]
STAGES = dockerfile.read(ROOT / "Dockerfile")
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

pytestmark = pytest.mark.timeout(900)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@dataclass(frozen=True)
class Container:
    """A directory instead of a stage's root, with an environment of its own instead of its Python."""

    root: Path

    def run(self, command, **variables):
        """Runs a shell command; absolute paths of the stage are paths below `root`."""
        here = re.sub(r"(?<![\w.])/(dist|requirements)\b", rf"{self.root}/\1", command)
        outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
        own = {
            "PATH": f"{self.root}/shims:{self.root}/python/bin:/usr/bin:/bin",
            "VIRTUAL_ENV": f"{self.root}/python",
            "HOME": os.environ.get("HOME", "/root"),  # where uv's cache is
        }
        return subprocess.run(
            ["sh", "-c", here],
            cwd=self.root,
            env=outer | variables | own,
            capture_output=True,
            text=True,
            check=False,
        )


def container(root, stage):
    """A stage before its first RUN step: the files that it copies, and a Python with nothing installed."""
    dockerfile.copy(stage, ROOT, root)
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, root / "python"], check=True)
    shim = root / "shims" / "pip"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{UV}" pip "$@"\n')
    shim.chmod(0o755)
    return Container(root)


def run_steps(made, stage, **variables):
    """Runs the RUN steps but those of apt-get; the last one's result."""
    for command in dockerfile.commands(stage):
        if not command.startswith("apt-get"):
            result = made.run(command, **(dockerfile.environment(stage) | variables))
            if result.returncode:
                break
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Compiled without optimisation, in a fifth of the time; everything else is as in the image."""
    made = container(tmp_path_factory.mktemp("wheel"), STAGES["wheel"])
    quick = made.root / "shims" / "g++"
    quick.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n')
    quick.chmod(0o755)
    result = run_steps(made, STAGES["wheel"])
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = (made.root / "dist").glob("*.whl")
    return found


def test_every_image_starts_from_one_base_that_is_named_by_its_digest():
    outside = {stage.base for stage in STAGES.values()} - STAGES.keys()
    assert len(outside) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", outside.pop())


def test_a_worker_on_a_gpu_has_the_c_compiler_that_triton_calls():
    """For its interface to the driver, at the first launch of a kernel."""
    (install,) = (c for c in dockerfile.commands(STAGES["worker"]) if c.startswith("apt-get"))
    assert {"gcc", "libc6-dev"} <= set(install.split())


def test_the_build_stage_installs_a_compiler():
    (install,) = (c for c in dockerfile.commands(STAGES["wheel"]) if c.startswith("apt-get"))
    assert re.search(r"install .*\bg\+\+", install)


@needs_compiler
def test_the_wheel_holds_compiled_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"moe_worker/kernels/cpu/lib/moe_cpu_\w+\.so", name) for name in names)


def test_the_build_fails_where_the_kernels_cannot_be_compiled(tmp_path):
    made = container(tmp_path, STAGES["wheel"])
    broken = tmp_path / "shims" / "g++"
    broken.write_text("#!/bin/sh\necho 'x.h:1: error: nothing works' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = run_steps(made, STAGES["wheel"])
    assert result.returncode
    assert "kernels cannot be built" in result.stderr + result.stdout
    assert "nothing works" in result.stderr + result.stdout
    assert list(tmp_path.glob("dist/*")) == []

    result = run_steps(made, STAGES["wheel"], MOE_CPU_KERNELS="optional")
    assert result.returncode == 0, result.stderr
    (found,) = tmp_path.glob("dist/*-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(found).namelist())

    result = run_steps(made, STAGES["wheel"], MOE_CPU_KERNELS="yes")
    assert result.returncode
    assert "MOE_CPU_KERNELS is 'yes': set it to require or optional" in result.stderr + result.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("image", "programs", "check"),
    [
        ("operator", ["moe", "moe-frontend"], "import moe_operator.main, moe_tools.replay.command"),
        (
            "worker",
            ["moe-worker"],
            "import moe_worker.engine.loading; from moe_worker.kernels.cpu import build;"
            "assert build.find_or_build().parent == build.PACKAGED",
        ),
    ],
)
def test_an_image_runs_its_programs(wheel, tmp_path, image, programs, check):
    stage = STAGES[image]
    made = container(tmp_path, stage)
    shutil.copytree(wheel.parent, tmp_path / "dist")
    result = run_steps(made, stage, **dockerfile.environment(STAGES["base"]))
    assert result.returncode == 0, result.stdout + result.stderr
    (command,) = map(json.loads, stage.arguments("CMD"))
    for words in (command, *([program, "--help"] for program in programs)):
        helped = made.run(" ".join(words))
        assert (helped.returncode, helped.stdout[:6]) == (0, "Usage:"), helped.stderr
    imported = made.run(f"python -c '{check}'")
    assert imported.returncode == 0, imported.stderr

    extra = made.run(f'pip install --offline --dry-run "$(echo /dist/*.whl)[{image}]"')
    assert "Would install" not in extra.stderr, extra.stderr
    assert extra.returncode == 0, extra.stderr
