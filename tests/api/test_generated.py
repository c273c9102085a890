"""The committed protobuf code is what the .proto files give."""

import os
import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"


def test_generated_code_is_up_to_date(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([PROTOS / "generate.sh", tmp_path], env=environment, check=True, capture_output=True)
    generated = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert generated
    for path in generated:
        committed = PROTOS / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{committed} is stale: run `make proto`"
