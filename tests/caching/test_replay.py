"""`moe replay --cache` on small traces whose outcome can be worked out by hand."""

import gzip
import json
import lzma
import struct

import pytest
from click.testing import CliRunner

from moe_cli.main import main


def run(*arguments):
    return CliRunner().invoke(main, ["replay", "--cache", *map(str, arguments)])


def document(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def blocks(tmp_path):
    path = tmp_path / "blocks.jsonl.gz"
    requests = [([1, 2, 3], 1500), ([1, 2, 4], 1400), ([5], 100), ([1, 2, 3], 1500)]
    with gzip.open(path, "wt") as file:
        for index, (ids, tokens) in enumerate(requests):
            record = {"timestamp": index, "input_length": tokens, "output_length": 9, "hash_ids": ids}
            file.write(json.dumps(record) + "\n")
    return path


def test_blocks_are_counted_with_what_has_to_be_computed_again(blocks):
    made = document(blocks, "--capacity", 3)
    assert (made["requests"], made["lookups"], made["keys"], made["blocks"]) == (4, 10, 5, True)
    assert made["ceiling"]["hits"] == 5
    # LRU: 1 2 3 | 1 2 hit, 4 for 3 | 5 for 1 | 1 for 2, 2 for 4, 3 for 5
    assert made["cache"]["lru"] == {
        "hits": 2,
        "block_hit_share": 0.2,
        "evictions": 5,
        "gap_closed": 0.0,
        "recomputed_tokens": 1500 + (1400 - 933) + 100 + 1500,
        "recomputed_positions": made["cache"]["lru"]["recomputed_positions"],
    }
    assert made["cache"]["belady"]["hits"] == 4
    assert made["cache"]["belady"]["gap_closed"] == 1
    assert list(made["cache"]) == ["lru", "lru2", "s3fifo", "sieve", "arc", "moe", "belady"]


def test_objects_come_as_binary_keys_or_as_lines(tmp_path):
    keys = [7, -8, 9, 7, -8, 7]
    binary, text = tmp_path / "keys.trace.xz", tmp_path / "keys.txt"
    binary.write_bytes(lzma.compress(struct.pack(">6i", *keys)))
    text.write_text("".join(f"{key}\n" for key in keys))
    first, second = document(binary, "--capacity", 2), document(text, "--capacity", 2)
    assert first["cache"] == second["cache"]
    assert first["cache"]["lru"]["hits"] == 1
    assert first["cache"]["belady"]["hits"] == 2
    assert first["blocks"] is False


def test_people_get_a_table_and_scripts_the_same_bytes_again(blocks):
    result = run(blocks)
    assert result.exit_code == 0, result.output
    assert "Belady" in result.stdout
    assert run(blocks, "--json").stdout == run(blocks, "--json").stdout


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the trace has no keys"),
        (b"\x00\x01\x02", "the trace has no keys"),
        (b'{"hash_ids": 3}\n', "hash_ids is missing"),
        (b'{"hash_ids": [[]]}\n', "neither a number nor a text"),
        (b'{"hash_ids": [1], "output_length": -1}\n', "output_length is -1"),
        (b'{"hash_ids": [1]}\n{\n', "trace:2: not JSON"),
        (b'{"hash_ids": ' + b"[" * 200_000, "trace:1: not JSON"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "trace"
    path.write_bytes(content)
    result = run(path)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("capacity", "sentence"),
    [
        ("0", "not in the range x>0"),
        ("2.5", "whole number of 1 or more"),
        ("nan", "not a finite number"),
    ],
)
def test_a_capacity_is_a_whole_number(blocks, capacity, sentence):
    result = run(blocks, "--capacity", capacity)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


def test_a_cache_saves_the_replicas_that_its_hits_would_have_kept_busy(tmp_path):
    """Every prompt comes twice in a second; prompt and answer are 600 tokens, 400 of them shared."""
    path = tmp_path / "half.jsonl"
    lines = []
    for number in range(40 * 60 // 2):
        ids = [1, 2, 3, 4, 100 + number]
        for second in (0.0, 0.9):
            at = 1000 * (2 * number + second)
            record = {"timestamp": at, "input_length": 500, "output_length": 100, "hash_ids": ids}
            lines.append(json.dumps(record))
    path.write_text("\n".join(lines))
    result = run(path, "--capacity", 50, "--json")
    made = json.loads(result.stdout)["replicas"]
    assert result.stderr.count("forecasting: 100 % (195 of 195)") == 1  # 39 minutes of five caches
    assert list(made) == ["none", "outputs", "lru", "moe", "belady"]
    assert made["none"]["work_share"] == 1
    assert made["outputs"]["work_share"] == pytest.approx(0.5, abs=0.01)
    assert made["lru"]["work_share"] == pytest.approx((200 + 100) / 1200, abs=0.01)
    assert made["outputs"]["mean"] == pytest.approx(made["none"]["mean"] / 2, rel=0.1)
    assert made["lru"]["mean"] < made["outputs"]["mean"] < made["none"]["mean"]
    assert made["none"]["peak"] >= 10


def test_replicas_are_unknown_where_a_trace_has_no_times(blocks, tmp_path):
    assert document(blocks)["replicas"] is None  # of three milliseconds
    keys = tmp_path / "keys.txt"
    keys.write_text("1\n2\n1\n")
    assert document(keys)["replicas"] is None
