"""Checks the project's words: phrases that docs/style.md replaces by a standard term, and commit subjects.

`make lint` runs it; `--message FILE` checks one commit message. It reads prose only: Markdown, comments,
docstrings and string literals, no identifiers. It prints one line a finding and exits with 1 if there is any.
"""

import ast
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BASE = "80c274bb8ff7"
"""Commits after this one must have a subject as CONTRIBUTING.md asks."""

GENERATED = (
    "*_pb2*",
    "requirements/*",
    "charts/install.yaml",
    "*tokenizer.json",
    "tests/operator/previous/*",
)
"""Files that programs write, and the CRD of an earlier version, as fnmatch patterns (`*` crosses folders)."""

_READ = (
    *(".md", ".py", ".proto", ".h", ".cpp", ".go", ".yaml", ".toml", ".sh", ".svg", ".json"),
    *("Makefile", "Dockerfile"),
)


@dataclass(frozen=True)
class Rule:
    """A phrase (regular expression; a space matches any white space), and the term to write instead."""

    phrase: str
    say: str
    only: str = "*"
    """The files where the phrase has the meaning that the rule is about."""


RULES = (
    Rule(
        r"(?:a|an|one|each|every|first|second|next|last|earlier|later|another|no) looks?(?! like)",
        "reconcile",
    ),
    Rule(r"(?:is|are|was|were|be|been) looked at", "reconcile, check, read"),
    Rule(r"looks? again", "reconcile again"),
    Rule(r"(?:another|one|this|each|every|a|the next) turn(?! of)", "reconcile, forward pass"),
    Rule(r"put(?:s|ting)? back|PutBack", "drift corrected"),
    Rule(r"gave way|g[io]v(?:e|es|en|ing) way", "is preempted, is deleted first"),
    Rule(r"(?:pods?|replicas?|workers?|frontends?|leaders?) answers?", "is ready, responds"),
    Rule(r"(?:pods?|replicas?|workers?|frontends?|nodes?) (?:is|are) there", "exists, is ready"),
    Rule(r"not there yet", "not available yet, planned"),
    Rule(
        r"what leaves|(?:pods?|replicas?|workers?)(?: that)? (?:leaves?|leaving)(?: first)?",
        "terminating, drains",
    ),
    Rule(r"whole[- ]pass(?:es)?", "forward pass"),
    Rule(r"passes with prompts|pass that holds|(?:decode|mixed|recorded) pass(?:es)?", "step"),
    Rule(r"experts? at work", "activated experts"),
    Rule(r"alike", "identical, the same, equally"),
    Rule(r"beside", "next to; compared with; in addition to"),
    Rule(r"peers?", "baseline; the other end"),
    Rule(r"slices?", "KV splits", "worker/moe_worker/kernels/triton/attention.py"),
    Rule(r"(?:un)?widen(?:s|ed|ing)?", "dequantize", "worker/*"),
    Rule(r"(?:is|are|was|were) unpacked", "dequantize", "worker/*"),
    Rule(r"(?:already|had been) written|tokens? written", "emitted tokens", "*/service/*"),
    Rule(r"line-?ups?", "scheduling policy, batch"),
    Rule(r"to be had|(?:can ?not|could not) be had", "not available"),
    Rule(r"followers?", "watcher"),
    Rule(r"mirror(?:s|ed)?", "cache, informer"),
)


@dataclass(frozen=True)
class Allowed:
    """A phrase that is right in some files, and why."""

    files: str
    phrase: str
    why: str


ALLOWED = (
    Allowed("operator/moe_frontend/outputs/*", "followers", "requests that share one computation"),
    Allowed("localcluster/netlink.py", "peer", "the kernel's name for the other end of a veth pair"),
    Allowed("benchmarks/*", "shared/peers|--peers|peers none", "the folder and the option have this name"),
    Allowed("tests/operator/test_rewritten.py", "mirror.example", "the host of an image"),
    Allowed("benchmarks/*", "^peer$|^peers$|{peer:", "the field of --json and the folder have this name"),
    Allowed("CHANGELOG.md", "`PutBack` is", "it names the reason that was renamed"),
    Allowed("docs/style.md", ".*", "it lists the phrases"),
    Allowed(".ci/language.py", ".*", "it lists the phrases"),
    Allowed("tests/packaging/test_language.py", ".*", "it tests the phrases"),
)


@dataclass(frozen=True)
class Finding:
    """A phrase in a file."""

    path: str
    line: int
    phrase: str
    say: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.phrase!r}: write {self.say!r} (docs/style.md)"


