"""What `make demo` says before it starts anything."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "variables", "sentence", "code"),
    [
        (["--help"], {}, "make demo [KEEP=1] [MESH=2x2]", 0),
        (["--keep"], {}, "unrecognized arguments: --keep", 2),
        ([], {"KEEP": "yes"}, "KEEP is 'yes'; write KEEP=1 to keep the cluster running", 1),
        ([], {"MESH": "4"}, "MESH is '4'; write PIPELINExEXPERT, as 2x2", 1),
    ],
)
def test_what_has_no_meaning_is_refused_at_once(words, variables, sentence, code):
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", *words],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **variables},
    )  # fmt: skip
    assert sentence in done.stdout + done.stderr
    assert "==>" not in done.stdout
    assert "stopped" not in done.stdout, "another command may be starting a cluster here"
    assert done.returncode == code
