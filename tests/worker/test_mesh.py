"""A replica of several processes gives what one process gives; strangers are refused with a sentence."""

import contextlib
import errno
import json
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from contextlib import closing
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moe_api import mutual
from moe_api.inference.v1 import inference_pb2
from moe_api.worker.v1 import worker_pb2
from moe_worker.config import read_model_config
from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.config.routing_report import read_routing_report
from moe_worker.engine import core as core_module
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import load
from moe_worker.engine.offline import Engine
from moe_worker.engine.requests import Request
from moe_worker.errors import SettingsError
from moe_worker.mesh import joining, reception
from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeshError, RankAbsentError, RankLostError
from moe_worker.mesh.joining import Identity, join_leader, listener_at, parse_address
from moe_worker.mesh.member import SECRET, Member, join
from moe_worker.mesh.messages import CODEC, Compute, End, Piece, Refusal, Wait, Welcome
from moe_worker.mesh.places import advised
from moe_worker.mesh.reception import gather_ranks
from moe_worker.sampling.output_format import OutputFormat
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.service import command
from tests.checkpoints import write_checkpoint
from tests.frontend.apiserver import free_port
from tests.pki import Authority, mount
from tests.worker.mesh_ranks import Processes, dispatch, followers, free_address
from tests.worker.serving import COMMAND, DEADLINE_S, Worker
from tests.worker.test_scraped import scrape

SHARED = [7 + i % 290 for i in range(40)]
LONG = [300 - i % 250 for i in range(70)]
PROMPTS = [[*SHARED, 11, 12], SHARED, [5], [*SHARED, 99], LONG, [*SHARED, 11, 12]]
LAYERS = 4
OPTIONS = {"device": "cpu", "dtype": "float32", "threads": 1, "context_length": 256}
GREEDY = SamplingParameters(max_tokens=16, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=1.2, top_p=0.95, top_k=80, seed=5)
LETTERS = OutputFormat("regex", "[a-z ]{1000}")
# Of two or three sequences: some are preempted.
FEW_PAGES = 10
CASES = {
    "2x2 of V3 with copies of experts": (
        "deepseek_v3",
        "2x2",
        {"redundant_experts": 2, "prefill_tokens": 30},
    ),
    "1x3 of V2, uneven experts": ("deepseek_v2", "1x3", {"redundant_experts": 1, "prefill_tokens": 30}),
    "3x1 of Qwen3": ("qwen3_moe", "3x1", {"prefill_tokens": 7}),
}
SLOW = {  # tests/soak/test_mesh_grid.py has the shapes
    "2x2 of V3 on the CPU kernels": ("deepseek_v3", "2x2", {"format": "w4a8", "prefill_tokens": 30})
}


def tokens_of(loaded, options, tokens=16, pages=None):
    """Of each prompt, greedy and seeded in turn, and of each expert. pages: of the KV cache, at most.

    What the last one needs to sample, only the leader has.
    """
    with limited_to(pages):
        core = EngineCore(loaded, options)
    for number, prompt in enumerate(PROMPTS):
        sampling, wanted = replace(SEEDED if number % 2 else GREEDY, max_tokens=tokens), None
        if number == len(PROMPTS) - 1:
            sampling, wanted = replace(sampling, frequency_penalty=0.5), LETTERS
        core.submit(Request(number, tuple(prompt), sampling, seed=number, output_format=wanted))
    found = [[] for _ in PROMPTS]
    while not core.idle:
        for delta in core.step():
            found[delta.id].append(delta.token)
    counted = {layer.layer: layer.tokens for layer in core.expert_statistics.layers}
    assert pages is None or core.counters.preemptions
    return found, counted


def limited_to(pages):
    """The next engine gives sequences `pages` pages at most: some are preempted."""
    limits = core_module._limits

    def fewer(*arguments):
        return replace(limits(*arguments), pages=pages)

    return contextlib.nullcontext() if pages is None else mock.patch.object(core_module, "_limits", fewer)


@pytest.mark.parametrize(
    ("family", "shape", "options"),
    [*CASES.values(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.values())],
    ids=[*CASES, *SLOW],
)
def test_a_mesh_computes_what_one_process_computes(tmp_path, patient, family, shape, options):
    compare_with_one_process(tmp_path, family, shape, options)


