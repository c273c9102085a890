"""Tests a tokenizer.json in a child process with limits before any other process reads it.

The tokenizers library bounds neither time nor memory of its regular expressions and normalizers. The child
reads the file and tokenizes texts on which such patterns explode: runs of one character, all letters of the
common scripts, and the characters that the patterns name. A pattern that explodes on other texts only is not
found; requests are bounded by their length.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tokenizers

from moe_worker.config.model import ModelConfig
from moe_worker.errors import TokenizerError
from moe_worker.models.tokenizer import LARGEST_TOKENIZER, Tokenizer
from moe_worker.reading import present, read_file

# A vocabulary of 163,000 in a file of 28 MB takes 1.6 s of processor time and 0.3 GB.
CPU_S, MEMORY_BYTES = 4, 3 << 30
# On processors that others use too; nothing in a regular file can make the child wait.
WALL_S = 60.0
_LONG, _SHORT = 2000, 64
_FAILED = 3
_ENVIRONMENT = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


_tried: set[bytes] = set()
"""Digests of the files that this process found to be harmless."""


def load_guarded(directory: Path, config: ModelConfig) -> Tokenizer:
    """Loads a tokenizer after a child process has loaded it. Raises TokenizerError."""
    path = directory / "tokenizer.json"
    if present(path):  # what is missing needs no trial
        try_tokenizer(path)
    return Tokenizer.load(directory, config)


def try_tokenizer(path: Path) -> None:
    """Reads the file and tokenizes texts in a child process, once per content.

    Raises TokenizerError if that exceeds the limits, and CheckpointError if the file cannot be read.
    """
    digest = hashlib.sha256(read_file(path, LARGEST_TOKENIZER)).digest()
    if digest not in _tried:
        _try(path)
        _tried.add(digest)


def _try(path: Path) -> None:
    command = [sys.executable, "-m", __name__, str(path), str(CPU_S)]
    try:
        child = subprocess.run(
            command, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=WALL_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _refused(path, f"more than {WALL_S:g} s") from None
    if child.returncode in {-signal.SIGXCPU, -signal.SIGKILL}:
        raise _refused(path, f"more than {CPU_S} s of processor time or all memory")
    if child.returncode == -signal.SIGABRT:
        raise _refused(path, f"more than {MEMORY_BYTES >> 30} GiB of memory")
    if child.returncode != 0:
        said = child.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise TokenizerError(
            f"{path} makes the tokenizers library fail: {said[:300]}; use the tokenizer.json that the model "
            "was published with"
        )


def _refused(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path} needs {what} to be read and to tokenize {_SHORT} to {_LONG} equal characters; its regular "
        "expressions or normalizers have no bound: use the tokenizer.json that the model was published with"
    )


def main(path: Path, cpu_s: int) -> None:
    """Reads the file and tokenizes the texts, within limits that end the process.

    cpu_s: seconds of processor time. Errors in the file itself are not checked here. Raises the errors of
    the library.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    used_s = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + cpu_s, used_s + cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    content = read_file(path, LARGEST_TOKENIZER)
    try:
        values = json.loads(content)
        inner = tokenizers.Tokenizer.from_buffer(content)
    except Exception:  # noqa: BLE001 - said by Tokenizer.load, which comes after
        return
    for text in texts(values):
        inner.encode(text, add_special_tokens=False)


def texts(values: Any) -> list[str]:
    """Test texts for a tokenizer.json with the content `values`."""
    given = values if isinstance(values, dict) else {}
    patterns = [given.get(part) for part in ("normalizer", "pre_tokenizer")]
    named = {character for text in _strings(patterns) for character in text[:_LONG]}
    printable = {chr(code) for code in range(0x20, 0x7F)}
    letters = "".join(chr(code) for code in range(0xA0, 0x3100))
    runs = [character * _SHORT for character in sorted(printable | named)[:_LONG]]
    pairs = [text[:_SHORT] * (_LONG // _SHORT) for text in _strings(patterns)][:_SHORT]
    return [*(character * _LONG for character in "a0 \n-"), letters, "ab" * _LONG, *runs, *pairs]


def _strings(value: Any) -> list[str]:
    """All texts in a JSON value, at any depth."""
    found: list[str] = []
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list):
            left += item
    return found


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(_FAILED)
