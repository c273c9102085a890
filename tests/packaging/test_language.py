"""The check of the project's words: the text it reads, what it finds, and clones without a history."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load():
    spec = importlib.util.spec_from_file_location("language", ROOT / ".ci" / "language.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["language"] = module
    spec.loader.exec_module(module)
    return module


language = load()


def found(path, text):
    return [(each.line, each.phrase) for each in language.check(path, text)]


@pytest.mark.parametrize(
    ("path", "text", "line", "phrase"),
    [
        ("docs/a.md", "One.\n\nOne look at a\ndeployment", 3, "One look"),
        ("docs/a.md", "The lowest one gives\nway to others", 1, "gives way"),
        ("a.py", '"""Figures beside a baseline."""\n', 1, "beside"),
        ("a.py", "x = 1\n# The pods that\n# leave first\n", 2, "pods that leave first"),
        ("a.py", 'def f(name):\n    return f"{name} is put back"\n', 2, "put back"),
        ("a.proto", "// Text\n// that had been written\nmessage A {}\n", 1, ""),
        ("a.h", "int x;  // sequences that are alike\n", 1, "alike"),
        ("a.yaml", "key: 1\n# read from a\n# mirror\n", 3, "mirror"),
        ("worker/moe_worker/x.py", "# widened to bf16\n", 1, "widened"),
    ],
)
def test_a_phrase_is_found_with_its_line(path, text, line, phrase):
    assert found(path, text) == ([(line, phrase)] if phrase else [])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", "peer = mirror(beside=1)\n"),
        ("a.go", "peers := mirror(beside)\n"),
        ("docs/a.md", "ClusterKopfPeering, `handlers/mirror.py`, peer-to-peer"),
        ("docs/a.md", "It looks like an error, and we look for its cause."),
        ("operator/x.py", "# the band widens\n"),
    ],
)
def test_identifiers_and_other_meanings_are_free(path, text):
    assert not found(path, text)


@pytest.mark.parametrize(
    "subject",
    [
        "frontend: retry RESOURCE_EXHAUSTED on another replica",
        "operator, cli: process the queue by age",
        "README: bring the figures up to date",
        "docs/adr: seed the list of seams",
    ],
)
def test_subjects_as_they_should_be(subject):
    assert not language.wrong(subject)


@pytest.mark.parametrize(
    ("subject", "why"),
    [
        ("retry on another replica", "scope"),
        ("Frontend retries: on another replica", "scope"),
        ("frontend: retries on another replica", "'retries' is not an imperative verb"),
        ("frontend: retried on another replica", "'retried' is not an imperative verb"),
        ("frontend: Adding a retry", "'adding' is not an imperative verb"),
        ("frontend: " + "x" * 40 + " " + "y" * 40, "91 characters; at most 72"),
    ],
)
def test_subjects_that_are_refused(subject, why):
    assert why in language.wrong(subject)


def test_the_commit_message_hook_reads_the_first_line(tmp_path, capsys):
    written = tmp_path / "COMMIT_EDITMSG"
    written.write_text("frontend: retry once\n\nBody without a scope.\n# comment\n")
    assert language.message(written) == 0
    written.write_text("retry once\n")
    assert language.message(written) == 1
    assert "commit subject 'retry once': not of the form" in capsys.readouterr().out


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Three commits, of which the first is the base."""
    folder = tmp_path / "full"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    for subject in ("base: begin", "docs: write", "Wrong subject"):
        git(folder, "commit", "-q", "--allow-empty", "-m", subject)
    return folder


def test_commits_after_the_base_are_read(repository):
    base = git(repository, "rev-parse", "HEAD~2")
    subjects = [subject for _, subject in language.commit_subjects(repository, base)]
    assert subjects == ["Wrong subject", "docs: write"]


def test_a_clone_without_the_history_says_so(repository, tmp_path):
    base = git(repository, "rev-parse", "HEAD~2")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    assert "shallow clone" in language.commit_subjects(tmp_path / "shallow", base)
    bare = tmp_path / "no-git"
    bare.mkdir()
    assert "no git repository" in language.commit_subjects(bare, base)


def test_every_exception_gives_its_reason_and_is_needed():
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in language.files(ROOT)}
    for each in language.ALLOWED:
        assert each.why
        assert any(language.fnmatch.fnmatch(path, each.files) for path in texts), each
