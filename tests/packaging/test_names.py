"""A class name means one thing, and a package whose docstring lists its modules lists all of them."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = {
    "operator": ["moe_operator", "moe_frontend", "moe_cli", "moe_client", "moe_tools"],
    "protos": ["moe_api"],
    "worker": ["moe_worker"],
    ".": ["localcluster"],
}
SHARED = {
    # OpenAI's own names, once as a client sends them and once as an answer contains them.
    "moe_frontend": {"FunctionCall", "ToolCall"},
}


def classes(package):
    """Names of the top-level classes of a package, each with the modules that define it."""
    found = defaultdict(set)
    for path in package.rglob("*.py"):
        if not path.stem.endswith(("_pb2", "_pb2_grpc")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("folder", "package"), [(folder, package) for folder, packages in TREES.items() for package in packages]
)
def test_no_two_classes_of_a_package_share_a_name(folder, package):
    found = classes(ROOT / folder / package)
    assert found
    shared = {name: sorted(modules) for name, modules in found.items() if len(modules) > 1}
    assert shared.keys() <= SHARED.get(package, set()), shared


def unlisted(package):
    """Modules that the docstring of a package lacks, if it is a list of them: `name  what it is`."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    if not re.search(r"(?m)^[\w, ]*\w {2,}\w", docstring):
        return set()
    return modules - set(re.findall(r"\w+", docstring))


@pytest.mark.parametrize(
    ("folder", "package"), [(folder, package) for folder, packages in TREES.items() for package in packages]
)
def test_a_list_of_modules_is_complete(folder, package):
    packages = [path.parent for path in (ROOT / folder / package).rglob("__init__.py")]
    assert packages
    assert {str(path): missing for path in packages if (missing := unlisted(path))} == {}


def test_a_module_that_is_not_listed_is_found(tmp_path):
    (tmp_path / "__init__.py").write_text('"""Parts.\n\na  the first\n"""')
    for module in ("a", "b"):
        (tmp_path / f"{module}.py").touch()
    assert unlisted(tmp_path) == {"b"}


def test_a_shared_name_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for module in ("a", "b"):
        (tmp_path / f"{module}.py").write_text("class Plan:\n    pass\n")
    assert classes(tmp_path) == {"Plan": {"a.py", "b.py"}}
