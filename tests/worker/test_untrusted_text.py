"""Texts from outside in what processes print: nothing acts on a terminal, and nothing forges a line."""

import subprocess
import sys
from pathlib import Path

import pytest

HOSTILE = "\x1b]52;c;cm0gLXJm\x07\nerror: forged"


@pytest.mark.parametrize(
    "command",
    [
        ["moe-worker", "serve", "--model", f"/nowhere/{HOSTILE}"],
        ["moe-frontend", "--listen", "127.0.0.1:0", "--deployment", HOSTILE],
    ],
)
def test_a_process_that_cannot_start_says_so_in_one_visible_line(command, tmp_path):
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [program, *command[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"HOME": str(tmp_path), "KUBECONFIG": f"/nowhere/{HOSTILE}"},
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not set(done.stderr) & {"\x1b", "\x07"}
