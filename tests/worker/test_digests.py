"""Digests stored with a checkpoint's files, as sha256sum and the Hugging Face library write them."""

import hashlib
import json
import shutil
import subprocess

import pytest

import moe_worker
from moe_worker.errors import CheckpointError, InputError
from moe_worker.models.digests import check_digests, known_digests
from tests.checkpoints import write_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path):
    """One bit of the last weight: a finite number all the same."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def as_sha256sum(folder):
    output = subprocess.run(["sha256sum", WEIGHTS], cwd=folder, capture_output=True, text=True, check=True)
    (folder / f"{WEIGHTS}.sha256").write_text(output.stdout)


def as_a_list(folder):
    output = subprocess.run(
        ["sha256sum", "--binary", WEIGHTS, "config.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "SHA256SUMS").write_text(output.stdout)


def as_a_digest_alone(folder):
    (folder / f"{WEIGHTS}.sha256").write_text(sha256(folder / WEIGHTS).upper() + "\n")


def as_a_download(folder):
    noted = folder / ".cache" / "huggingface" / "download"
    noted.mkdir(parents=True)
    (noted / f"{WEIGHTS}.metadata").write_text(f"{'0' * 40}\n{sha256(folder / WEIGHTS)}\n1700000000.0\n")
    (noted / "config.json.metadata").write_text(f"{'0' * 40}\n{'1' * 40}\n1700000000.0\n")


@pytest.mark.parametrize("state", [as_sha256sum, as_a_list, as_a_digest_alone, as_a_download])
def test_a_flipped_bit_is_found_where_asked(copied, state):
    state(copied)
    moe_worker.Engine(copied, check_digests=True)
    flip(copied / WEIGHTS)
    moe_worker.Engine(copied)
    with pytest.raises(InputError, match=r"model.safetensors is damaged: its SHA-256 is [0-9a-f]{64}, and"):
        moe_worker.Engine(copied, check_digests=True)


def test_a_hugging_face_cache_names_its_blobs_by_their_digests(copied, tmp_path):
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    digest = sha256(copied / WEIGHTS)
    shutil.move(copied / WEIGHTS, blobs / digest)
    snapshot = tmp_path / "cache" / "snapshots" / "main"
    shutil.move(copied, snapshot)
    (snapshot / WEIGHTS).symlink_to(f"../../blobs/{digest}")
    assert known_digests(snapshot) == {WEIGHTS: digest}
    check_digests(snapshot, threads=1)
    flip(blobs / digest)
    with pytest.raises(CheckpointError, match="is damaged"):
        check_digests(snapshot, threads=1)


def test_an_index_may_state_them(tmp_path):
    directory = write_checkpoint(tmp_path, max_shard_size="200KB")
    index = directory / "model.safetensors.index.json"
    shards = sorted(directory.glob("*.safetensors"))
    values = json.loads(index.read_text())
    values["metadata"]["sha256"] = {path.name: sha256(path) for path in shards}
    index.write_text(json.dumps(values))
    check_digests(directory, threads=2)
    flip(shards[1])
    with pytest.raises(CheckpointError, match=shards[1].name):
        check_digests(directory, threads=2)


def test_files_without_a_digest_are_named_in_the_log(copied, caplog):
    with caplog.at_level("WARNING"):
        check_digests(copied, threads=1)
    assert "no SHA-256 digest is stated for 1 weight files, the first is model.safetensors" in caplog.text


@pytest.mark.parametrize("line", ["abc", "z" * 64, f"{'0' * 63}  {WEIGHTS}"])
def test_a_list_that_sha256sum_does_not_write(copied, line):
    (copied / f"{WEIGHTS}.sha256").write_text(line + "\n")
    with pytest.raises(CheckpointError, match="contains a line that is not in sha256sum format"):
        check_digests(copied, threads=1)
