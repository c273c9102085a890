"""A checkpoint that its own report calls worse than allowed is not served; the sentence has both numbers."""

import json

import pytest
from click.testing import CliRunner

from moe_worker.config.quality import check_quality
from moe_worker.errors import CheckpointError
from moe_worker.service.command import serve


def report(folder, before=1.0, after=1.02, text="valid"):
    values = {"bits_per_byte": {"before": before, "after": after}, "text": text}
    (folder / "quality.json").write_text(json.dumps(values))
    return folder


def test_a_checkpoint_within_its_bound_passes(tmp_path):
    check_quality(report(tmp_path), 0.021, None)
    check_quality(report(tmp_path, after=0.9), 0.0, "valid")


@pytest.mark.parametrize(
    ("changes", "text", "sentence"),
    [
        ({}, None, "needs 1.0200 bits per byte, its original 1.0000; that is 0.0200 more, and at most 0.01"),
        ({"after": 1.0}, "test", "is for the text 'valid'; 'test' is required"),
        ({"after": "much"}, None, "must give bits_per_byte.before and bits_per_byte.after, two numbers"),
        ({"before": float("nan")}, None, "must give bits_per_byte.before"),
    ],
)
def test_what_is_worse_or_not_told_is_refused(tmp_path, changes, text, sentence):
    with pytest.raises(CheckpointError, match=f"quality gate: .*{sentence}"):
        check_quality(report(tmp_path, **changes), 0.01, text)


def test_serve_refuses_before_it_loads(tmp_path):
    arguments = ["--model", str(tmp_path), "--max-bits-per-byte-increase", "0.1"]
    result = CliRunner().invoke(serve, arguments)
    assert isinstance(result.exception, CheckpointError)
    assert "quality.json does not exist" in str(result.exception)
