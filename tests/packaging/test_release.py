"""What a release publishes: the images of docker-bake.json, at a version that everything names."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from moe_operator.resources import names
from tests.packaging import dockerfile

ROOT = Path(__file__).parents[2]
TARGETS = json.loads((ROOT / "docker-bake.json").read_text())["target"]


def test_each_image_is_a_stage_and_has_the_name_that_pods_get_by_default():
    stages = dockerfile.read(ROOT / "Dockerfile")
    assert {target["target"] for target in TARGETS.values()} <= stages.keys()
    tags = {
        tag.replace("${REGISTRY}", "ghcr.io/moe-operator").replace("${VERSION}", "dev")
        for target in TARGETS.values()
        for tag in target["tags"]
    }
    assert tags == {names.DEFAULT_WORKER_IMAGE, names.DEFAULT_OPERATOR_IMAGE}


def test_where_cpu_kernels_are_for_one_kind_of_machine_others_build_without_them():
    for name, target in TARGETS.items():
        optional = target.get("args", {}).get("MOE_CPU_KERNELS") == "optional"
        assert optional or target["platforms"] == ["linux/amd64"], name


@pytest.fixture
def checkout(tmp_path):
    """The files that a release reads and changes."""
    unread = shutil.ignore_patterns("__pycache__")
    for name in (".ci", "operator", "charts", "crds", "pyproject.toml", "CHANGELOG.md"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=unread)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def release(checkout, tag):
    return subprocess.run(
        [checkout / ".ci/release", tag], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_release_names_its_own_images(checkout):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changes = checkout / "CHANGELOG.md"
    changes.write_text(f"## {version}\n\n{changes.read_text()}")
    done = release(checkout, f"v{version}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    chart = checkout / "charts/moe-operator"
    assert f"image: ghcr.io/moe-operator/operator:{version}\n" in (chart / "values.yaml").read_text()
    files = [*(chart / "definitions").glob("*.yaml"), checkout / "charts/install.yaml"]
    crds = [file for file in files if "default: ghcr.io/moe-operator/" in file.read_text()]
    assert len(crds) == 2
    for file in [*crds, checkout / "operator/moe_operator/resources/names.py"]:
        assert f"ghcr.io/moe-operator/worker:{version}" in file.read_text()
        assert not re.search(r"moe-operator/(operator|worker):dev", file.read_text())


def test_a_tag_that_is_not_the_version_is_refused(checkout):
    done = release(checkout, "v9.8.7")
    assert done.returncode == 1
    for file in ("pyproject.toml", "charts/moe-operator/Chart.yaml", "CHANGELOG.md"):
        assert f"{file} has no" in done.stdout
    assert "operator:dev" in (checkout / "charts/moe-operator/values.yaml").read_text()
