"""The command line: what it says when something is wrong, and how quickly it helps."""

import subprocess
import sys

import pytest

from tests.worker.serving import COMMAND


def run(*arguments):
    return subprocess.run(
        [*COMMAND, *(it if isinstance(it, bytes) else str(it) for it in arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def failure(*arguments):
    """The sentence and the exit code of a command that fails."""
    done = run(*arguments)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: "), done.returncode


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"]])
def test_help_and_the_process_of_the_rpc_edge_need_no_torch(command):
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {command}\n"
    code += "from moe_worker.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "serve" in done.stdout


def test_without_a_command_the_help_is_printed():
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert "\n  serve " in done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--context-length", "5000"], "context length 5000 is too long"),
        (["--kv-memory", "lots"], "--kv-memory 'lots' is not a size; write bytes as 2Gi"),
        (["--kv-offload", "8GB"], "--kv-offload '8GB' is not a size; write bytes as 2Gi"),
        (["--kv-memory", "9" * 400 + ".5"], "is not a size; write bytes as 2Gi"),
        (["--kv-memory", "1Ki"], "KV memory of 1024 bytes is too small"),
        (["--max-batch-size", "0"], "0 is not in the range 1<=x<=65536"),
        (["--kv-memory", "1000000000Ti"], "kv_memory is 1099511627776000000000; it must be a number from 1"),
        (["--grace", "nan"], "nan is not a finite number"),
        (["--served-name", b"\xff"], "--served-name '\\udcff' is not text"),
        (["--served-name", "m" * 254], "the served name has 254 characters; use 253 at most"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--listen", "127.0.0.1"], "'127.0.0.1' is not HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "'127.0.0.1:99999' is not HOST:PORT"),
        (["--listen", "256.1.1.1:1"], "cannot listen on 256.1.1.1:1; give a free HOST:PORT"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_flag_is_told_in_the_last_line(checkpoint, flags, sentence):
    text, code = failure("serve", "--model", checkpoint, "--listen", "127.0.0.1:0", *flags)
    assert sentence in text
    assert code == 2


def test_a_broken_checkpoint_is_told_in_the_last_line(checkpoint, tmp_path):
    """Found by the engine process: its sentence crosses over to the worker's last line."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    text, code = failure("serve", "--model", tmp_path, "--listen", "127.0.0.1:0")
    assert text.startswith(f"{weights} is truncated or damaged")
    assert code == 2


def test_a_missing_checkpoint_is_told_in_the_last_line(tmp_path):
    text, code = failure("serve", "--model", tmp_path / "gone", "--listen", "127.0.0.1:0")
    assert text == f"{tmp_path / 'gone'} does not exist; the model must be a checkpoint directory"
    assert code == 2
