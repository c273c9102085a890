"""`moe-worker fetch` with the real clients of a hub and of object stores, against a server on loopback."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest

from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_worker.errors import FetchError, SettingsError, SourceError
from moe_worker.fetch.cache import KEPT_S, CheckpointCache, hold, size_of
from moe_worker.fetch.command import bring
from moe_worker.fetch.listing import RemoteFile, checkpoint_files, key
from moe_worker.fetch.location import Location, parse
from moe_worker.fetch.meter import Meter, served
from moe_worker.fetch.sources import open_source
from moe_worker.fetch.transfer import Patience
from tests.frontend.apiserver import free_port
from tests.worker.remote import Remote, serving

WEIGHTS = bytes(range(256)) * 49152  # more than the 10 MiB that the client of the hub writes at once
HUB, S3, GS = "hf://moe/docs", "s3://models/docs", "gs://models/docs"
QUICK = Patience(attempts=3, sleep=lambda _: None)


@pytest.fixture
def remote(monkeypatch):
    files = {
        "config.json": b"{}",
        "tokenizer.json": b"[1]",
        "model.safetensors": WEIGHTS,
        "run.py": b"print()",
    }
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "c"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOE_FETCH_ALLOW_HTTP", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(Remote(files)) as running:
        account = {"gcs_base_url": running.url, "disable_oauth": True, "client_email": "", "private_key": "",
                   "private_key_id": ""}  # fmt: skip
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        yield running


def fetched(remote, folder, uri=HUB, patience=QUICK, meter=None, timeout_s=1.0, **cache):
    source = open_source(parse(uri), "" if uri.startswith("gs") else remote.url, timeout_s)
    return bring(source, uri, CheckpointCache(folder, **cache), meter or Meter(), patience)


@pytest.mark.parametrize("uri", [HUB, S3, GS])
def test_a_checkpoint_arrives_whole_and_is_downloaded_once(remote, tmp_path, uri):
    entry = fetched(remote, tmp_path, uri)
    assert {path.name for path in entry.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (entry / "model.safetensors").read_bytes() == WEIGHTS
    assert fetched(remote, tmp_path, uri) == entry
    assert len(remote.downloads("model.safetensors")) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".lock"}


def test_a_token_is_needed_and_is_sent(remote, tmp_path, monkeypatch):
    remote.token = "secret"  # noqa: S105 - of the stand-in
    with pytest.raises(SourceError, match=r"is refused: the hub answers 401 to its list of files; accept"):
        fetched(remote, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetched(remote, tmp_path).is_dir()


@pytest.mark.parametrize(
    ("uri", "status", "sentence"),
    [
        (HUB, 403, "the hub answers 403 to its list of files"),
        (HUB, 404, "model hf://moe/docs does not exist: the hub answers 404"),
        (S3, 403, "model s3://models/docs is refused: its list of files"),
        (S3, 404, "model s3://models/docs does not exist"),
    ],
)
def test_what_the_source_refuses_is_not_tried_again(remote, tmp_path, uri, status, sentence):
    remote.faults["list"] = [status] * 9
    with pytest.raises(SourceError, match=sentence):
        fetched(remote, tmp_path, uri)
    assert len(remote.requests) == 1


@pytest.mark.parametrize("uri", [HUB, S3])
@pytest.mark.parametrize("what", ["list", "model.safetensors"])
def test_a_busy_source_is_asked_again(remote, tmp_path, uri, what):
    remote.faults[what] = [429, 503]
    assert fetched(remote, tmp_path, uri).is_dir()


def test_a_source_that_stays_down_is_given_up_with_a_sentence(remote, tmp_path):
    remote.faults["list"] = [500] * 99
    with pytest.raises(FetchError, match="its list of files: the hub answers 500; retrying"):
        fetched(remote, tmp_path)


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_download_goes_on_where_the_connection_ended(remote, tmp_path, fault):
    remote.faults["model.safetensors"] = [(fault, 11_000_000)]
    entry = fetched(remote, tmp_path)
    assert (entry / "model.safetensors").read_bytes() == WEIGHTS
    assert remote.downloads("model.safetensors")[-1].startswith("bytes=")


def test_a_store_that_stalls_is_asked_for_the_rest(remote, tmp_path):
    remote.faults["model.safetensors"] = [("stall", 11_000_000)]
    assert (fetched(remote, tmp_path, S3) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("uri", [HUB, S3])
@pytest.mark.parametrize("size", [1000, len(WEIGHTS) + 1000])
def test_a_source_that_lies_about_a_size_is_found_out(remote, tmp_path, uri, size):
    remote.stated["model.safetensors"] = size
    with pytest.raises(FetchError, match=r"model.safetensors (is damaged|has \d+ bytes)|model.safetensors"):
        fetched(remote, tmp_path, uri)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.suffix == ""]


def test_a_source_that_sends_more_than_it_lists_does_not_fill_the_disk(remote, tmp_path):
    remote.stated["model.safetensors"] = 1000
    source = open_source(parse(HUB), remote.url, 1.0)
    (file,) = (one for one in source.files() if one.name == "model.safetensors")
    with pytest.raises(FetchError, match=r"is longer than the 1000 bytes that are listed; retrying"):
        source.download(file, tmp_path)
    assert size_of(tmp_path) == 0


def test_a_store_that_sends_more_than_it_was_asked_for_is_stopped(remote, tmp_path):
    remote.faults["model.safetensors"] = [("more", 4 << 20)]
    source = open_source(parse(S3), remote.url, 5.0)
    (file,) = (one for one in source.files() if one.name == "model.safetensors")
    with pytest.raises(FetchError, match=r"is longer than the \d+ bytes that are listed; retrying"):
        source.download(file, tmp_path)
    assert size_of(tmp_path) == 0
    source.download(file, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_bytes_that_changed_on_the_way_are_downloaded_again(remote, tmp_path):
    source = open_source(parse(HUB), remote.url, 1.0)
    files = source.files()
    remote.files["model.safetensors"] = b"x" * len(WEIGHTS)
    source.files = lambda: files
    with pytest.raises(FetchError, match=r"model.safetensors is damaged: it has the SHA-256"):
        bring(source, HUB, CheckpointCache(tmp_path), Meter(), QUICK)
    remote.files["model.safetensors"] = WEIGHTS
    assert bring(source, HUB, CheckpointCache(tmp_path), Meter(), QUICK).is_dir()


def test_a_disk_that_is_too_small_is_known_before_a_byte_is_downloaded(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and _Usage(64 << 20))
    with pytest.raises(
        FetchError, match=r"does not fit: 12.0 MiB to download, 64.0 MiB free in .*; free space"
    ):
        fetched(remote, tmp_path)
    assert remote.downloads("model.safetensors") == []


class _Usage:
    def __init__(self, free):
        self.free = free


def command(remote, folder, *more):
    return [
        *(sys.executable, "-m", "moe_worker", "fetch", HUB, "--endpoint", remote.url, "--timeout", "1"),
        *("--cache", str(folder / "cache"), "--link", str(folder / "run/current"), *more),
    ]


def test_a_disk_that_is_full_at_90_percent_is_named_and_the_next_run_goes_on(remote, tmp_path):
    """A limit on the size of files stands for the disk: writes fail in the middle of one."""
    full = len(WEIGHTS) * 9 // 10

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))

    failed = subprocess.run(
        command(remote, tmp_path), preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: the disk is full: model.safetensors of 12582912 bytes cannot be written to"
    )
    assert last.endswith("File too large; free space, or give spec.model.cache a larger volume")
    done = subprocess.run(command(remote, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/current/model.safetensors").read_bytes() == WEIGHTS


def test_a_killed_download_is_continued_and_its_lock_is_free(remote, tmp_path):
    remote.faults["model.safetensors"] = [("stall", 11_000_000)]
    process = subprocess.Popen(command(remote, tmp_path, "--timeout", "60"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while size_of(tmp_path) < 10_000_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert fetched(remote, tmp_path / "cache").is_dir()
    assert int(remote.downloads("model.safetensors")[-1].removeprefix("bytes=").rstrip("-")) > 0


def test_replicas_on_a_node_share_one_download(remote, tmp_path):
    remote.faults["model.safetensors"] = [("stall", 11_000_000)]
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetched(remote, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert [span for span in remote.downloads("model.safetensors") if not span] == [""]


def entries(root, *names, age_s=2 * KEPT_S):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "w").write_bytes(b"x" * 1000)
        (root / f"{name}.lock").touch()
        then = time.time() - age_s + number
        os.utime(root / f"{name}.lock", (then, then))


def test_the_least_recently_used_entries_go_first_and_no_more_than_needed(tmp_path):
    entries(tmp_path, "oldest", "older", "old")
    CheckpointCache(tmp_path, most_bytes=2500).make_room("new", 1200, HUB)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"old"}


def test_entries_that_workers_read_or_just_got_are_not_evicted(tmp_path):
    entries(tmp_path, "read")
    entries(tmp_path, "fresh", age_s=60)
    (tmp_path / "link").symlink_to(tmp_path / "read")
    held = hold(tmp_path / "link")
    assert held is not None
    cache = CheckpointCache(tmp_path, most_bytes=2500)
    with (
        held,
        pytest.raises(FetchError, match=r"does not fit: 0.0 MiB to download, .* and the cache may take"),
    ):
        cache.make_room("new", 1200, HUB)
    assert (tmp_path / "read").exists()
    cache.make_room("new", 1200, HUB)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"fresh", "link"} - {"link"}


def test_a_folder_that_is_no_entry_is_not_held(tmp_path):
    assert hold(tmp_path) is None


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1:2"])
def test_an_address_for_progress_that_is_none_is_named(address):
    sentence = f"cannot listen on {address}; give a free HOST:PORT"
    with pytest.raises(SettingsError, match=sentence), served(Meter(), address):
        pass


def test_progress_is_served_over_grpc():
    clock = iter(range(0, 1000, 10))
    sizes = iter([100, 300])
    meter = Meter(total=1000, measure=lambda: next(sizes), clock=lambda: next(clock))
    meter.sample()
    meter.sample()
    port = free_port()
    with served(meter, f"127.0.0.1:{port}"), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = worker_pb2_grpc.FetchServiceStub(channel)
        told = stub.GetProgress(worker_pb2.GetProgressRequest(), timeout=60)
    assert (told.bytes, told.total_bytes, told.seconds_left) == (300, 1000, 36)


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("hf://a/b", Location("hf://a/b", "hf", "a/b")),
        ("hf://a/b@v1.0/x", Location("hf://a/b@v1.0/x", "hf", "a/b", revision="v1.0/x")),
        ("s3://bucket/a/b/", Location("s3://bucket/a/b/", "s3", "bucket", "a/b")),
        ("gs://bucket", Location("gs://bucket", "gs", "bucket")),
    ],
)
def test_uris(uri, location):
    assert parse(uri) == location


@pytest.mark.parametrize(
    "uri", ["hf://a", "file:///a", "s3://", "s3://B/x", "hf://a/b@", "https://a/b", "s3://a/b?c"]
)
def test_other_uris_are_refused(uri):
    with pytest.raises(SettingsError, match="cannot be fetched: it is neither"):
        parse(uri)


def test_the_key_is_that_of_the_content():
    one = [RemoteFile("a", 1, "etag", sha256="f"), RemoteFile("b", 2, "x")]
    assert key(one) == key([RemoteFile("a", 1, "other", sha256="f"), RemoteFile("b", 2, "x")])
    assert key(one) != key([RemoteFile("a", 1, "etag", sha256="e"), RemoteFile("b", 2, "x")])


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a.safetensors"], "has no config.json"),
        (["config.json", "pytorch_model.bin"], "has no weights in safetensors format: it has 1 other files"),
    ],
)
def test_what_is_no_checkpoint_is_refused_before_the_download(names, sentence):
    with pytest.raises(SourceError, match=sentence):
        checkpoint_files([RemoteFile(name, 1) for name in names], HUB)


def test_names_that_lead_out_of_the_folder_are_never_written():
    files = [
        RemoteFile(n, 1) for n in ("config.json", "a.safetensors", "../x.json", "a/b.json", "/etc/a.json")
    ]
    assert [one.name for one in checkpoint_files(files, HUB)] == ["a.safetensors", "config.json"]


def test_the_worker_package_needs_no_client_before_it_fetches():
    code = "import sys, moe_worker.fetch.command as c; print({'obstore', 'huggingface_hub'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert Path(sys.executable).exists()
