"""Documents point to files that exist."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
PAGES = LISTED.stdout.split() or ["README.md"]
BELOW = ("", "operator", "operator/moe_operator", "worker/moe_worker", "protos/moe_api")
"""Folders to which paths in architecture.md are relative."""
OTHERS = {"spec.schedulerName", "spec.config.env"}
"""Fields of other kinds that pages name: of pods, and of OLM's Subscription."""


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    broken = [
        link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert not broken


def headings(page):
    """The anchors of a page, as GitHub makes them from headings."""
    text = re.sub(r"(?s)```.*?```", "", (ROOT / page).read_text(encoding="utf-8"))
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).strip().lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def links(page):
    """Pages of the project and sections to which a page links."""
    for path, section in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", (ROOT / page).read_text("utf-8")):
        target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        if "://" not in path and target.suffix == ".md":
            yield str(target.relative_to(ROOT)), section


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_section(page):
    assert not [(to, section) for to, section in links(page) if section and section not in headings(to)]


def test_the_readme_leads_to_every_page():
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = {to for page in new for to, _ in links(page)} - reached
    pages = {page for page in PAGES if page.startswith("docs/") and not page.startswith("docs/adr/")}
    assert pages - reached == set(), "the folder docs/adr is linked as a whole"


@pytest.mark.parametrize(
    ("heading", "package"),
    [
        ("Operator", "operator/moe_operator"),
        ("Frontend", "operator/moe_frontend"),
        ("Worker", "worker/moe_worker"),
    ],
)
def test_every_background_loop_is_named_in_the_page_about_metrics(heading, package):
    text = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / package).rglob("*.py"))
    loops = {"metrics", *re.findall(r"start(?:_thread|_once)?\(\s*\"([\w -]+)\"", sources)}
    assert len(loops) > 3
    assert [loop for loop in sorted(loops) if f"`{loop}`" not in section] == []


def test_the_table_of_changes_names_files_that_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+[\w./-]*)`", text)
    assert len(named) > 60
    assert not [path for path in named if not any((ROOT / folder / path).exists() for folder in BELOW)]


@pytest.fixture(scope="module")
def deployment():
    """The schema of a MoEDeployment."""
    text = (ROOT / "crds/moedeployments.yaml").read_text("utf-8")
    crds = [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]
    (crd,) = (each for each in crds if each["spec"]["names"]["kind"] == "MoEDeployment")
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def unknown(value, schema, path=""):
    """Fields of a manifest that its schema does not have, or whose value it does not list."""
    free = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(value, list):
        for each in value:
            yield from unknown(each, schema.get("items", {}), path)
    elif isinstance(value, dict) and not free:
        fields, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, part in value.items():
            if key not in fields and not others:
                yield f"{path}.{key}"
            yield from unknown(
                part, fields.get(key) or (others if isinstance(others, dict) else {}), f"{path}.{key}"
            )
    elif value not in schema.get("enum", [value]):
        yield f"{path}: {value}"


@pytest.mark.parametrize("page", [page for page in PAGES if page == "README.md" or page.startswith("docs/")])
def test_documents_name_fields_that_a_deployment_has(page, deployment):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        each for block in re.findall(r"(?s)```yaml\n(.*?)```", text) for each in yaml.safe_load_all(block)
    ]
    specs = [
        each["spec"]
        for each in found
        if each.get("kind", "MoEDeployment") == "MoEDeployment" and "spec" in each
    ]
    for named in set(re.findall(r"`((?:spec|status)(?:\.[a-zA-Z]+)+)`", text)) - OTHERS:
        schema = deployment
        for key in named.split("."):
            schema = schema.get("items", schema)
            others = schema.get("additionalProperties")
            assert key in schema.get("properties", {}) or others, f"a MoEDeployment has no {named}"
            schema = schema.get("properties", {}).get(key) or {}
    assert [field for spec in specs for field in unknown(spec, deployment["properties"]["spec"])] == []


def test_decisions_are_numbered_once_each():
    pages = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    titles = {int(page.name[:4]): page.read_text(encoding="utf-8").splitlines()[0] for page in pages}
    assert not [title for number, title in titles.items() if not title.startswith(f"# {number}. ")]


def test_the_documented_command_runs_every_test_of_a_gpu():
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    [command] = re.findall(r"Correctness on a GPU: `([^`]*)`", text)
    named = [word for word in command.split() if word.startswith("tests/")]
    files = [path for path in (ROOT / "tests").rglob("*.py") if "mark.gpu" in path.read_text("utf-8")]
    marked = {str(path.relative_to(ROOT)) for path in files} - {str(Path(__file__).relative_to(ROOT))}
    assert len(marked) > 2
    assert not [path for path in marked if not path.startswith(tuple(named))]
