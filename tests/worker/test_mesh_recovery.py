"""A mesh that loses a rank goes on: streams lose no token, and none comes twice."""

import contextlib
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.engine.core import EngineCore
from moe_worker.engine.offline import Engine
from moe_worker.engine.requests import Request
from moe_worker.mesh import channel as channel_module
from moe_worker.mesh import exchange, part, recovery
from moe_worker.mesh import member as member_module
from moe_worker.mesh.channel import Channel
from moe_worker.mesh.door import Door
from moe_worker.mesh.errors import MeshError, RankAbsentError, RankLostError
from moe_worker.mesh.joining import Identity, listener_at
from moe_worker.mesh.member import Member
from moe_worker.mesh.messages import Allocate, Ready, Welcome
from moe_worker.mesh.places import ExpertPlaces
from moe_worker.mesh.recovery import REFORM_S, Recovery, agree_on_pages, may_spare, start_together
from moe_worker.sampling.parameters import SamplingParameters
from moe_worker.scheduler.core import Scheduler
from moe_worker.scheduler.plan import Arrival, Limits
from tests.checkpoints import write_checkpoint
from tests.worker import mesh_ranks
from tests.worker.mesh_ranks import followers, free_address
from tests.worker.test_rebalance import places_of

OPTIONS = {"device": "cpu", "dtype": "float32", "threads": 1, "context_length": 256}
PROMPTS = [[7 + i % 290 for i in range(40)], [5], [300 - i % 250 for i in range(30)]]
LENGTHS = (60, 45, 52)
FOUND_S = 60.0
"""Less than what waits for a rank that never comes; benchmarks.mesh_faults measures how soon it is found."""


def requests():
    """Greedy and seeded ones."""
    for number, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        sampling = SamplingParameters(
            max_tokens=length, temperature=number * 0.6, seed=number, ignore_eos=True
        )
        yield Request(number, tuple(prompt), sampling, seed=number)


def run(core, at):
    """Tokens of all requests, and the seconds of each step. at: what happens before a step, by its number."""
    for request in requests():
        core.submit(request)
    found, took = [[] for _ in PROMPTS], {}
    number = 0
    while not core.idle:
        at.get(number, lambda: None)()
        begin = time.monotonic()
        for delta in core.step():
            found[delta.id].append(delta.token)
        took[number] = time.monotonic() - begin
        number += 1
    return found, took


