"""The source of each document of docs-corpus (examples/docs-moe/README.md) by its form: it has no labels.

python -m benchmarks.docs_sources TEXT > labels.txt     # one a line, for `moe-worker train --domains`
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from benchmarks.commands import run
from moe_worker.train.data import read_documents

_RULES = (
    ("debian-handbook", re.compile(r"Debian Administrator's Handbook|^Download the ebook")),
    ("postgresql", re.compile(r"Prev\u00a0|\u00a0Next\n|PostgreSQL 15")),
    ("manpages", re.compile(r"\A['.]\\\"|\A\.(TH|so) |^\.TH ", re.MULTILINE)),
    ("git", re.compile(r"\A(git|scalar)[\w{}-]*\(?\d?\)?\n=+\n|linkgit:|\A= Git|\A[^\n]*\bGIT\b")),
    ("devicetree", re.compile(r"Required [\w ]*properties|^\s*-? ?compatible\b", re.MULTILINE)),
    (
        "python",
        re.compile(
            r"(?<![a-z]):(mod|class|func|meth|pep|keyword|term|exc):`|version(added|changed)::|c:function::"
        ),
    ),
)


def source_of(document: str) -> str:
    """The first rule that fits; everything else comes from linux-doc."""
    head = document[:4000]
    for name, pattern in _RULES:
        text = document if name in ("python", "devicetree") else head
        if pattern.search(text):
            return name
    return "kernel"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="the documents, as `moe-worker train --data` takes them")
    print("\n".join(source_of(document) for document in read_documents(parser.parse_args().text)))


if __name__ == "__main__":
    run(main)
