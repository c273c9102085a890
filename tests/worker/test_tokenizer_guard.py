"""Tokenizers that would take a serving process's time or memory are refused by a child with limits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

import moe_worker
from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2
from moe_worker.bench.cli import bench
from moe_worker.config.directory import read_checkpoint_config
from moe_worker.errors import TokenizerError
from moe_worker.models import tokenizer_guard
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.models.tokenizer_guard import load_guarded
from moe_worker.train.data import read_tokenizer
from moe_worker.train.evaluate import score_checkpoint
from tests.worker.serving import Worker

EXAMPLE = Path(__file__).parents[2] / "examples" / "docs-moe"


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@pytest.fixture
def brief(monkeypatch):
    """The same limit, of 1 s instead of 4."""
    monkeypatch.setattr(tokenizer_guard, "CPU_S", 1)


BOMBS = {
    "a normalizer that doubles": {
        "normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa") for _ in range(60)]}
    },
    "a normalizer that doubles a rare letter": {
        "normalizer": {"type": "Sequence", "normalizers": [replace("\U0001d11e", "\U0001d11e" * 2)] * 60}
    },
    "a regular expression that backtracks for ever": {"pre_tokenizer": split(r"^(\w+\s?)*$x")},
}


@pytest.fixture
def broken(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def change(directory, **parts):
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_and_this_process_lives(broken, brief, bomb):
    config = read_checkpoint_config(broken)
    change(broken, **BOMBS[bomb])
    with pytest.raises(TokenizerError) as error:
        load_guarded(broken, config)
    assert str(broken / "tokenizer.json") in str(error.value)
    assert "\n" not in str(error.value)


LOADERS = {
    "Engine": lambda folder: moe_worker.Engine(folder, threads=1),
    "bench": lambda folder: bench.main(["--model", str(folder)], standalone_mode=False),
    "eval": lambda folder: score_checkpoint(
        folder, folder / "config.json", context=None, device="cpu", dtype="float32"
    ),
    "training's tokenizer": lambda folder: read_tokenizer(folder / "tokenizer.json"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_has_the_same_guard(broken, brief, loader):
    change(broken, **BOMBS["a normalizer that doubles"])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json needs more than"):
        LOADERS[loader](broken)


def test_a_file_is_tried_once_in_a_process(broken, monkeypatch):
    tried = []
    monkeypatch.setattr(tokenizer_guard, "_tried", set())
    monkeypatch.setattr(tokenizer_guard, "_try", tried.append)
    path = broken / "tokenizer.json"
    for _ in range(2):
        tokenizer_guard.try_tokenizer(path)
    change(broken, decoder=None)
    tokenizer_guard.try_tokenizer(path)
    assert tried == [path] * 2


def test_ordinary_tokenizers_pass_unchanged(checkpoint):
    for directory in (checkpoint, EXAMPLE):
        config = read_checkpoint_config(directory)
        text = "naïve café 日本語 🙂 the quick   brown\n\nfox"
        assert load_guarded(directory, config).encode(text) == Tokenizer.load(directory, config).encode(text)


def test_what_is_wrong_with_the_file_is_said_as_ever(broken):
    config = read_checkpoint_config(broken)
    change(broken, decoder={"type": "Metaspace"})
    with pytest.raises(TokenizerError, match="the decoder must be ByteLevel"):
        load_guarded(broken, config)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer.json is missing"):
        load_guarded(broken, config)


def test_a_worker_refuses_a_bomb_with_a_sentence(broken):
    change(broken, **BOMBS["a normalizer that doubles"])
    program = Path(sys.executable).with_name("moe-worker")
    command = [program, "serve", "--model", broken, "--listen", "127.0.0.1:0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 2
    assert "tokenizer.json needs more than" in ended.stderr.splitlines()[-1]


def test_a_text_that_a_pattern_gives_up_on_is_an_error_not_the_end(broken):
    change(broken, **BOMBS["a regular expression that backtracks for ever"])
    tokenizer = Tokenizer.load(broken, read_checkpoint_config(broken))
    with pytest.raises(TokenizerError, match=r"gives up on the text \(Onig: Regex search error"):
        tokenizer.encode("a" * 2000 + "x")


def test_a_text_that_a_pattern_gives_up_on_is_the_clients_matter_in_every_rpc(broken):
    """The same text fails on every replica and at any time: nothing says to try again."""
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    pieces = [split("(?:(?:qw|wq|q|w)+)+z"), bytes_]
    change(broken, pre_tokenizer={"type": "Sequence", "pretokenizers": pieces})
    with Worker(broken) as worker:
        worker.wait_ready()
        for text in ("qw" * 100, "qw" * 1500):  # checked in the event loop, and in a thread
            tokenize = inference_pb2.TokenizeRequest(text=text)
            generate = inference_pb2.GenerateRequest(prompt=text)
            for field, call in (
                ("text", lambda it=tokenize: worker.inference.Tokenize(it)),
                ("prompt", lambda it=generate: list(worker.inference.Generate(it))),
            ):
                with pytest.raises(grpc.RpcError) as raised:
                    call()
                assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                found = rich_status.from_error(raised.value)
                assert f"{field}: cannot be tokenized: tokenizer.json gives up on the text" in found.message
        assert worker.inference.Tokenize(inference_pb2.TokenizeRequest(text="the quick")).tokens.ids
    assert not any("Traceback" in line for line in worker.lines)