@pytest.mark.timeout(300)
def test_ranks_that_are_killed_or_hang_cost_no_token(tmp_path, caplog):
    """One after the other: during prefill, in decode, and a process that stops without an end."""
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=2)
    mesh = {"mesh": "1x2", "mesh_leader": free_address(), **OPTIONS}
    expected, _ = run(EngineCore(Engine(checkpoint, **OPTIONS)._loaded, EngineOptions(**OPTIONS)), {})
    with contextlib.ExitStack() as stack:
        running = []

        def start():
            running.append(followers(checkpoint, 2, **mesh))
            stack.callback(running[-1].kill)

        def lose(how):
            running[-1].send_signal(how)
            start()

        start()
        engine = Engine(checkpoint, **mesh)
        stack.callback(engine._loaded.member.close)
        core = EngineCore(engine._loaded, EngineOptions(**mesh))
        lost = {0: signal.SIGKILL, 9: signal.SIGKILL, 20: signal.SIGSTOP}
        found, took = run(core, {step: lambda how=how: lose(how) for step, how in lost.items()})
        assert found == expected
        assert engine._loaded.member.formation >= 3
        assert core.load.kv_tokens_used == 0
        assert sum(core.expert_statistics.layers[0].tokens) > 0
        assert [record.message for record in caplog.records if "no heartbeat received in" in record.message]
        # Meeting again includes the start of the new process; finding out does not.
        assert max(took.values()) < 120


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="hung", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_serves_without_a_rank_whose_experts_others_have_and_takes_it_in_again(tmp_path, how):
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=2)
    mesh = {"mesh": "1x2", "mesh_leader": free_address(), "redundant_experts": 8, **OPTIONS}
    expected, _ = run(EngineCore(Engine(checkpoint, **OPTIONS)._loaded, EngineOptions(**OPTIONS)), {})
    with contextlib.ExitStack() as stack:
        running = [followers(checkpoint, 2, **mesh)]
        stack.callback(lambda: [each.kill() for each in running])
        engine = Engine(checkpoint, **mesh)
        stack.callback(engine._loaded.member.close)
        core, present = EngineCore(engine._loaded, EngineOptions(**mesh)), []
        engine._loaded.member.on_change = lambda: present.append(core.mesh_report.ready_ranks)
        found, took = run(core, {9: lambda: running[0].send_signal(how)})
        assert found == expected
        assert (0,) in present
        assert max(took.values()) < FOUND_S
        running.append(followers(checkpoint, 2, **mesh))
        end = time.monotonic() + 120
        while core.mesh_report.ready_ranks != (0, 1):
            assert time.monotonic() < end
            assert run(core, {})[0] == expected
        assert core.mesh_report.epoch >= 2
        assert list(engine._loaded.shards) == [0, 2]
        assert run(core, {})[0] == expected


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("redundant", [0, 8])
def test_a_rank_that_stops_and_goes_on_takes_part_again_as_the_same_process(tmp_path, redundant):
    """Without copies of its experts the others wait for it."""
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=2)
    mesh = {"mesh": "1x2", "mesh_leader": free_address(), "redundant_experts": redundant, **OPTIONS}
    expected, _ = run(EngineCore(Engine(checkpoint, **OPTIONS)._loaded, EngineOptions(**OPTIONS)), {})
    with contextlib.ExitStack() as stack:
        running = followers(checkpoint, 2, **mesh)
        stack.callback(running.kill)
        engine = Engine(checkpoint, **mesh)
        member = engine._loaded.member
        stack.callback(member.close)
        core, before = EngineCore(engine._loaded, EngineOptions(**mesh)), member.processes
        lost = threading.Event()

        def stop():
            running.send_signal(signal.SIGSTOP)
            threading.Thread(target=go_on, daemon=True).start()

        def go_on():
            while member.lost is None and not member.formation:
                time.sleep(0.01)
            lost.set()
            running.send_signal(signal.SIGCONT)

        found, _ = run(core, {9: stop})
        assert found == expected
        assert lost.is_set()
        end = time.monotonic() + FOUND_S
        while core.mesh_report.ready_ranks != (0, 1):
            assert time.monotonic() < end
            assert run(core, {})[0] == expected
        assert member.processes == before


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_may_read_experts_for_longer_than_an_exchange_may_wait(tmp_path, monkeypatch):
    """The others wait for it over their control connections, not in an exchange."""
    monkeypatch.setattr(member_module, "STEP_S", mesh_ranks.SHORT_STEP_S)
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=2)
    mesh = {"mesh": "1x2", "mesh_leader": free_address(), **OPTIONS}
    expected, _ = run(EngineCore(Engine(checkpoint, **OPTIONS)._loaded, EngineOptions(**OPTIONS)), {})
    with contextlib.ExitStack() as stack:
        running = followers(checkpoint, 2, target=mesh_ranks.follow_and_read_slowly, **mesh)
        stack.callback(running.kill)
        engine = Engine(checkpoint, **mesh)
        stack.callback(engine._loaded.member.close)
        core = EngineCore(engine._loaded, EngineOptions(**mesh))
        found, took = run(core, {9: engine._loaded.member.channels[0].close})
        assert found == expected
        assert engine._loaded.member.formation == 1
        assert max(took.values()) > mesh_ranks.SHORT_STEP_S


