"""Documents point to files that exist."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
PAGES = LISTED.stdout.split() or ["README.md"]
BELOW = ("", "operator", "operator/moe_operator", "worker/moe_worker", "protos/moe_api")
"""Folders to which paths in architecture.md are relative."""


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    broken = [
        link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert not broken


def test_the_table_of_changes_names_files_that_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+[\w./-]*)`", text)
    assert len(named) > 60
    assert not [path for path in named if not any((ROOT / folder / path).exists() for folder in BELOW)]


def test_decisions_are_numbered_once_each():
    pages = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    titles = {int(page.name[:4]): page.read_text(encoding="utf-8").splitlines()[0] for page in pages}
    assert not [title for number, title in titles.items() if not title.startswith(f"# {number}. ")]