def main() -> int:
    """Checks the checkout that this file lies in."""
    root = Path(__file__).resolve().parents[1]
    found = [str(each) for path in files(root) for each in check(path, (root / path).read_text("utf-8"))]
    subjects = commit_subjects(root, BASE)
    if isinstance(subjects, str):
        print(f"commit subjects are not checked: {subjects}")
    else:
        found += [
            f"commit {name}: {subject!r}: {why}" for name, subject in subjects if (why := wrong(subject))
        ]
    print("\n".join(found) or "language: no findings")
    return bool(found)


def message(path: Path) -> int:
    """Checks the subject in git's file of a commit message: the hook commit-msg."""
    subject = path.read_text(encoding="utf-8").partition("\n")[0]
    why = wrong(subject)
    if why:
        print(f"commit subject {subject!r}: {why} (docs/style.md)")
    return bool(why)


def files(root: Path) -> list[str]:
    """The files with prose, relative to `root`; without git, all below it but those of hidden folders."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() or [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and ".venv" not in path.parts
    ]
    return [name for name in names if name.endswith(_READ) and not _any(name, GENERATED)]


def check(path: str, text: str) -> list[Finding]:
    """Every phrase of RULES in the prose of a file, less those that ALLOWED names."""
    allowed = [each.phrase for each in ALLOWED if fnmatch.fnmatch(path, each.files)]
    found = []
    for begin, block in prose(path, text):
        for rule in RULES:
            if not fnmatch.fnmatch(path, rule.only):
                continue
            phrase = rule.phrase.replace(" ", r"\s+")
            for match in re.finditer(rf"(?i)(?<![\w./-])(?:{phrase})(?![\w-])", block):
                around = " ".join(block[max(0, match.start() - 60) : match.end() + 60].split())
                if not any(re.search(f"(?i){each}", around) for each in allowed):
                    line = begin + block.count("\n", 0, match.start())
                    found.append(Finding(path, line, " ".join(match.group().split()), rule.say))
    return sorted(found, key=lambda each: each.line)


def prose(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Blocks of prose with the number of their first line; a sentence that is wrapped stays in one block."""
    if path.endswith(".py"):
        yield from _python(text)
    elif path.endswith((".h", ".cpp", ".go", ".proto")):
        yield from _comments((number, line) for number, line in _marked(text, "//"))
    else:
        yield 1, re.sub(r"(?m)^(\s*)#", r"\1 ", text)


def _python(text: str) -> Iterator[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield from _comments(
        (it.start[0], it.string.lstrip("# ")) for it in tokens if it.type == tokenize.COMMENT
    )
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _marked(text: str, mark: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if mark in line:
            yield number, line.split(mark, 1)[1].lstrip("/ ")


def _comments(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Joins comments of consecutive lines."""
    begin, block = 0, list[str]()
    for number, line in lines:
        if block and number != begin + len(block):
            yield begin, "\n".join(block)
            block = []
        if not block:
            begin = number
        block.append(line)
    if block:
        yield begin, "\n".join(block)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def commit_subjects(root: Path, base: str) -> list[tuple[str, str]] | str:
    """Name and subject of each commit after `base`, or why they are not known: no git, or a shallow clone."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{base}^{{commit}}"], cwd=root, capture_output=True, text=True, check=False
    )
    if known.returncode:
        return f"the history up to {base} is not available (no git repository, or a shallow clone)"
    log = ["git", "log", "--no-merges", "--format=%h %s", f"{base}..HEAD"]
    lines = subprocess.run(log, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(name, subject) for name, _, subject in (line.partition(" ") for line in lines)]


_SUBJECT = re.compile(r"[\w.*/-]+(?:, [\w.*/-]+)*: (?P<verb>[\w-]+) \S.*")
_NOT_IMPERATIVE = re.compile(r"\w+(?:ed|ing|[^su]s)")
_IMPERATIVE = {
    "bring",
    "embed",
    "exceed",
    "feed",
    "need",
    "proceed",
    "seed",
    "shed",
    "speed",
    "succeed",
    "bias",
}


def wrong(subject: str) -> str:
    """What is wrong with a commit's subject, or an empty text."""
    if len(subject) > 72:
        return f"{len(subject)} characters; at most 72"
    match = _SUBJECT.fullmatch(subject)
    if not match:
        return "not of the form `scope: imperative verb ...`"
    verb = match["verb"].lower()
    if verb not in _IMPERATIVE and _NOT_IMPERATIVE.fullmatch(verb):
        return f"{verb!r} is not an imperative verb"
    return ""


if __name__ == "__main__":
    sys.exit(message(Path(sys.argv[2])) if sys.argv[1:2] == ["--message"] else main())