def test_a_new_rank_of_a_mesh_that_serves_without_another_finds_experts_among_those_present():
    routing = SimpleNamespace(groups=1)
    moe = SimpleNamespace(routed=6, routing=routing)
    config = SimpleNamespace(moe=moe, num_hidden_layers=1, moe_layers=(0,))
    member = SimpleNamespace(shape=MeshShape(1, 3), column=1, number=0, group=None, columns=lambda _: [0, 1])
    places = ExpertPlaces(config, 3, 6)
    stage = part.stage_of(config, member, range(1), places, torch.device("cpu"))
    table = stage.dispatches[0].table
    assert (table.ranks, table.each) == (2, 4)
    found = table.places(torch.arange(6).unsqueeze(1)).flatten().tolist()
    held = ExpertPlaces(config, 3, 6).among(0, [0, 1])
    assert [held[place] for place in found] == list(range(6))


def test_what_a_mesh_can_spare():
    shape, stages = MeshShape(2, 2), [range(2), range(2, 4)]

    def spares(*missing, redundant=8):
        return may_spare(shape, places_of(2, redundant, layers=4), stages, frozenset(missing))

    assert spares(1)
    assert spares(2)
    assert spares(1, 3)  # the other shard is whole
    assert not spares(1, 2)  # no shard is
    assert not spares(2, 3)  # the second stage is gone
    assert not spares(1, redundant=4)  # some experts are


@pytest.mark.timeout(120)
def test_a_rank_that_never_comes_back_is_named(tmp_path, patient, monkeypatch):
    monkeypatch.setattr(recovery, "REFORM_S", 0.2)
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=2)
    mesh = {"mesh": "2x1", "mesh_leader": free_address(), "mesh_reforms": 2, **OPTIONS}
    others = followers(checkpoint, 2, **mesh)
    with contextlib.ExitStack() as stack:
        stack.callback(others.kill)
        engine = Engine(checkpoint, **mesh)
        stack.callback(engine._loaded.member.close)
        core = EngineCore(engine._loaded, EngineOptions(**mesh))
        begin = []

        def kill():
            others.kill()
            begin.append(time.monotonic())

        with pytest.raises(MeshError, match=r"ranks \[1\] did not join within 0.2 s"):
            run(core, {3: kill})
        assert time.monotonic() - begin[0] < FOUND_S


def recovery_of(reform, channel=None, pages=4):
    """Of rank 1, which has so many pages and meets the others by `reform`."""
    channel = channel or SimpleNamespace(send=lambda _: None, receive=lambda _: Allocate(pages))
    member = SimpleNamespace(
        leads=False, rank=1, shape=MeshShape(1, 2), reform=reform, group=None, channels=[channel],
        absent=(), formation=1,
    )  # fmt: skip
    return Recovery(member, SimpleNamespace(release=lambda: None), None, pages, lambda: None)


def test_a_rank_whose_leader_does_not_return_ends():
    waited = []

    def reform(seconds, _):
        waited.append(seconds)
        raise RankAbsentError("the leader is out of reach")

    with pytest.raises(RankAbsentError, match="out of reach"):
        recovery_of(reform).recover(RankLostError("rank 0 left the mesh"))
    assert waited == [REFORM_S]


def test_a_rank_that_the_leader_refuses_ends_and_one_that_it_calls_does_not(monkeypatch):
    monkeypatch.setattr(recovery, "REFORM_PAUSE_S", 0.0)

    def refused(*_):
        raise MeshError("rank 1 is refused")

    with pytest.raises(MeshError, match="is refused"):
        recovery_of(refused).recover(RankLostError("rank 0 left the mesh"))
    called = recovery_of(lambda *_: None)
    for _ in range(3 * recovery.MOST_REFORMS):
        called.recover(RankLostError("rank 0 left the mesh"))


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        pytest.param("others", ["compiled", "all have", "resumed"], id="together"),
        pytest.param(None, ["resumed", "compiled", "all have"], id="one that waits, alone"),
    ],
)
def test_exchanges_are_prepared_when_all_ranks_have_compiled(group, expected):
    """An exchange has a limit, and a new rank may compile for minutes."""
    events = []
    channel = SimpleNamespace(
        send=lambda _: events.append("compiled"), receive=lambda _: events.append("all have") or Allocate(4)
    )
    member = SimpleNamespace(leads=False, group=group, channels=[channel])
    start_together(member, SimpleNamespace(resume=lambda: events.append("resumed")), 4)
    assert events == expected