def compare_with_one_process(tmp_path, family, shape, options):
    """Logits, and greedy and seeded tokens: with shared prefixes, with few pages, and with neither.

    Without prefixes nothing is computed twice, so the tokens of each expert are the same, too.
    """
    checkpoint = write_checkpoint(tmp_path, family=family, num_hidden_layers=LAYERS)
    if family == "deepseek_v3":
        write_routing_report(checkpoint)
    mesh = {"mesh": shape, "mesh_leader": free_address(), **OPTIONS, **options}
    alone = {**OPTIONS, **options, "redundant_experts": 0}
    others = followers(checkpoint, MeshShape.parse(shape).ranks, **mesh)
    with contextlib.ExitStack() as stack:
        stack.callback(others.kill)
        engine = Engine(checkpoint, **mesh)
        stack.callback(engine._loaded.member.close)
        single = Engine(checkpoint, **alone)
        found, expected = engine.logits(LONG), single.logits(LONG)
        assert (found - expected).abs().max() < 1e-5
        ours, theirs = (engine._loaded, EngineOptions(**mesh)), (single._loaded, EngineOptions(**alone))
        before = engine._loaded.runner.passed_on()[1]
        generated = tokens_of(*ours)[0]
        assert generated == tokens_of(*theirs)[0]
        if MeshShape.parse(shape).pipeline > 1:  # the leader gets tokens, and logits of the last prompt
            *drawn, kept = map(len, generated)
            sizes = sum(drawn) * 8 + kept * engine.config.vocab_size * 4
            assert engine._loaded.runner.passed_on()[1] - before == sizes
        assert tokens_of(*ours, 40, FEW_PAGES)[0] == tokens_of(*theirs, 40, FEW_PAGES)[0]
        plain = [EngineOptions(**each, prefix_cache=False) for each in (mesh, alone)]
        assert tokens_of(ours[0], plain[0]) == tokens_of(theirs[0], plain[1])
        engine._loaded.member.close()
        assert others.wait(DEADLINE_S) == [0] * len(others.processes), others.errors


def write_routing_report(checkpoint):
    """Loads and domains by which the mesh places experts otherwise than in their order."""
    config, draw = read_model_config(checkpoint / "config.json"), random.Random(1)
    layers = [str(layer) for layer in config.moe_layers]

    def shares():
        drawn = [draw.random() ** 3 for _ in range(config.moe.routed)]
        return [each / sum(drawn) for each in drawn]

    domains = {"names": ["a", "b"], "named": 2, "shares": {layer: [shares(), shares()] for layer in layers}}
    report = {"least_mass": 1.0, "loads": {layer: shares() for layer in layers}, "domains": domains}
    (checkpoint / "routing.json").write_text(json.dumps(report))
    start = advised(config, 2, 2, read_routing_report(checkpoint))
    assert sorted(start) == sorted(map(int, layers))
    assert len(set(start.values())) > 1


@pytest.mark.parametrize("ranks", [3])
def test_dispatch_is_exact_for_any_routing(tmp_path, ranks):
    """Ranks without tokens, tokens without experts, ranks that nobody needs, experts at several places."""
    others = Processes(dispatch, [(rank, ranks, tmp_path / "store") for rank in range(ranks)])
    try:
        assert others.wait(DEADLINE_S) == [0] * ranks, others.errors
    finally:
        others.kill()


IDENTITY = Identity(MeshShape(1, 2), epoch=3, digest="a1" * 32, secret=b"known")
STRANGERS = {
    "its mesh is 2x2, the leader's 1x2": replace(IDENTITY, shape=MeshShape(2, 2)),
    "its epoch is 2, the leader's is 3": replace(IDENTITY, epoch=2),
    "its checkpoint or options are not the leader's": replace(IDENTITY, digest="b2" * 32),
    "its worker version is 0.9 old, the leader's": replace(IDENTITY, version="0.9 old"),
    "its worker version is an older one, the leader's": replace(IDENTITY, version="", secret=b"signed"),
    "the mesh's secret is another one": replace(IDENTITY, secret=b"guessed"),
}


class Leader:
    """Waits for ranks in a thread."""

    def __init__(self, identity=IDENTITY, seconds=60.0):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.outcome = None
        self._thread = threading.Thread(target=self._run, args=(identity, seconds))
        self._thread.start()

    def _run(self, identity, seconds):
        with closing(self._listener):
            try:
                self.outcome = gather_ranks(self._listener, identity, Welcome({3: (0, 1)}), seconds)
            except MeshError as error:
                self.outcome = error

    def end(self):
        self._thread.join(DEADLINE_S)
        return self.outcome


