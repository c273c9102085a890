"""Checkpoints as people have them on disk: what loads, and what is refused with its name and a remedy."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

import moe_worker
from moe_worker.config.directory import find_checkpoint, read_checkpoint_config
from moe_worker.config.quality import check_quality
from moe_worker.errors import InputError
from moe_worker.models.layouts import SINGLE_FILE
from moe_worker.models.safetensors import stored_tensors
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.recipe.parse import read_recipe
from tests.checkpoints import write_checkpoint

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22ed\nsize 12345\n"


@pytest.fixture
def broken(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sharded"), max_shard_size="200KB")


def refuse(directory, *parts):
    with pytest.raises(InputError) as error:
        moe_worker.Engine(directory)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_without_an_index_load_as_with_one(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "model")
    with_index = stored_tensors(directory)
    (directory / "model.safetensors.index.json").unlink()
    assert stored_tensors(directory) == with_index
    moe_worker.Engine(directory)


def test_a_shard_of_a_numbered_set_is_missed_without_an_index_too(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "model")
    (directory / "model.safetensors.index.json").unlink()
    second = sorted(directory.glob("*.safetensors"))[1]
    second.unlink()
    refuse(directory, str(second), "is missing", "copy it too")


def test_a_tensor_in_two_shards_is_refused(broken):
    shutil.move(broken / "model.safetensors", broken / "first.safetensors")
    shutil.copy(broken / "first.safetensors", broken / "second.safetensors")
    refuse(broken, "second.safetensors holds tensor", "which first.safetensors holds too")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pytorch_model.bin", ["pytorch_model.bin is pickled PyTorch files", "save_pretrained"]),
        ("consolidated.safetensors", ["consolidated.safetensors is Mistral's own layout", "model-*"]),
        ("model-q4.gguf", ["is a file for llama.cpp"]),
        ("adapter_model.safetensors", ["LoRA adapter", "merge"]),
    ],
)
def test_weights_in_another_form_are_named(broken, name, parts):
    shutil.move(broken / "model.safetensors", broken / name)
    refuse(broken, *parts)


def test_fused_experts_are_named(broken):
    tensors = load_file(broken / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    experts = "model.layers.1.mlp.experts"
    rest[f"{experts}.gate_up_proj"] = tensors[f"{experts}.0.up_proj.weight"].new_zeros(8, 64, 64)
    save_file(rest, broken / "model.safetensors")
    refuse(broken, "in one tensor", f"{experts}.gate_up_proj", "save_pretrained")


def test_tensors_with_names_of_another_layout_are_named(broken):
    tensors = load_file(broken / "model.safetensors")
    save_file({"layers.0.attn.wq_a.weight": tensors["model.norm.weight"]}, broken / "model.safetensors")
    refuse(broken, "layers.0.attn.wq_a.weight", "Hugging Face layout")


def test_modelopt_describes_what_it_quantized_in_its_own_file(broken):
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (broken / "hf_quant_config.json").write_text(json.dumps(described))
    refuse(broken, "hf_quant_config.json", "'NVFP4'", "BF16")


def test_modelopt_that_quantized_only_the_cache_is_no_reason(broken):
    described = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (broken / "hf_quant_config.json").write_text(json.dumps(described))
    read_checkpoint_config(broken)


def test_only_a_tiktoken_model(broken):
    shutil.move(broken / "tokenizer.json", broken / "tiktoken.model")
    refuse(broken, "tokenizer.json is missing", "tiktoken.model cannot be read", "backend_tokenizer.save")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer(broken, name):
    (broken / name).write_text(LFS)
    refuse(broken, f"{name} is a Git LFS pointer", "git lfs pull")


class Cache:
    """A Hugging Face cache as huggingface_hub lays it out: files in blobs/, links in snapshots/COMMIT/."""

    def __init__(self, checkpoint, folder):
        self.root = folder / "models--someone--tiny"
        self.snapshot = self.root / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        self.snapshot.mkdir(parents=True)
        (self.root / "blobs").mkdir()
        (self.root / "refs").mkdir()
        (self.root / "refs" / "main").write_text(self.snapshot.name)
        for number, path in enumerate(checkpoint.iterdir()):
            shutil.copy(path, self.root / "blobs" / f"{number:064}")
            (self.snapshot / path.name).symlink_to(f"../../blobs/{number:064}")


def test_a_hugging_face_cache(checkpoint, tmp_path):
    cache = Cache(checkpoint, tmp_path)
    given = snapshot_download("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert str(find_checkpoint(cache.root)) == given  # what the library itself takes
    assert find_checkpoint(cache.snapshot) == cache.snapshot
    moe_worker.Engine(cache.root)
    shutil.copytree(cache.snapshot, cache.root / "snapshots" / "other", symlinks=True)
    assert find_checkpoint(cache.root) == cache.snapshot
    (cache.root / "refs" / "main").unlink()
    refuse(cache.root, "2 snapshots", "give one")
    refuse(tmp_path, "cache of 1 models", str(cache.root))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", SINGLE_FILE])
def test_a_snapshot_without_its_blobs(checkpoint, tmp_path, name):
    cache = Cache(checkpoint, tmp_path)
    (cache.snapshot / name).resolve().unlink()
    refuse(
        cache.snapshot, name, "is a symbolic link to ../../blobs/", "mount the whole models--... directory"
    )


READERS = {
    "config.json": read_checkpoint_config,
    "generation_config.json": read_checkpoint_config,
    "hf_quant_config.json": read_checkpoint_config,
    "tokenizer.json": lambda folder: Tokenizer.load(folder, read_checkpoint_config(folder)),
    "tokenizer_config.json": lambda folder: Tokenizer.load(folder, read_checkpoint_config(folder)),
    "model.safetensors": stored_tensors,
    "model.safetensors.index.json": stored_tensors,
    "quality.json": lambda folder: check_quality(folder, 0.1, None),
    "recipe.yaml": lambda folder: read_recipe(folder / "recipe.yaml"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "character device", "directory"])
def test_what_is_no_regular_file_is_refused_at_once(broken, name, kind):
    path = broken / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    begin = time.monotonic()
    with pytest.raises(InputError, match=rf"{name} cannot be read: Is a {kind}; give a regular file"):
        READERS[name](broken)
    assert time.monotonic() - begin < 30


def test_a_worker_with_a_fifo_for_a_config_ends_with_a_sentence(broken):
    (broken / "config.json").unlink()
    os.mkfifo(broken / "config.json")
    program = Path(sys.executable).with_name("moe-worker")
    command = [program, "serve", "--model", broken, "--listen", "127.0.0.1:0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "config.json cannot be read: Is a FIFO" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"n_routed_experts": 10**9},
            "n_routed_experts is 1000000000; it must be an integer from 1 to",
        ),
        ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings is 2147483647"),
    ],
)
def test_sizes_beyond_reason_are_refused_before_anything_is_made(broken, changes, sentence):
    change_config(broken, **changes)
    begin = time.monotonic()
    refuse(broken, sentence)
    assert time.monotonic() - begin < 30


def test_a_config_of_hundreds_of_megabytes_is_not_read(broken):
    with (broken / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: takes no room
    begin = time.monotonic()
    refuse(broken, "config.json is too large: it has 1099511627776 bytes")
    assert time.monotonic() - begin < 30