def connected(rank):
    """A channel to `rank` that listens, and the other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    channel = Channel(ours, rank)
    channel.listen(lambda *_: None)
    return channel, Channel(theirs, 0)


def test_a_leader_says_that_it_waits_for_a_rank_that_loads_as_long_as_that_one_is_alive(monkeypatch):
    """So that it does not count as hung; a rank that loads for ever, or is silent, ends it all the same."""
    monkeypatch.setattr(channel_module, "WAIT_S", 0.001)
    channel, other = connected(2)
    said, often = [], threading.Event()

    def on_wait():
        said.append(1)
        if len(said) == 3:
            often.set()

    member = SimpleNamespace(
        leads=True, rank=0, shape=MeshShape(1, 3), channels=[channel], on_wait=on_wait,
        group=None, formation=1, absent=(), reform=lambda *_: None,
    )  # fmt: skip
    waiting = Recovery(member, SimpleNamespace(release=lambda: None), None, 4, lambda: None)

    def load():
        often.wait(10)
        for _ in range(2):
            other.send(Ready(4))

    with contextlib.ExitStack() as stack:
        stack.callback(other.close)
        stack.callback(channel.close)
        loading = threading.Thread(target=load)
        loading.start()
        waiting.recover(RankLostError("rank 2 left the mesh"))
        loading.join()
        assert often.is_set()
        said.clear()
        monkeypatch.setattr(recovery, "LOAD_SILENT_S", 0.0)
        monkeypatch.setattr(recovery, "LOAD_S", 0.05)
        with pytest.raises(RankAbsentError, match=r"rank 2 .* did not load and compile .* within 0.05 s"):
            waiting.recover(RankLostError("rank 2 left the mesh"))
        assert not said


def test_a_leader_names_the_rank_that_it_waits_for_once(monkeypatch, caplog):
    monkeypatch.setattr(channel_module, "WAIT_S", 0.001)
    caplog.set_level("INFO", recovery.log.name)
    (quick, other), (slow, last) = connected(1), connected(2)
    often = threading.Event()
    calls = []

    def waits(channel):
        calls.append(channel.rank)
        if calls.count(2) == 3:
            often.set()

    def load():
        often.wait(60)
        last.send(Ready(3))

    with contextlib.ExitStack() as stack:
        for channel in (quick, other, slow, last):
            stack.callback(channel.close)
        other.send(Ready(5))
        loading = threading.Thread(target=load)
        loading.start()
        member = SimpleNamespace(leads=True, channels=[quick, slow])
        assert agree_on_pages(member, 4, waits) == 3
        loading.join()
    assert caplog.messages.count("the leader waits for rank 2 to load and compile its part") == 1


def test_a_new_leader_takes_the_pages_that_another_rank_has_allocated():
    """It leaves none for a rank that comes later, because the leader before has done so."""
    ours, theirs = connected(1)
    leader = SimpleNamespace(leads=True, channels=[ours])
    others = SimpleNamespace(leads=False, channels=[theirs])
    with ThreadPoolExecutor() as threads, contextlib.closing(ours), contextlib.closing(theirs):
        found = threads.submit(agree_on_pages, others, 1001)
        assert agree_on_pages(leader, 1000, trim=lambda pages: pages - 10) == 990
        assert found.result(60) == 990
        survivor = recovery_of(lambda *_: None, theirs, 990)
        found = threads.submit(survivor.recover, RankLostError("rank 0 left the mesh"))
        assert agree_on_pages(leader, 1000, trim=lambda pages: pages - 10) == 990
        assert agree_on_pages(leader, 990) == 990
        assert found.result(60) is None


def test_a_rank_that_dies_each_time_it_has_loaded_for_minutes_ends_the_replica(monkeypatch):
    """Each loss alone is within all limits, and the leader says all the time that it does not hang."""
    now, deaths = [0.0], []
    monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None))

    def receive(_, waits):
        now[0] += 250
        waits(channel)
        deaths.append(now[0])
        assert len(deaths) < 20
        raise RankLostError("rank 2 left the mesh")

    channel = SimpleNamespace(rank=2, heard=0.0, receive=receive)
    member = SimpleNamespace(
        leads=True, rank=0, shape=MeshShape(1, 3), channels=[channel], on_wait=lambda: None, group=None,
        formation=1, absent=(), reform=lambda *_: None,
    )  # fmt: skip
    waiting = Recovery(member, SimpleNamespace(release=lambda: None), None, 4, lambda: None)
    for lost_at in (0.0, now[0] + 10_000):  # a later loss has its own time
        now[0] = lost_at
        deaths.clear()
        with pytest.raises(RankAbsentError, match=r"rank 2 .* did not load and compile .* within 600 s"):
            waiting.recover(RankLostError("rank 2 left the mesh"))
        assert len(deaths) == 2


def test_a_process_that_was_cut_off_and_kept_its_weights_is_ready_to_be_taken_in_again(caplog):
    """It has nothing to load, but answers as often as a new one."""
    identity, ready = Identity(MeshShape(1, 2), 1, "digest", b"known"), threading.Event()
    door = Door(listener_at("127.0.0.1", 0), identity, ready.set)
    member = Member(identity, 1, door.listener.getsockname(), torch.device("cpu"))
    door.open(Welcome({}), (0,), 4)
    try:
        cut_off = Recovery(member, SimpleNamespace(release=lambda: None), None, 4, lambda: None)
        cut_off.recover(RankLostError("no heartbeat received"))
        assert member.group is None
        assert ready.wait(FOUND_S)
        assert door.ready == {1}
        assert re.search(r"rank 1 is ready .* mesh 1x2 serves without it", caplog.messages[-1])
    finally:
        member.close()
        door.end()


def test_a_lost_cache_is_computed_again():
    """Prefixes are forgotten, too."""
    scheduler = Scheduler(Limits(sequences=2, waiting=2, pages=16, page_size=4, prefill_tokens=64))
    scheduler.submit(Arrival(id=1, prompt=tuple(range(10)), max_new_tokens=5, arrived=0.0))
    scheduler.complete(scheduler.plan(0.0).step, [50], 1.0)
    step = scheduler.plan(1.0).step
    with pytest.raises(ValueError, match="is in flight"):
        scheduler.lose_cache()
    scheduler.retract(step, shrink=False)
    assert scheduler.lose_cache() == (1,)
    assert (scheduler.used_pages, scheduler.cached_pages, scheduler.free_pages) == (0, 0, 16)
    chunk = scheduler.plan(2.0).step.chunks[0]
    assert (chunk.start, list(chunk.tokens), chunk.samples) == (0, [*range(10), 50], True)


def test_a_lost_connection_is_told_without_the_advice_of_its_library(monkeypatch):
    def lost(*_, **__):
        raise RuntimeError(
            "[/build/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:16269: Connection timed out. "
            "This is typically caused by a remote worker hanging or bugs in the application.\nGLHF!"
        )

    monkeypatch.setattr("torch.distributed.send", lost)
    with pytest.raises(RankLostError) as told:
        exchange.send(torch.zeros(1), 2)
    assert str(told.value) == (
        "rank 2: connection lost: Read error [127.0.0.1]:16269: Connection timed out; see its log"
    )
