"""What we depend on: all that is imported is declared; the lower bounds and the locked versions."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = [
    Requirement(text)
    for text in [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["operator"],
        *PROJECT["optional-dependencies"]["worker"],
    ]
]
PINNED = re.compile(r"^([a-z0-9._-]+)==([^ ;]+)(?: ; ([^\\]+))? \\$", re.MULTILINE)

OPERATOR = ["moe_operator", "moe_frontend", "moe_cli", "moe_client", "moe_tools"]
PARTS = {
    "operator": (["protos/moe_api", *(f"operator/{name}" for name in OPERATOR)], ["operator"]),
    "worker": (["protos/moe_api", "worker/moe_worker"], ["worker", "fetch"]),
    "local": (["localcluster"], ["local"]),
}
"""What each installation has: folders of packages, and extras."""
OPTIONAL = {"transformers", "triton"}
"""The first is only compared with, the second comes with torch where there may be GPUs."""
OURS = {*OPERATOR, "localcluster", "moe_api", "moe_worker"}

IMPORT_ALL = """
import importlib, pkgutil, sys
for root in sys.argv[1:]:
    for module in pkgutil.walk_packages(importlib.import_module(root).__path__, root + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def lower(requirement):
    return next(Version(s.version) for s in requirement.specifier if s.operator == ">=")


def pinned(name):
    """The versions in a lock file; a name has several where they differ between Pythons."""
    found = {}
    for package, version, _ in PINNED.findall((ROOT / "requirements" / f"{name}.txt").read_text()):
        found.setdefault(package, set()).add(Version(version))
    return found


def imported(folder) -> Iterator[str]:
    """Top-level names of all modules that the files of a folder import, also lazily."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


@pytest.mark.parametrize("part", PARTS)
def test_what_is_imported_is_declared(part):
    """Development has everything installed, and an image only this."""
    folders, extras = PARTS[part]
    texts = [*PROJECT["dependencies"], *(t for e in extras for t in PROJECT["optional-dependencies"][e])]
    declared = {Requirement(text).name.lower().replace("_", "-") for text in texts}
    names = {name for folder in folders for name in imported(ROOT / folder)}
    from_outside, brings = names - sys.stdlib_module_names - OURS - OPTIONAL, packages_distributions()
    providers = {name: {found.lower().replace("_", "-") for found in brings[name]} for name in from_outside}
    assert {name for name, found in providers.items() if not found & declared} == set()


def test_the_bounds_reach_what_the_generated_stubs_ask_for_when_they_are_imported():
    text = "".join(path.read_text() for path in (ROOT / "protos").rglob("*_pb2*.py"))
    bounds = {requirement.name: lower(requirement) for requirement in INSTALLED}
    asked = {
        "grpcio": re.findall(r"GRPC_GENERATED_VERSION = '(.+)'", text),
        "protobuf": re.findall(r"Protobuf Python Version: (.+)", text),
    }
    for name, versions in asked.items():
        assert versions, name
        assert bounds[name] >= max(map(Version, versions))


@pytest.mark.parametrize("requirement", INSTALLED, ids=str)
def test_every_bound_is_a_version_that_is_tried(requirement):
    """requirements/lowest.txt is what test_everything_imports_at_the_lowest_versions installs."""
    assert pinned("lowest")[requirement.name.lower()] == {lower(requirement)}


@pytest.mark.parametrize("image", ["operator", "worker", "dist"])
def test_what_is_installed_elsewhere_is_what_was_tested(image):
    tested = pinned("dev")
    assert {name: versions for name, versions in pinned(image).items() if versions - tested[name]} == {}


def test_every_locked_package_has_hashes_and_no_file_names_a_host():
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "://" not in text
        lines = re.sub(r" \\\n", " ", text).splitlines()
        packages = [line for line in lines if line and not line.lstrip().startswith("#")]
        assert packages
        assert [line for line in packages if "--hash=sha256:" not in line] == []


@pytest.mark.parametrize("name", ["dev", "dist", "operator", "worker"])
def test_the_lock_belongs_to_the_project(name):
    """Every direct dependency is locked within its bounds: somebody who changed them ran `make lock`."""
    wanted = [Requirement(t) for t in PROJECT["optional-dependencies"][name] if "moe-operator" not in t]
    locked = pinned(name)
    for requirement in [*(map(Requirement, PROJECT["dependencies"])), *wanted]:
        versions = locked[requirement.name.lower()]
        assert all(requirement.specifier.contains(v, prereleases=True) for v in versions), requirement


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        pytest.param("operator", ["moe_api", *OPERATOR], id="operator"),
        pytest.param("worker", ["moe_api", "moe_worker"], id="worker", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1200)
def test_everything_imports_at_the_lowest_versions(extra, packages, tmp_path):
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    python = tmp_path / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path], check=True)
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("\n".join(PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]))
    lowest = ROOT / "requirements" / "lowest.txt"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, "-r", wanted, "--constraints", lowest],
        check=True,
    )
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("operator", "worker", "protos"))
    subprocess.run([python, "-c", IMPORT_ALL, *packages], env=os.environ | {"PYTHONPATH": paths}, check=True)
    listed = subprocess.run(
        [uv, "pip", "list", "--python", python, "--format", "json"],
        check=True,
        capture_output=True,
        text=True,
    )
    versions = {entry["name"]: Version(entry["version"]) for entry in json.loads(listed.stdout)}
    assert versions["grpcio"] == next(lower(r) for r in INSTALLED if r.name == "grpcio")
