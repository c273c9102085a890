"""Traces of every kind in the shared data, and files that are none."""

import gzip
import json
import lzma

import pytest

from moe_tools.load.trace import read
from moe_tools.recorded import TraceError


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_counts_of_intervals(tmp_path):
    text = "time,requests\n2024-05-12 00:00:00,132\n2024-05-12 00:00:10,269\n2024-05-12 00:00:30,5\n"
    trace = read(written(tmp_path, "a.csv", text))
    assert (trace.interval_s, trace.counts.tolist()) == (10, [132, 269, 0, 5])


def test_rates_become_counts(tmp_path):
    trace = read(written(tmp_path, "a.csv", "t,rate\n0,2.5\n600,1\n"))
    assert (trace.interval_s, trace.counts.tolist()) == (600, [1500, 600])


def test_one_request_a_row(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:16:50,9,1\n"
    )
    trace = read(written(tmp_path, "a.csv", text))
    assert trace.at_s.tolist() == pytest.approx([0, 63.31941])
    assert (trace.input_tokens.tolist(), trace.output_tokens.tolist()) == ([374, 9], [44, 1])


@pytest.mark.parametrize(("field", "step"), [("timestamp", 1500), ("timestamp_us", 1_500_000)])
def test_one_request_a_line(tmp_path, field, step):
    lines = [json.dumps({field: i * step, "input_length": 7, "output_length": i}) for i in range(3)]
    trace = read(written(tmp_path, "a.jsonl", "\n".join(lines)))
    assert trace.at_s.tolist() == pytest.approx([0, 1.5, 3.0])
    assert trace.output_tokens.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path, suffix, pack):
    path = tmp_path / f"a.csv{suffix}"
    path.write_bytes(pack(b"time,requests\n0,1\n60,2\n"))
    assert read(path).counts.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "a.csv: its first line is ''"),
        ("a.csv", "when,requests\n0,1\n", "a.csv: its first line is 'when,requests'"),
        ("a.csv", "time,requests\n", "a.csv: no requests"),
        ("a.csv", "time,requests\n0,1\n10,many\n", "a.csv:3: 'many' is not a number of 0 or more"),
        ("a.csv", "time,requests\n0,1\n10,-2\n", "a.csv:3: '-2' is not a number of 0 or more"),
        ("a.csv", "time,requests\n0,1\n10,nan\n", "a.csv:3: 'nan' is not a number of 0 or more"),
        ("a.csv", "time,requests\n0,1\n0,1\n", "each later than the one above"),
        ("a.csv", "time,requests\n0,1\nsoon,2\n", "a.csv:3: 'soon' is not a time"),
        ("a.csv", "time,requests\n10,1\n0,2\n", "each later than the one above"),
        ("a.csv", "time,requests\n0,1\n", "needs two rows or more"),
        ("a.csv", "time,requests\n0,1\n1,1\n1e12,1\n", "more than 10,000,000 intervals of 1 s; correct them"),
        ("a.csv", "time,input_tokens\n10,1\n0,1\n", "a.csv:3: its time is before the line's above"),
        (
            "a.csv",
            "time,requests\n0,1\n10,1e300\n",
            "a.csv:3: '1e300' is not a number of 0 or more, 1e+18 at most",
        ),
        (
            "a.csv",
            "time,input_tokens\n0,1e19\n",
            "a.csv:2: '1e19' is not a number of 0 or more, 1e+18 at most",
        ),
        (
            "a.jsonl",
            f'{{"timestamp": 0, "input_length": {"9" * 400}}}\n',
            f"a.jsonl:1: {'9' * 60} is not a number of 0 or more, 1e+18 at most",
        ),
        ("a.csv", "time,input_tokens\n0,-1\n", "a.csv:2: '-1' is not a number of 0 or more"),
        (
            "a.csv",
            f"time,requests\n0,1\n1,{'1' * 200_000}\n",
            "a.csv:3: not CSV: field larger than",
        ),
        ("a.csv", f"time,requests\n{'x' * 1000},1\n", f"a.csv:2: '{'x' * 59} is not a time"),
        ("a.jsonl", '{"timestamp": 0}\n{oops\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", f'{{"timestamp": {"[" * 200_000}\n', "a.jsonl:1: not JSON: maximum recursion depth"),
        ("a.jsonl", '{"timestamp": 0}\n[]\n', "a.jsonl:2: a line is one request"),
        ("a.csv.gz", "not packed", "a.csv.gz: Not a gzipped file"),
    ],
)
def test_what_is_no_trace_is_said_with_its_place(tmp_path, name, text, sentence):
    with pytest.raises(TraceError) as caught:
        read(written(tmp_path, name, text))
    assert sentence in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TraceError, match="No such file or directory"):
        read(tmp_path / "none.csv")