def test_a_rank_on_a_gpu_without_a_number_meets_the_others(monkeypatch):
    """`auto` gives such a device; torch refuses to make it the current one, also where there is no GPU."""
    met = []
    monkeypatch.setattr(Member, "form", lambda member, _: met.append(member.rank))
    options = EngineOptions(device="cuda", mesh="1x2", mesh_rank=1, mesh_leader="127.0.0.1:1")
    join(options, "digest", torch.device("cuda"))
    assert met == [1]


def test_ranks_that_do_not_belong_are_refused_and_the_right_one_still_joins():
    leader = Leader()
    for sentence, identity in STRANGERS.items():
        with pytest.raises(MeshError, match=sentence):
            join_leader(leader.address, 1, identity, 5)
    for rank in (0, 2, -1):
        with pytest.raises(MeshError, match="has ranks 0 to 1, and 0 leads"):
            join_leader(leader.address, rank, IDENTITY, 5)
    with closing(socket.create_connection(leader.address)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    channel, welcome = join_leader(leader.address, 1, IDENTITY, 5)
    assert welcome.moved == {3: (0, 1)}
    assert [other.rank for other in leader.end()] == [1]
    channel.close()


@pytest.fixture
def authority():
    return Authority()


@pytest.fixture
def folder(tmp_path, authority):
    mount(tmp_path / "tls", authority.pair(mutual.WORKER))
    return str(tmp_path / "tls")


def test_ranks_meet_over_tls_and_nothing_of_it_can_be_read(folder):
    """A wiretap between them sees handshakes and ciphertext; the longest frames take many records."""
    identity = replace(IDENTITY, tls=folder)
    leader, seen = Leader(identity), bytearray()
    with wiretapped(leader.address, seen) as address:
        channel, welcome = join_leader(address, 1, identity, 5)
        assert welcome.moved == {3: (0, 1)}
        (other,) = leader.end()
        lost, echoed = [], Compute((Piece(tuple(range(200_000)), 0, (), 0, ()),))
        channel.listen(lambda _, why: lost.append(why))
        senders = [threading.Thread(target=other.send, args=(echoed,)) for _ in range(4)]
        for sender in senders:
            sender.start()
        for _ in senders:
            channel.send(Wait())  # while its other thread waits for data
            assert channel.receive(Compute) == echoed
            assert isinstance(other.receive(Wait), Wait)
        for sender in senders:
            sender.join()
        assert not other.ended()
        assert not lost
        channel.close()
        while not other.ended():
            time.sleep(0.01)
        other.close()
    assert len(seen) > 1e6
    readable, leader = bytearray(), Leader()
    with wiretapped(leader.address, readable) as address:
        channel, _ = join_leader(address, 1, IDENTITY, 5)
        (other,) = leader.end()
        channel.close()
        other.close()
    for secret in (IDENTITY.digest.encode(), IDENTITY.version.encode()):
        assert secret in readable
        assert secret not in seen


def test_ranks_without_the_leaders_authority_or_without_tls_do_not_join(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "GREETING_S", 0.5)
    mount(tmp_path / "other", Authority().pair(mutual.WORKER))
    leader, plain = Leader(replace(IDENTITY, tls=folder)), Leader()
    for at, tls, sentence in (
        (leader, str(tmp_path / "other"), "certificate verify failed"),
        (leader, "", "its messages did not arrive|left the mesh"),
        (leader, str(tmp_path / "none"), "No such file"),
        (plain, folder, "rank 0: no TLS connection .*; give all ranks one image, and --tls"),
    ):
        with pytest.raises(RankAbsentError, match=sentence):
            join_leader(at.address, 1, replace(IDENTITY, tls=tls), 0.1)
    channel, _ = join_leader(leader.address, 1, replace(IDENTITY, tls=folder), 5)
    assert [other.rank for other in leader.end()] == [1]
    channel.close()
    channel, _ = join_leader(plain.address, 1, IDENTITY, 5)
    plain.end()
    channel.close()


def test_a_leader_with_another_components_certificate_is_refused(tmp_path, authority):
    mount(tmp_path / "frontend", authority.pair(mutual.FRONTEND))
    mount(tmp_path / "worker", authority.pair(mutual.WORKER))
    leader = Leader(replace(IDENTITY, tls=str(tmp_path / "frontend")), seconds=0.5)
    with pytest.raises(RankAbsentError, match=r"not valid for 'worker\.moe-operator\.internal'"):
        join_leader(leader.address, 1, replace(IDENTITY, tls=str(tmp_path / "worker")), 0.1)
    assert isinstance(leader.end(), MeshError)


def test_ranks_use_the_certificate_that_the_worker_serves_with(folder, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(command, "follow", lambda settings, _: started.append(settings))
    monkeypatch.setattr(command, "run", started.append)
    mesh = ("--mesh", "1x2", "--mesh-leader", "127.0.0.1:1", "--tls", folder)
    for rank in ("0", "1"):
        words = ["--model", str(tmp_path), *mesh, "--mesh-rank", rank]
        command.serve.main(words, standalone_mode=False)
    assert [(each.options.mesh_rank, each.options.mesh_tls) for each in started] == [(0, folder), (1, folder)]


@contextlib.contextmanager
def wiretapped(target, seen):
    """An address that leads to `target`; `seen` gets the bytes of one connection, in both directions."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def copy(source, sink):
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        def accept():
            ours, _ = listener.accept()
            theirs = socket.create_connection(target)
            back = threading.Thread(target=copy, args=(theirs, ours))
            back.start()
            copy(ours, theirs)
            back.join()
            ours.close()
            theirs.close()

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()
        thread.join()


def test_a_leader_whose_name_does_not_resolve_is_named():
    with pytest.raises(MeshError, match=r"name leader\.invalid of the mesh's leader does not resolve"):
        join_leader(("leader.invalid", 29500), 1, IDENTITY, 0.3)


def test_the_leader_of_a_name_listens_although_the_name_does_not_resolve():
    with closing(listener_at("leader.invalid", 0)) as listener:
        port = listener.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port), timeout=5)):
            pass


def test_a_second_process_of_a_rank_is_refused():
    identity = replace(IDENTITY, shape=MeshShape(1, 3))
    leader = Leader(identity)
    first, _ = join_leader(leader.address, 1, identity, 5)
    with pytest.raises(MeshError, match="another process has joined as rank 1"):
        join_leader(leader.address, 1, identity, 5)
    second, _ = join_leader(leader.address, 2, identity, 5)
    assert isinstance(leader.end(), list)
    first.close()
    second.close()


def test_a_mesh_that_stays_incomplete_says_who_is_missing():
    outcome = Leader(replace(IDENTITY, shape=MeshShape(2, 2)), seconds=0.3).end()
    assert str(outcome).startswith("mesh 2x2 is incomplete: ranks [1, 2, 3] did not join within 0.3 s")


def test_a_stranger_that_sends_a_byte_now_and_then_keeps_no_rank_from_joining(monkeypatch):
    """A limit for each read would hold the leader for as long as bytes come."""
    monkeypatch.setattr(joining, "GREETING_S", 0.3)
    leader, stop = Leader(), threading.Event()
    with closing(socket.create_connection(leader.address)) as stranger:

        def trickle():
            with contextlib.suppress(OSError):  # the leader has closed it
                stranger.sendall((4000).to_bytes(4, "big"))
                while not stop.wait(0.1):
                    stranger.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            channel, _ = join_leader(leader.address, 1, IDENTITY, 10)
            assert [other.rank for other in leader.end()] == [1]
            channel.close()
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("encrypted", [False, True])
def test_strangers_that_say_nothing_keep_no_rank_from_joining(folder, encrypted):
    """More than the leader greets at a time, and each of them may take its time."""
    identity = replace(IDENTITY, tls=folder if encrypted else "")
    leader = Leader(identity)
    with contextlib.ExitStack() as stack:
        for _ in range(reception.STRANGERS + 20):
            stack.enter_context(closing(socket.create_connection(leader.address)))
        began = time.monotonic()
        channel, _ = join_leader(leader.address, 1, identity, 60)
        assert time.monotonic() - began < joining.GREETING_S
        assert [other.rank for other in leader.end()] == [1]
        channel.close()
    for thread in threading.enumerate():
        if thread.name == "mesh greeting":
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def test_a_leader_that_can_take_no_connection_for_a_while_takes_ranks_afterwards(monkeypatch, caplog):
    """As with too many files open."""
    monkeypatch.setattr(reception, "PAUSE_S", 0.0)
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def full(listener):
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", full)
    leader = Leader()
    channel, _ = join_leader(leader.address, 1, IDENTITY, 5)
    assert [other.rank for other in leader.end()] == [1]
    assert "no rank can join at the moment" in caplog.text
    channel.close()


def test_a_channel_tells_what_it_lacks_within_which_time():
    ours, theirs = tcp_pair()
    channel = Channel(ours, 2)
    theirs.sendall(CODEC.encode(Wait()))
    with pytest.raises(MeshError, match="rank 2: unexpected message Wait, expected Welcome or Refusal; "):
        channel.receive(Welcome, Refusal)
    channel.end_within(0.05)
    with pytest.raises(RankLostError, match=r"rank 2: connection lost: its messages .* within 0\.05 s"):
        channel.receive(Welcome)
    with pytest.raises(RankLostError, match="connection lost"):
        channel.send(Wait())
    channel.end_within(None)
    channel.send(Wait())
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with pytest.raises(
        RankLostError, match=r"rank 2: connection lost: .*Connection reset by .*; check that it runs"
    ):
        channel.receive(Welcome)
    channel.close()


def test_a_channel_refuses_what_is_no_message():
    ours, theirs = tcp_pair()
    channel = Channel(ours, 4)
    theirs.sendall((1 << 30).to_bytes(4, "big"))
    with pytest.raises(MeshError, match="rank 4: invalid message: 1073741824 bytes, not 1 to"):
        channel.receive()
    theirs.sendall((3).to_bytes(4, "big") + b"\x01\xc1\xc1")
    with pytest.raises(MeshError, match=r"rank 4: invalid message: .*; use the same worker version"):
        channel.receive()
    theirs.close()
    with pytest.raises(MeshError, match="rank 4 left the mesh"):
        channel.receive()
    channel.close()


def test_a_channel_carries_runs_one_after_another_and_its_end_after_one_is_no_loss():
    ours, theirs = tcp_pair()
    channel, lost = Channel(ours, 0), []
    channel.listen(lambda _, why: lost.append(why))
    theirs.sendall(CODEC.encode(End()) + CODEC.encode(Wait()) + CODEC.encode(End()))
    assert [type(channel.receive(End, Wait)) for _ in range(3)] == [End, Wait, End]
    theirs.close()
    with pytest.raises(MeshError, match="rank 0 left the mesh"):
        channel.receive(End)
    for thread in threading.enumerate():
        if thread.name == "mesh rank 0":
            thread.join(DEADLINE_S)
    assert lost == []
    channel.close()


def tcp_pair():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mesh": "2"}, "write PIPELINExEXPERT"),
        ({"mesh": "0x2"}, "write PIPELINExEXPERT"),
        ({"mesh": "64x64"}, "of up to 1024 ranks"),
        ({"mesh": "2x2", "mesh_rank": 4}, "has ranks 0 to 3"),
        ({"redundant_experts": 1}, "has one rank a stage"),
    ],
)
def test_impossible_meshes_are_refused(options, sentence):
    with pytest.raises(SettingsError, match=sentence):
        EngineOptions(**options)


@pytest.mark.parametrize("text", ["host", ":1", "host:0", "host:65536", "host:1٣", "a..b:1", "x" * 64 + ":1"])
def test_what_is_no_address_of_a_leader_is_refused(text):
    with pytest.raises(SettingsError, match="is no address; write HOST:PORT of rank 0"):
        parse_address(text)


def test_a_leader_needs_an_address(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    with pytest.raises(SettingsError, match="needs --mesh-leader; write HOST:PORT of rank 0"):
        load(checkpoint, EngineOptions(mesh="1x2", **OPTIONS), progress=False)


@pytest.mark.parametrize(("secret", "warned"), [("", True), ("of this mesh", False)])
def test_a_leader_says_for_whom_it_waits(monkeypatch, caplog, secret, warned):
    monkeypatch.setenv(SECRET, secret)
    monkeypatch.setattr(Member, "form", lambda *_: None)
    address = free_address()
    with caplog.at_level("INFO"):
        member = join(EngineOptions(mesh="2x2", mesh_leader=address, **OPTIONS), "", torch.device("cpu"))
    member.close()
    assert f"mesh 2x2: waiting at {address} up to 600 s for 3 more ranks" in caplog.messages
    assert warned == any(f"{SECRET} is empty" in each for each in caplog.messages)


def test_a_stream_outlives_the_other_rank(tmp_path):
    """By the command line: the other rank is killed while a client reads, and a new process replaces it."""
    checkpoint, address = write_checkpoint(tmp_path, eos_token_id=None), free_address()
    secret = {SECRET: "known to both"}
    flags = ["--mesh", "2x1", "--mesh-leader", address, "--dtype", "float32", "--device", "cpu"]
    command = [*COMMAND, "serve", "--model", str(checkpoint), "--threads", "1", *flags, "--mesh-rank", "1"]
    environment = os.environ | secret | {"OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:

        def start():
            process = subprocess.Popen(command, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        other = start()
        # A new process needs longer than the engine may hang.
        with Worker(checkpoint, *flags, "--stall-timeout", "2", environment=secret) as worker:
            worker.wait_ready()
            expected = Engine(checkpoint, **OPTIONS).generate("hello", SamplingParameters(max_tokens=100))
            stream = worker.generate(max_tokens=100)
            text = next(stream).text
            other.kill()
            start()
            assert text + "".join(response.text for response in stream) == expected[0].text
            assert "has formed again (" in "\n".join(worker.lines)


@contextlib.contextmanager
def two_processes(tmp_path, shape):
    """By the command line: the leader, and the other rank, both ready."""
    checkpoint, secret = write_checkpoint(tmp_path, eos_token_id=None), {SECRET: "known to both"}
    flags = ["--mesh", shape, "--mesh-leader", free_address(), "--dtype", "float32", "--device", "cpu"]
    metrics_port = free_port()
    follower = [*flags, "--mesh-rank", "1", "--metrics-port", str(metrics_port)]
    with (
        Worker(checkpoint, *flags, environment=secret) as leader,
        Worker(checkpoint, *follower, environment=secret) as other,
    ):
        leader.wait_ready()
        other.wait_ready()
        other.metrics_port = metrics_port
        yield checkpoint, leader, other


def check_scores(checkpoint, leader):
    """Prompts are scored over a mesh as in one process."""
    sampling = inference_pb2.SamplingParameters(max_tokens=1, prompt_logprobs=0)
    ids = inference_pb2.TokenIds(ids=LONG)
    request = inference_pb2.GenerateRequest(prompt_tokens=ids, sampling=sampling)
    found = [token.logprob for r in leader.inference.Generate(request, timeout=60) for token in r.prompt]
    single = Engine(checkpoint, device="cpu", dtype="float32", threads=1).logits(LONG)
    rows = single[:-1].log_softmax(-1)
    expected = rows.gather(1, torch.tensor(LONG[1:]).unsqueeze(1)).squeeze(1).tolist()
    assert found[1:] == pytest.approx(expected, abs=1e-3)


def test_a_terminating_mesh_finishes_its_streams_and_reports_its_ranks_before(tmp_path):
    with two_processes(tmp_path, "1x2") as (checkpoint, leader, other):
        (computing,) = scrape(other.metrics_port)["moe_worker_mesh_computing"].samples
        assert (computing.value, computing.labels["moe_worker_mesh_rank"]) == (1, "1")
        check_scores(checkpoint, leader)
        stream = leader.generate(max_tokens=60)
        next(stream)
        mesh = leader.load.GetLoad(worker_pb2.GetLoadRequest(), timeout=DEADLINE_S).mesh
        assert (mesh.pipeline, mesh.expert, list(mesh.ready_ranks)) == (1, 2, [0, 1])
        assert [(stage.first_layer, stage.layers) for stage in mesh.stages] == [(0, 3)]
        experts = leader.load.GetExpertLoad(worker_pb2.GetExpertLoadRequest(), timeout=DEADLINE_S)
        assert all(sum(layer.rank_tokens) == sum(layer.tokens) > 0 for layer in experts.layers)
        for worker in (other, leader):  # as the kubelet does, to both at once
            worker.process.send_signal(signal.SIGTERM)
        assert sum(len(response.tokens) for response in stream) == 59
        assert [worker.process.wait(DEADLINE_S) for worker in (leader, other)] == [0, 0]


def test_a_refused_rank_ends_with_the_sentence(tmp_path):
    checkpoint, leader = write_checkpoint(tmp_path), Leader(seconds=DEADLINE_S)
    host, port = leader.address
    command = [*COMMAND, "serve", "--model", str(checkpoint), "--mesh", "1x2", "--mesh-rank", "1"]
    command += ["--mesh-leader", f"{host}:{port}", "--mesh-epoch", "3"]
    result = subprocess.run(
        command,
        env=os.environ | {SECRET: "known"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: rank 1 is refused: its checkpoint or options are not the leader's (digest "
    )
    channel, _ = join_leader(leader.address, 1, IDENTITY, 5)
    leader.end()
    channel.close()
